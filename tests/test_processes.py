"""Training in processes of its own: two at once, killed, and told to stop."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.processes
SCRIPT = Path(__file__).parent / "processes.py"
ROOT = SCRIPT.parent.parent


def start(folder, *argv, world=1):
    launcher = [sys.executable] if world == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"
    ]  # fmt: skip
    return subprocess.Popen(
        [*launcher, str(SCRIPT), str(folder), *map(str, argv)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def run(folder, *argv, world=1):
    process = start(folder, *argv, world=world)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["world_size"] == world and seen["losses"][-1] < seen["losses"][0]
    return load_file(folder / "adapter_model.safetensors")


def digest(folder):
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_two_processes_make_the_same_adapter_as_one(tmp_path):
    """Over more than an epoch of pairs of unequal lengths, with and without accumulation: batches of 8 in all."""
    one = run(tmp_path / "one", "--per_device_train_batch_size", 8, "--max_steps", 8)
    two = run(tmp_path / "two", "--per_device_train_batch_size", 4, "--max_steps", 8, world=2)
    four = run(
        tmp_path / "four", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_steps", 8,
        world=2,
    )  # fmt: skip
    assert len(list((tmp_path / "two").glob("reference-*-of-2.safetensors"))) == 2
    for other in (two, four):
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert (tensor - other[key]).abs().max() < 1e-5, key


def wait_for(folder, name, process, seconds=120):
    end = time.time() + seconds
    while not (folder / name).exists():
        assert process.poll() is None and time.time() < end, process.communicate()[0][-3000:]
        time.sleep(0.05)


STEPS = ("--max_steps", 30, "--save_strategy", "steps", "--save_steps", 3, "--per_device_train_batch_size", 8)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    run(tmp_path / "whole", *STEPS)
    process = start(tmp_path / "killed", *STEPS)
    wait_for(tmp_path / "killed", "checkpoint-6", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "seen.json").exists()
    run(tmp_path / "killed", *STEPS, "--resume", "true")
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    kept = sorted(path.name for path in (tmp_path / "killed").glob("*checkpoint*"))
    assert kept == ["checkpoint-27", "checkpoint-30"]


def test_sigterm_writes_a_checkpoint_and_ends(tmp_path):
    process = start(tmp_path, *STEPS[:2], "--save_strategy", "steps", "--save_steps", 3, *STEPS[6:])
    wait_for(tmp_path, "checkpoint-3", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-2000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["stopped"] and 3 <= seen["step"] < 30
    assert (tmp_path / f"checkpoint-{seen['step']}" / "trainer_state.json").exists()
