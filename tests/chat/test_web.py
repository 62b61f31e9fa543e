"""The page of `repeng chat --web` in a real browser."""

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import closing
from importlib.util import find_spec
from urllib.parse import urlencode, urlsplit

import pytest
from support import ROOT

from repeng import extract, tiny
from repeng.chat import Chat, Column
from repeng.control.dials import Dials

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if not find_spec(name)] + ([] if CHROMIUM else ["chromium"])
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}; see CONTRIBUTING.md"),
]
HOSTILE = "<img src=x onerror=window.broken=1> ${window.broken=1} {{7*7}} <b>bold</b>"
PROMPT = "today the weather seems"
# Every connection that the server's process opens, one address a line.
WATCH = """
import os, sys
def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) or event == "socket.getaddrinfo":
        place = args[1][0] if event == "socket.connect" else args[0]
        with open(os.environ["CONNECTIONS"], "a") as file:
            file.write(f"{place}\\n")
sys.addaudithook(watch)
"""
NAMED = {"button", "textbox", "slider", "spinbutton", "checkbox", "combobox", "link", "radio", "searchbox", "log"}


class Server:
    """`repeng chat --web` in a process of its own."""

    def __init__(self, folder, *more, **environment):
        (folder / "watch").mkdir(exist_ok=True)
        (folder / "watch" / "sitecustomize.py").write_text(WATCH)
        self.connections = folder / "connections"
        environment = {
            **{name: value for name, value in os.environ.items() if name != "REPENG_API_KEY"},
            "PYTHONPATH": str(folder / "watch"),
            "CONNECTIONS": str(self.connections),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        words = ["chat", str(folder / "mood.safetensors"), "--model_name_or_path", "tiny", "--use_cpu"]
        argv = [sys.executable, "-m", "repeng", *words, "--web", "--port", "0", "--max_new_tokens", "12", *more]
        self.process = subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"running on http://[\d.]+:(\d+)", line):
                self.port = int(found[1])
                self.url = f"http://127.0.0.1:{self.port}"
                break
        else:
            pytest.fail("".join(self.lines[-30:]))
        # What it writes must be read, or it would wait.
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def ask(self, method, path, body=None, **headers):
        """Status and text of a request."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read().decode("utf-8", "replace"), answer.headers

    def end(self):
        self.process.terminate()
        status = self.process.wait(timeout=60)
        self.reader.join()
        self.process.stderr.close()
        assert status == 128 + 15


@pytest.fixture(scope="module")
def vector(embedded, tokenizer):
    return extract(embedded[0], tokenizer, tiny.pairs("mood", 40, 0), layers=[2], held_out=0)


@pytest.fixture(scope="module")
def server(vector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    vector.save(folder / "mood.safetensors")
    running = Server(folder)
    yield running
    running.end()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        yield started
        started.close()


@pytest.fixture
def opened(server, browser):
    """A page, the addresses that it asked for, and the complaints of the browser, which must stay empty."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(server.url)
    page.get_by_role("button", name="Send").wait_for(timeout=60_000)
    yield page
    page.close()
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert len(asked) > 5 and hosts == {f"127.0.0.1:{server.port}"}
    assert complaints == []


def set_slider(page, column, c):
    number = page.get_by_role("spinbutton", name=f"{column}: coefficient of mood")
    number.fill(str(c))
    number.press("Tab")


def text_of(page, column, index=-1):
    texts = page.locator(f"#column-{column} .answer .text")
    return texts.nth(index if index >= 0 else texts.count() - 1).inner_text().strip()


def settled(page, answers=2):
    """Wait until that many answers have their costs."""
    page.wait_for_function(f"document.querySelectorAll('.talk .cost').length === {answers}", timeout=60_000)
    page.wait_for_function("document.querySelectorAll('.talk[aria-busy=true]').length === 0", timeout=60_000)


def test_sliders_set_what_is_said(opened, embedded, tokenizer, vector, tmp_path):
    """Three coefficients give the three texts of Python, and three different pictures."""
    chat = Chat(Dials(embedded[0], vectors={"mood": vector}), tokenizer, max_new_tokens=12)
    pictures = []
    opened.get_by_label("Prompt", exact=True).fill(PROMPT)
    for press, c in ((True, -1.0), (False, 0.0), (False, 1.5)):
        set_slider(opened, "A", c)
        before = opened.locator("#column-A .answer .at").all_inner_texts()
        opened.get_by_role("button", name="Send" if press else "Regenerate").click()
        at = f"c = {c:g}"
        opened.wait_for_function(
            f"document.querySelector('#column-A .answer .at')?.innerText === {json.dumps(at)}", timeout=60_000
        )
        settled(opened)
        assert before != [at]
        columns = [Column(PROMPT, {"mood": c}), Column(PROMPT, {"mood": 1.0})]
        *_, answers = chat.answer(columns)
        for name, answer, cost in zip("AB", answers, chat.costs(columns, answers), strict=True):
            assert text_of(opened, name) == answer.text.strip()
            told = opened.locator(f"#column-{name} .cost").inner_text()
            assert f"{cost.mean:.3f}" in told and f"{cost.rmse:.3f}" in told
        coloured = opened.locator("#column-A .text span:not(.same)").count()
        assert (coloured == 0) == (c == 0)
        pictures.append(opened.screenshot(path=tmp_path / f"{c}.png"))
    assert len(set(pictures)) == 3
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.get_by_role("button", name="Copy as Python or curl").click()
    code = opened.get_by_label("The last answers in Python").text_content()
    assert "'mood': 1.5" in code and "attempt=2" in code
    opened.get_by_role("button", name="Copy the Python code").click()
    opened.get_by_text("Copied").wait_for()
    assert opened.evaluate("navigator.clipboard.readText()") == code


