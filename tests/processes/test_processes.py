"""Training in processes of its own: two at once, killed, and told to stop."""

import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from launches import launch_environment
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import ROOT

from repeng import steer, tiny

pytestmark = pytest.mark.processes
SCRIPT = Path(__file__).parent / "processes.py"


def start(folder, *argv, world=1, environment=None):
    launcher = (
        [sys.executable]
        if world == 1
        else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"]
    )
    return subprocess.Popen(
        [*launcher, str(SCRIPT), str(folder), *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
    )


def run(folder, *argv, world=1, environment=None):
    process = start(folder, *argv, world=world, environment=environment)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["world_size"] == world and seen["losses"][-1] < seen["losses"][0]
    return load_file(folder / "adapter_model.safetensors")


def digest(folder):
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert (tensor - other[key]).abs().max() < 1e-5, key


REPORT = ("--require_steering", "true")


def check_report(folder):
    """The first process has compared the adapter and written everything."""
    report = json.loads((folder / "report.json").read_text())
    assert set(report["rows"]) >= {"this adapter", "persona prompts", "random direction"}
    assert (folder / "config.yaml").exists() and (folder / "report.html").exists()


KINDS = {"svd": ("--adapter", "svd"), "lora": ("--adapter", "lora", "--learning_rate", "0.3")}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def one(tmp_path_factory, kind):
    """More than an epoch of pairs of unequal lengths, in batches of 8, in one process."""
    return run(tmp_path_factory.mktemp("one"), *kind, "--per_device_train_batch_size", 8, "--max_steps", 8)


def test_two_processes_make_the_same_adapter_as_one(tmp_path, one, kind):
    """With and without accumulation: batches of 8 in all."""
    two = run(tmp_path / "two", *kind, "--per_device_train_batch_size", 4, "--max_steps", 8, *REPORT, world=2)
    check_report(tmp_path / "two")
    four = run(
        tmp_path / "four",
        *kind,
        "--per_device_train_batch_size",
        2,
        "--gradient_accumulation_steps",
        2,
        "--max_steps",
        8,
        world=2,
    )
    assert len(list((tmp_path / "two").glob("reference-*-of-2.safetensors"))) == 2
    assert_same(one, two)
    assert_same(one, four)


def test_a_sharded_run_saves_the_whole_adapter(tmp_path, one, kind):
    """FSDP2: the same adapter as one process makes, which loads there with equal logits."""
    options = (
        *kind,
        "--per_device_train_batch_size",
        4,
        "--max_steps",
        8,
        "--gradient_checkpointing",
        "true",
        *REPORT,
    )
    assert_same(one, run(tmp_path, *options, world=2, environment=launch_environment("fsdp2")))
    check_report(tmp_path)
    seen = json.loads((tmp_path / "seen.json").read_text())
    model = PeftModel.from_pretrained(tiny.load()[0], tmp_path).eval()
    with torch.no_grad(), steer(model, 0.5):
        logits = model(torch.tensor([seen["ids"]])).logits[0, -1]
    assert torch.allclose(logits, torch.tensor(seen["logits"]), atol=1e-4)


REAL = ("--optim", "adamw_torch", "--lr_scheduler_type", "cosine", "--learning_rate", "1e-3")


def test_a_sharded_run_goes_on_to_the_same_bytes(tmp_path, one, kind):
    """As recipes do it: bf16, with checkpointing, AdamW and cosine; of two checkpoints the better one, the first."""
    options = (
        *kind,
        *REAL,
        "--per_device_train_batch_size",
        4,
        "--max_steps",
        8,
        "--save_strategy",
        "steps",
        "--save_steps",
        4,
        "--bf16",
        "true",
        "--gradient_checkpointing",
        "true",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        4,
        "--load_best_model_at_end",
        "true",
    )
    run(tmp_path, *options, world=2, environment=launch_environment("fsdp2"))
    before, seen = digest(tmp_path), json.loads((tmp_path / "seen.json").read_text())
    assert len(seen["ranges"]) == 2
    for name in ("checkpoint-4", "checkpoint-8"):
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        assert saved.keys() == one.keys() and {tensor.dtype for tensor in saved.values()} == {torch.float32}
    best, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("checkpoint-4", "."))
    assert all(torch.equal(tensor, found[key]) for key, tensor in best.items())
    shutil.rmtree(tmp_path / "checkpoint-8")
    (tmp_path / "adapter_model.safetensors").unlink()
    run(tmp_path, *options, "--resume", "true", world=2, environment=launch_environment("fsdp2"))
    assert digest(tmp_path) == before
    assert json.loads((tmp_path / "seen.json").read_text())["ranges"] == seen["ranges"]


@pytest.mark.skipif(not find_spec("deepspeed"), reason="needs deepspeed")
def test_zero_2_makes_the_same_adapter(tmp_path, one, kind):
    environment = launch_environment("zero2")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    options = (*kind, "--per_device_train_batch_size", 4, "--max_steps", 8)
    assert_same(one, run(tmp_path, *options, world=2, environment=environment))


def wait_for(folder, name, process, seconds=120):
    end = time.time() + seconds
    while not (folder / name).exists():
        assert process.poll() is None and time.time() < end, process.communicate()[0][-3000:]
        time.sleep(0.05)


STEPS = (*REAL, "--max_steps", 30, "--save_strategy", "steps", "--save_steps", 3, "--per_device_train_batch_size", 8)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, kind):
    steps = (*kind, *STEPS)
    run(tmp_path / "whole", *steps)
    process = start(tmp_path / "killed", *steps)
    wait_for(tmp_path / "killed", "checkpoint-6", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "seen.json").exists()
    run(tmp_path / "killed", *steps, "--resume", "true")
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    kept = sorted(path.name for path in (tmp_path / "killed").glob("*checkpoint*"))
    assert kept == ["checkpoint-27", "checkpoint-30"]


def test_sigterm_writes_a_checkpoint_and_ends(tmp_path):
    process = start(tmp_path, *STEPS)
    wait_for(tmp_path, "checkpoint-3", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-2000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["stopped"] and 3 <= seen["step"] < 30
    assert (tmp_path / f"checkpoint-{seen['step']}" / "trainer_state.json").exists()


def test_a_server_ends_a_running_answer_before_it_stops(tmp_path):
    """SIGTERM comes while an answer is streamed."""
    model = get_peft_model(tiny.load()[0], LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "honest"))
    command = [sys.executable, "-m", "repeng", "serve", str(tmp_path / "honest"), "--port", "0", "--use_cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        line = next(line for line in process.stderr if "running on" in line)
        port = int(re.search(r"127\.0\.0\.1:(\d+)", line)[1])
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            body = {"model": "tiny", "prompt": "the lime is", "max_tokens": 100, "stream": True, "temperature": 0}
            connection.request("POST", "/v1/completions", json.dumps({**body, "steer": {"honest": -1}}))
            response = connection.getresponse()
            first = response.read(100)
            process.send_signal(signal.SIGTERM)
            text = first + response.read()
        assert text.endswith(b"data: [DONE]\n\n") and text.count(b"data: {") > 10
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
