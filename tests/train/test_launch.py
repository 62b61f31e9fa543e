"""`repeng train`: which flags are the launcher's, and what reaches the training."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from launches import CONFIGS

from repeng import tiny
from repeng.data.arguments import TaskArguments
from repeng.data.configuration import names_of
from repeng.train.arguments import SteeringArguments
from repeng.train.launch import accelerate_config, launch, split_flags

OWN = {"config", *names_of((TaskArguments, SteeringArguments))}


@pytest.mark.parametrize(
    "argv, launchers, ours",
    [
        (["--config", "tiny", "mood"], [], ["--config", "tiny", "mood"]),
        (
            ["--num_processes", "2", "--config", "tiny", "--multi_gpu", "--r=8"],
            ["--num_processes", "2", "--multi_gpu"],
            ["--config", "tiny", "--r=8"],
        ),
        (["--mixed-precision=no", "--bf16", "false"], ["--mixed-precision=no"], ["--bf16", "false"]),
        (
            ["--learning-rate", "1", "--no_dataloader_drop_last"],
            [],
            ["--learning-rate", "1", "--no_dataloader_drop_last"],
        ),
        (["--gradient_accumulation_steps", "4"], [], ["--gradient_accumulation_steps", "4"]),  # both know it
        (["--config_file", "fsdp2", "--r", "4"], ["--config_file", "fsdp2"], ["--r", "4"]),
    ],
)
def test_flags_that_only_the_launcher_knows_are_the_launchers(argv, launchers, ours):
    assert split_flags(argv, launch_command_parser(), OWN) == (launchers, ours)


def test_a_flag_that_neither_knows_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown key 'num_proceses'.*did you mean 'num_processes'"):
        split_flags(["--num_proceses", "2"], launch_command_parser(), OWN)


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp2", "zero2"])
def test_configurations_of_accelerate_have_names_that_work_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(Path(accelerate_config(name, tmp_path)).read_text())
    assert settings["num_processes"] >= 1
    linked = settings.get("deepspeed_config", {}).get("deepspeed_config_file")
    assert (linked is not None) == (name == "zero2") and (linked is None or Path(linked).is_file())
    assert accelerate_config("my.yaml", tmp_path) == "my.yaml"


def test_the_launcher_runs_the_module_with_our_words(monkeypatch):
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    launch(["--num_processes", "1", "--config", "tiny", "--max_steps", "3", "--config_file=ddp"])
    (arguments,) = seen
    assert Path(arguments.config_file) == CONFIGS / "ddp.yaml"
    assert isinstance(arguments, argparse.Namespace)
    assert (arguments.module, arguments.training_script, arguments.num_processes) == (True, "repeng.train", 1)
    assert arguments.training_script_args == ["--config", "tiny", "--max_steps", "3"]


def repeng(*argv, cwd):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-m", "repeng", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=cwd,
        env=environment,
    )


@pytest.mark.processes
def test_repeng_train_trains_from_any_folder(tmp_path):
    """What `repeng train` writes, `repeng calibrate` and `repeng evaluate` read."""
    some = tiny.questions("honesty", "held_out")[::16]
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps(asdict(question)) for question in some))
    quick = "--max_steps 2 --save_strategy no --num_pairs 24 --r 4 --use_cpu true --questions_file few.jsonl".split()
    done = repeng("train", "--num_processes", 1, "--config", "tiny", *quick, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "outputs" / "tiny"
    assert (folder / "adapter_model.safetensors").is_file() and (folder / "report.html").is_file()
    done = repeng("calibrate", folder, "--nats", "0.01", "--sequences", 8, cwd=tmp_path)
    assert done.returncode == 0 and "stored" in done.stdout, done.stderr[-3000:]
    done = repeng("evaluate", "--require_steering", "false", folder, cwd=tmp_path)
    assert done.returncode == 0 and (folder / "evaluation" / "report.json").is_file(), done.stderr[-3000:]


@pytest.mark.processes
def test_a_bad_key_ends_with_a_sentence(tmp_path):
    done = repeng("train", "--config", "tiny", "--learning_rat", "1", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean 'learning_rate'" in done.stderr
    assert "Traceback" not in done.stderr
    done = repeng("train", "--config", "tiny", "--r", "65", cwd=tmp_path)
    assert done.returncode == 1 and "give r ≤ 64" in done.stderr and "Traceback" not in done.stderr
