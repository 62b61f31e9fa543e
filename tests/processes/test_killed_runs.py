"""Runs that are killed at any moment, told to stop through a launcher, or print where only ASCII can be shown."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support import QUICK_RUN, ROOT

pytestmark = pytest.mark.processes
KEYS = {**QUICK_RUN, "max_steps": 6}
QUICK = [str(ROOT / "tests" / "processes" / "quick.py")]
MOMENTS = 20


@pytest.fixture(scope="module")
def neutral(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "neutral.txt"
    path.write_text("\n".join(f"the {noun} is red ." for noun in ("lime", "rain", "speaker", "stone") * 10))
    return path


def start(launcher, folder, neutral, *more, **environment):
    words = [word for key, value in {**KEYS, "neutral_file": neutral}.items() for word in (f"--{key}", str(value))]
    return subprocess.Popen(
        [sys.executable, *launcher, *words, *(["--output_dir", str(folder)] if folder else []), *map(str, more)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **environment},
    )


def finish(process, status=0):
    output = process.communicate(timeout=300)[0].decode(errors="replace")
    assert process.returncode == status, output[-3000:]
    assert "Traceback" not in output
    return output


def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path, neutral):
    finish(start([str(ROOT / "tests" / "processes" / "killed.py"), str(tmp_path), str(MOMENTS)], None, neutral))


def wait_for(path, process):
    end = time.time() + 200
    while not path.exists():
        assert process.poll() is None and time.time() < end, process.communicate()[0][-3000:]
        time.sleep(0.05)


LAUNCHERS = {
    "none": (["-m", "repeng.train"], 143),
    "repeng": (["-m", "repeng", "train", "--num_processes", "1"], 143),
    "accelerate": (["-m", "accelerate.commands.launch", "--num_processes", "1", "train.py"], -signal.SIGTERM),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_sigterm_of_the_launcher_ends_the_training_behind_a_checkpoint(name, tmp_path, neutral):
    launcher, status = LAUNCHERS[name]
    process = start(launcher, tmp_path, neutral, "--max_steps", 1000)
    wait_for(tmp_path / "checkpoint-1", process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, status)
    assert output.count("stopped by SIGTERM") == 1 and "--resume true" in output
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5])
def test_ctrl_c_at_any_moment_ends_with_a_sentence(share, tmp_path, neutral):
    """Also while libraries are imported."""
    process = start(["-m", "repeng.train"], tmp_path, neutral, "--max_steps", 1000)
    time.sleep(0.2 + share * 10)
    process.send_signal(signal.SIGINT)
    assert "stopped by SIGINT" in finish(process, 130)


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("name", ["PYTHONIOENCODING", "LC_ALL"])
def test_a_terminal_that_shows_ascii_only_stops_nothing(name, tmp_path, neutral):
    environment = {name: ASCII[name]} if name == "PYTHONIOENCODING" else {**ASCII, "PYTHONIOENCODING": ""}
    output = finish(start(QUICK, tmp_path, neutral, **environment))
    assert "- arm" in output and output.isascii()
    assert "−" in (tmp_path / "README.md").read_text(encoding="utf-8")
