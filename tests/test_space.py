"""The Space starts and answers."""

import importlib.util
import os
import re
import subprocess
import sys
import time
import tomllib
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import yaml
from support import ROOT

SPACE = ROOT / "examples" / "space"


def test_the_space_says_what_the_hub_asks():
    _, front, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    keys = yaml.safe_load(front)
    assert keys["sdk"] == "gradio" and (SPACE / keys["app_file"]).is_file() and keys["license"] == "mit"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (web,) = project["optional-dependencies"]["web"]
    numbers = [tuple(map(int, text.split("."))) for text in (web.split(">=")[1], keys["sdk_version"])]
    assert numbers[0] <= numbers[1] and len(keys["short_description"]) <= 60
    wanted = (SPACE / "requirements.txt").read_text(encoding="utf-8")
    assert set(re.search(r"repeng\[(.+)\]", wanted)[1].split(",")) <= {*project["optional-dependencies"]}


@pytest.mark.real
@pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="needs the extra web")
def test_the_space_starts(tmp_path):
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, SPACE / "app.py"],
        env={**os.environ, "GRADIO_SERVER_PORT": "7869", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=log,
    )
    try:
        for _ in range(240):
            time.sleep(1)
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                with urlopen("http://127.0.0.1:7869/", timeout=5) as answer:
                    page, policy = answer.read().decode(), answer.headers["content-security-policy"]
                break
            except URLError:
                continue
        else:
            pytest.fail("the Space did not answer")
    finally:
        process.terminate()
        process.wait(30)
        log.close()
    assert "coefficient of mood" in page and "coefficient of formality" in page
    assert "frame-ancestors https://huggingface.co" in policy