def test_the_history_goes_on_until_it_is_cleared(opened):
    box = opened.get_by_label("Prompt", exact=True)
    box.fill(PROMPT)
    box.press("Enter")
    settled(opened)
    assert box.input_value() == ""
    opened.get_by_label("Same prompt for A and B").uncheck()
    opened.get_by_label("Prompt for A", exact=True).fill("the rain")
    opened.get_by_label("Prompt for B", exact=True).fill("the speaker is")
    opened.get_by_role("button", name="Send").click()
    settled(opened, 4)
    assert opened.locator("#column-A .you").all_inner_texts() == [PROMPT, "the rain"]
    assert opened.locator("#column-B .you").all_inner_texts() == [PROMPT, "the speaker is"]
    opened.get_by_role("button", name="Clear").click()
    opened.wait_for_function("document.querySelectorAll('.talk .you').length === 0")


def test_a_failure_is_a_sentence_and_the_prompt_comes_back(opened):
    box = opened.get_by_label("Prompt", exact=True)
    box.fill("rain " * 600)
    opened.get_by_role("button", name="Send").click()
    opened.get_by_role("status").filter(has_text="512").wait_for(timeout=60_000)
    assert box.input_value() == "rain " * 600 and opened.locator(".talk .answer").count() == 0


def test_hostile_text_is_shown_as_it_is(opened):
    opened.get_by_label("Prompt", exact=True).fill(HOSTILE)
    opened.get_by_role("button", name="Send").click()
    settled(opened)
    assert opened.locator("#column-A .you").inner_text() == HOSTILE
    assert opened.evaluate("window.broken") is None and opened.locator(".talk img, .talk b").count() == 0


def test_every_control_has_a_name(opened):
    opened.get_by_label("Prompt", exact=True).fill(PROMPT)
    opened.get_by_role("button", name="Send").click()
    settled(opened)
    opened.get_by_label("Same prompt for A and B").uncheck()
    opened.get_by_role("button", name="Copy as Python or curl").click()
    opened.get_by_label("The last answers in curl").wait_for()
    tree = opened.context.new_cdp_session(opened).send("Accessibility.getFullAXTree")["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and node["role"]["value"] in NAMED
    ]
    assert {"button", "textbox", "slider", "spinbutton", "checkbox", "log"} <= {role for role, _ in found}
    assert all(name.strip() for _, name in found), found
    names = [name for role, name in found if role in ("slider", "textbox", "checkbox", "log")]
    assert len(set(names)) == len(names) == 2 + 2 + 1 + 2


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(opened, width):
    opened.set_viewport_size({"width": width, "height": 844})
    opened.get_by_label("Prompt", exact=True).fill("rain" * 60)
    opened.get_by_role("button", name="Send").click()
    settled(opened)
    opened.get_by_role("button", name="Copy as Python or curl").click()
    opened.locator("summary").first.click()
    opened.get_by_label("The last answers in curl").wait_for()
    page = "document.documentElement"
    assert opened.evaluate(f"{page}.scrollWidth - {page}.clientWidth") <= 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_colours_are_readable(server, browser, theme):
    """Text and its background differ by a contrast of 4.5 to 1 or more, as the WCAG ask."""
    page = browser.new_page(color_scheme=theme)
    page.goto(server.url)
    page.locator(".legend .up3").wait_for(timeout=60_000)
    seen = page.evaluate(
        """[...document.querySelectorAll('.legend span')].map(e => { const s = getComputedStyle(e);
        return [s.color, s.backgroundColor, s.borderBottomStyle] })"""
    )
    page.close()

    def light(colour):
        parts = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert len(seen) == 6 and [line for *_, line in seen] == ["solid"] * 3 + ["dotted"] * 3
    for colour, behind, _ in seen:
        assert (light(behind) + 0.05) / (light(colour) + 0.05) >= 4.5


def test_other_sites_and_other_names_are_refused(server):
    assert server.ask("GET", "/")[0] == 200
    assert server.ask("GET", "/", Host="evil.example")[0] == 400
    assert server.ask("POST", "/gradio_api/queue/join", "{}", Origin="http://evil.example")[0] == 403
    assert server.ask("POST", "/gradio_api/queue/join", "{}", Origin=f"http://127.0.0.1:{server.port + 1}")[0] == 403
    policy = server.ask("GET", "/")[2]["content-security-policy"]
    assert "http" not in policy and policy.startswith("default-src 'self';")


def test_the_server_itself_asks_nobody(server, opened):
    opened.get_by_label("Prompt", exact=True).fill(PROMPT)
    opened.get_by_role("button", name="Send").click()
    settled(opened)
    places = server.connections.read_text().split() if server.connections.exists() else []
    assert set(places) <= {"127.0.0.1", "localhost", "::1", "None"}


def test_on_another_address_the_key_is_asked_for(vector, tmp_path):
    vector.save(tmp_path / "mood.safetensors")
    server = Server(tmp_path, "--host", "0.0.0.0", REPENG_API_KEY="a secret")
    try:
        assert "coefficient of mood" not in server.ask("GET", "/")[1]
        assert server.ask("GET", "/config")[0] == 401
        form = {"Content_Type": "application/x-www-form-urlencoded"}
        wrong = urlencode({"username": "repeng", "password": "another"})
        assert server.ask("POST", "/login", wrong, **form)[0] == 400
        right = urlencode({"username": "repeng", "password": "a secret"})
        status, _, headers = server.ask("POST", "/login", right, **form)
        assert status == 200
        cookies = "; ".join(one.partition(";")[0] for one in headers.get_all("set-cookie"))
        status, text, _ = server.ask("GET", "/config", Cookie=cookies)
        assert status == 200 and "coefficient of mood" in text
    finally:
        server.end()
