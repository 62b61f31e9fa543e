"""Tables, rows, pictures and the page, from reports of a real dial."""

import base64
import csv
import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest

from repeng import evaluate, extract, steer, tiny
from repeng._extras import install_command
from repeng.eval.comparison import Comparison
from repeng.eval.eval_report import Sample
from repeng.eval.measure import prompt_dial
from repeng.eval.report import figures
from repeng.eval.report.page import write_page
from repeng.eval.report.tables import markdown, summary, write_csv
from repeng.eval.samples import count_accepted

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def reports(embedded, tokenizer):
    model = embedded[0]
    vector = extract(model, tokenizer, tiny.pairs("mood", 40, 0), layers=[2], held_out=0)
    options = {
        "neutral_texts": tiny.neutral_texts(4, 0),
        "sample_prompts": ["today the weather seems", "<b>bold & fat</b> . the rain settles on"],
        "accepts": tiny.World().accepts,
    }
    questions = tiny.questions("mood", "held_out")[::4]
    dials = {
        "a <vector>": partial(steer, model, vector=vector),
        "prompts": prompt_dial("the speaker is cheerful .", "the speaker is gloomy ."),
    }
    at = [-1, -0.5, 0.5, 1]
    found = {name: [evaluate(model, tokenizer, questions, dial, at, **options)] for name, dial in dials.items()}
    probes = {"a <vector>": {"other <b>": (0.5, -0.25), "again": (1.0, 1.0)}, "prompts": {"again": (2.0, 1.0)}}
    return Comparison(found, "a <vector>", prompts="prompts", probes=probes)


def test_samples_are_greedy_continuations_at_three_coefficients(reports, embedded, tokenizer):
    samples = reports.reports["prompts"][0].samples
    assert sorted({s.coefficient for s in samples}) == [-1.0, 0.0, 1.0] and len(samples) == 6
    ids = tokenizer("the speaker is cheerful . today the weather seems", return_tensors="pt")
    out = embedded[0].generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    wanted = next(s for s in samples if s.coefficient == 1.0 and s.prompt.startswith("today"))
    assert wanted.text == tokenizer.decode(out, skip_special_tokens=True)
    assert wanted.sentences == count_accepted(f"today the weather seems {wanted.text}", tiny.World().accepts)
    assert wanted.sentences[0] >= 2 and not wanted.finished
    behind = next(s for s in samples if s.coefficient == 0.0 and s.prompt.startswith("<b>"))
    assert behind.sentences == count_accepted(f"the rain settles on {behind.text}", tiny.World().accepts)


def test_the_rows_of_the_csv_are_those_of_the_reports(reports, tmp_path):
    write_csv(reports, tmp_path / "r.csv")
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["method"] for row in rows] == ["a <vector>"] * 5 + ["prompts"] * 5
    own = reports.reports["a <vector>"][0]
    assert float(rows[1]["log_odds"]) == pytest.approx(own.mean_log_odds(-0.5), abs=1e-5)
    assert rows[1]["inside_budget"] == str(own.inside_budget(-0.5)) and rows[0]["parse_rate"]


def test_markdown_has_one_line_a_method(reports):
    lines = markdown({name: summary(reports, name) for name in reports.reports}, "method").splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1 and lines[2].startswith("| a <vector> |")


def write(reports, path):
    write_page(reports, path, title="a <title>")
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_escapes_what_it_shows(reports, tmp_path):
    text = write(reports, tmp_path / "report.html")
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text) and "<script" not in text
    pictures = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)
    assert len(pictures) == 4 and all(b"<svg" in base64.b64decode(picture) for picture in pictures)
    for shown in ("a <title>", reports.verdict, "a <vector>", "<b>bold & fat</b> . the rain settles on"):
        assert html.escape(shown) in text and shown not in text
    assert not list(tmp_path.glob(".saving-*"))
    assert write(reports, tmp_path / "again.html") == text


def test_what_a_model_says_is_escaped(reports, tmp_path):
    samples = [Sample(c, "p", "<script>alert(1)</script>", True, 0.0) for c in (-1.0, 0.0, 1.0)]
    one = {"a <vector>": [replace(reports.reports["a <vector>"][0], samples=samples)]}
    text = write(Comparison(one, "a <vector>"), tmp_path / "report.html")
    assert "<script" not in text and text.count("&lt;script&gt;") == 3


def test_without_matplotlib_the_page_says_so(reports, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not figures.available()
    text = write(reports, tmp_path / "report.html")
    assert "data:image" not in text and html.escape(install_command("plot")) in text and 'id="samples"' in text


@pytest.mark.browser
def test_the_page_in_a_real_browser(reports, tmp_path):
    """Headless Chromium lays it out: every picture has pixels, every cell its text, nothing is fetched, no error."""
    assert CHROMIUM, "no Chromium was found; install one (Debian: chromium)"
    path = tmp_path / "report.html"
    page = write(reports, path)
    probe = """<script>addEventListener('load', () => {
      const seen = {
        pictures: [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]),
        cells: [...document.querySelectorAll('#samples tbody tr')].map(r => [...r.cells].map(c => c.innerText)),
        methods: [...document.querySelectorAll('#methods tbody tr')].map(r => r.cells[0].innerText),
        wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        fetched: performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:')),
        verdict: document.querySelector('#verdict').innerText };
      const out = document.createElement('pre'); out.id = 'seen'; out.textContent = JSON.stringify(seen);
      document.body.append(out); });</script>"""
    path.write_text(page.replace("</head>", f"{probe}</head>"), encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path}/profile",
            "--window-size=1280,900",
            "--virtual-time-budget=5000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, flags=re.S)[1]))
    assert len(seen["pictures"]) == 4
    assert all(complete and natural > 300 and shown > 300 for complete, natural, shown in seen["pictures"])
    own = reports.reports["a <vector>"][0]
    columns = [(own, 0.0), *((reports.reports[name][0], c) for name in ("a <vector>", "prompts") for c in (-1.0, 1.0))]
    texts = {
        prompt: [s.text for report, c in columns for s in report.samples_at(c) if s.prompt == prompt]
        for prompt in dict.fromkeys(s.prompt for s in own.samples)
    }
    assert {row[0]: row[1:] for row in seen["cells"]} == texts
    assert seen["methods"] == ["a <vector>", "prompts"] and seen["verdict"] == f"{reports.verdict}."
    assert seen["wide"] <= 0 and seen["fetched"] == []


@pytest.mark.parametrize("own", [True, False])
def test_the_seeds_of_a_method_share_a_colour(reports, own):
    (one,) = reports.reports["a <vector>"]
    seeds = {"mine": [one, one.mirrored()], "theirs": [one, one.mirrored()]}
    drawn = figures.effect_and_cost(Comparison(seeds, "mine" if own else "theirs"))
    curves = [line.get_color() for line in drawn.axes[0].lines if line.get_marker() == "."]
    assert len(curves) == 4 and len(set(curves)) == 2 and curves[0] == curves[1]
