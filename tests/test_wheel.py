"""The wheel and the sdist in empty environments: every Python version, the newest and the lowest dependencies."""

import json
import os
import re
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
from support import ROOT

from repeng import tiny

pytestmark = pytest.mark.index
QUICK = "--max_steps 2 --save_strategy no --num_pairs 24 --r 4 --use_cpu true --questions_file few.jsonl".split()


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSIONS = [word.split("::")[-1].strip() for word in PROJECT["classifiers"] if ":: 3." in word]
FEW = "--model_name_or_path tiny --positive cheerful --negative gloomy --num_pairs 24 --json".split()


def uv(*argv, timeout=900):
    program = shutil.which("uv")
    if program is None:
        pytest.skip("needs uv")
    return subprocess.run([program, *argv], check=True, timeout=timeout, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "-q", "--out-dir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel):
    """A folder with an environment that holds nothing but the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    uv("venv", "-q", folder / "venv")
    uv("pip", "install", "-q", "--python", folder / "venv" / "bin" / "python", wheel)
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


def test_the_sdist_gives_the_same_wheel(built, wheel, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    uv("build", "-q", "--wheel", "--out-dir", tmp_path, sdist)
    (again,) = tmp_path.glob("*.whl")
    names = [{info.filename: info.CRC for info in zipfile.ZipFile(path).infolist()} for path in (wheel, again)]
    assert names[0] == names[1] and len(names[0]) > 150
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "tests/test_wheel.py", "examples/space/app.py", "docs/chat.md"} <= inside


def smoke(folder):
    """A vector is extracted, described and used in an environment."""
    told = json.loads(run(folder, "repeng", "extract", *FEW, "--output", "mood.safetensors"))
    assert told["layers"] == [4]
    found = json.loads(run(folder, "repeng", "info", "mood.safetensors", "--json"))
    assert found["base model"] == "tiny"
    code = (
        "from repeng import SteeringVector, load_model, steer; model, tokenizer = load_model('tiny')\n"
        "vector = SteeringVector.load('mood.safetensors')\n"
        "ids = tokenizer('the rain settles on', return_tensors='pt')\n"
        "for c in (-2.0, 0.0, 2.0):\n"
        "    with steer(model, c, vector=vector): print(tokenizer.decode(model.generate(**ids, max_new_tokens=8)[0]))"
    )
    assert len({*run(folder, "python", "-c", code).splitlines()}) > 1


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_newer_pythons_install_and_steer(version, wheel, tmp_path):
    python = interpreter(version)
    uv("venv", "-q", "--python", python, tmp_path / "venv")
    uv("pip", "install", "-q", "--python", tmp_path / "venv" / "bin" / "python", wheel)
    assert run(tmp_path, "python", "--version").split()[1].startswith(f"{version}.")
    smoke(tmp_path)


def interpreter(version):
    """A Python of this version that is installed, by uv or by pyenv; the test is skipped if there is none."""
    homes = [Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"]
    for found in (path for home in homes for path in sorted(home.glob(f"{version}.*/bin/python"))):
        return found
    try:
        return uv("python", "find", "--no-python-downloads", version).strip()
    except subprocess.CalledProcessError:
        pytest.skip(f"needs Python {version}")


def test_the_lowest_dependencies_install_and_steer(wheel, tmp_path):
    """Every bound that pyproject.toml states was tried."""
    extras = [word for extra in ("plot", "gguf", "serve", "smollm2") for word in ("--extra", extra)]
    uv("venv", "-q", tmp_path / "venv")
    environment = ("--python", tmp_path / "venv" / "bin" / "python")
    lowest = tmp_path / "lowest.txt"
    lines = uv("pip", "compile", "-q", "--resolution", "lowest-direct", *environment, *extras, ROOT / "pyproject.toml")
    lowest.write_text(lines)
    uv("pip", "install", "-q", *environment, "-r", lowest)
    uv("pip", "install", "-q", "--no-deps", *environment, wheel)
    for line in PROJECT["dependencies"]:
        name, bound = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
        assert re.search(rf"^{name}=={re.escape(bound)}(\.0)*$", lines, flags=re.M), f"{name}: {bound} was not tried"
    smoke(tmp_path)


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_every_extra_resolves(extra, tmp_path):
    lines = uv("pip", "compile", "-q", "--extra", extra, ROOT / "pyproject.toml")
    for line in PROJECT["optional-dependencies"][extra]:
        assert re.search(rf"^{re.split('[>=]', line)[0]}==", lines, flags=re.M)
