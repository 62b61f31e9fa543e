"""The wheel alone, in an empty environment and an empty folder: training and the README's Python work."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict

import pytest
from support import ROOT

from repeng import tiny

pytestmark = pytest.mark.index
QUICK = "--max_steps 2 --save_strategy no --num_pairs 24 --r 4 --use_cpu true --questions_file few.jsonl".split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with an environment that holds nothing but the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv")
    subprocess.run([uv, "build", "-q", "--wheel", "--out-dir", folder, ROOT], check=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([uv, "venv", "-q", folder / "venv"], check=True, timeout=100)
    environment = ["--python", folder / "venv" / "bin" / "python"]
    subprocess.run([uv, "pip", "install", "-q", *environment, wheel], check=True, timeout=500)
    some = tiny.questions("honesty", "held_out")[::16]
    (folder / "few.jsonl").write_text("\n".join(json.dumps(asdict(question)) for question in some))
    return folder


def run(installed, program, *argv):
    done = subprocess.run(
        [installed / "venv" / "bin" / program, *argv], capture_output=True, text=True, timeout=500, cwd=installed
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_wheel_trains_and_the_readmes_python_runs(installed):
    run(installed, "repeng", "train", "--config", "tiny", *QUICK)
    # Pictures need the extra `plot`.
    assert {"adapter_model.safetensors", "report.html", "config.yaml"} <= {
        path.name for path in (installed / "outputs" / "tiny").iterdir()
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for snippet in re.findall(r"```python\n(.*?)```", readme, flags=re.S):
        run(installed, "python", "-c", snippet)


def test_the_configurations_are_inside(installed):
    code = (
        "from repeng.data.configuration import data_file, shipped_configs; "
        "from repeng.train.launch import accelerate_config; from pathlib import Path; "
        "path = Path(accelerate_config('fsdp2', Path('.'))); "
        "print(*sorted(shipped_configs()), data_file('suffixes').is_file(), path.is_file())"
    )
    names = run(installed, "python", "-c", code).split()
    expected = [path.stem for path in [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/traits/*.yaml")]]
    assert names == [*sorted(expected), "True", "True"]
