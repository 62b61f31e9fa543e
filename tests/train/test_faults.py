"""Faults at every stage of a run: one sentence, a folder that is whole or goes on, and the same bytes."""

import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import yaml
from comparisons import comparison
from support import QUICK_RUN

from repeng._command import command
from repeng.data import files
from repeng.eval.report import figures
from repeng.train import run as script
from repeng.train import run_folder
from repeng.train.callbacks import FiniteGradients
from repeng.train.run import main

KEYS = {**QUICK_RUN, "max_steps": 3}
DONE = {"adapter_config.json", "adapter_model.safetensors", "config.yaml"}
RESULTS = {*DONE, "README.md", "report.csv", "report.html", "report.json", "training_log.jsonl"}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path_factory):
    """Neutral texts that need not be sampled, a comparison that need not be measured, no pictures."""
    neutral = tmp_path_factory.mktemp("data") / "neutral.txt"
    neutral.write_text("\n".join(f"the {noun} is red ." for noun in ("lime", "rain", "speaker", "stone") * 10))
    monkeypatch.setitem(KEYS, "neutral_file", neutral)
    monkeypatch.setattr(run_folder, "compare", lambda *_, **__: comparison())
    monkeypatch.setattr(figures, "available", lambda: False)


def train(folder, *more):
    words = [word for key, value in KEYS.items() for word in (f"--{key}", str(value))]
    with command("continue with --resume true"):
        main([*words, "--output_dir", str(folder), *more])


def disk_is_full():
    raise OSError(28, "No space left on device")


def at(stage, happens, monkeypatch):
    """Let something happen at a stage of a run: before its step 2, or where a file of that name moves to its place."""
    step, replace = FiniteGradients.on_pre_optimizer_step, files.os.replace
    if stage == "build":
        monkeypatch.setattr(script, "build", lambda *_: happens())
    elif stage == "comparison":
        monkeypatch.setattr(run_folder, "compare", lambda *_, **__: happens())

    def before_step(self, args, state, control, **more):
        if stage == "training" and state.global_step == 1:
            happens()
        step(self, args, state, control, **more)

    def moving(source, place):
        if Path(place).name.startswith(stage):
            happens()
        replace(source, place)

    monkeypatch.setattr(FiniteGradients, "on_pre_optimizer_step", before_step)
    monkeypatch.setattr(files.os, "replace", moving)


INT, TERM = (partial(signal.raise_signal, number) for number in (signal.SIGINT, signal.SIGTERM))
REFERENCE = {"reference"}
MIDDLE, LAST = {"checkpoint-1", "checkpoint-2"}, {"checkpoint-2", "checkpoint-3"}
FAULTS = [  # in turn, in one folder: at which stage, what happens, the status, and what lies there afterwards
    ("build", INT, 130, set()),
    ("reference", disk_is_full, "reference.*No space left", set()),
    ("reference", TERM, 143, REFERENCE),
    ("training", INT, 130, {*REFERENCE, *MIDDLE}),
    ("checkpoint-3", disk_is_full, "step 3 .*No space left.*--resume true", {*REFERENCE, *MIDDLE}),
    ("config", disk_is_full, "adapter_model.*No space left.*--resume true", {*REFERENCE, *LAST}),
    ("adapter", TERM, 143, {*REFERENCE, *LAST, *DONE}),
    ("comparison", INT, 130, {*REFERENCE, *LAST, *DONE}),
    ("report.csv", disk_is_full, "report.csv.*No space left.*--resume true", {*REFERENCE, *LAST, *DONE}),
    ("training_log", disk_is_full, "training_log.*No space left.*--resume true", {*REFERENCE, *LAST, *DONE}),
]


@pytest.mark.processes  # ten runs
def test_faults_at_every_stage_cost_nothing_but_time(tmp_path, monkeypatch, capfd):
    train(tmp_path / "whole")
    folder = tmp_path / "out"
    for stage, happens, told, left in FAULTS:
        capfd.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            at(stage, happens, patch)
            train(folder, "--resume", "true")
        if isinstance(told, int):
            assert stop.value.code == told, stage
            *_, last = capfd.readouterr().err.strip().splitlines()
            assert "stopped by SIG" in last and last.endswith("continue with --resume true"), stage
        else:
            assert re.search(told, str(stop.value)), (stage, stop.value)
            assert str(folder) in str(stop.value) and "saving" not in str(stop.value)
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        assert {"reference" if name.startswith("reference") else name for name in names} == left, stage
    train(folder, "--resume", "true")
    assert {path.name for path in folder.iterdir()} >= RESULTS
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_second_ctrl_c_ends_the_training_at_once(tmp_path, monkeypatch):
    def twice():
        INT()
        INT()
        pytest.fail("went on")

    at("training", twice, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    assert stop.value.code == 130 and "checkpoint-2" not in {path.name for path in tmp_path.iterdir()}


def older_run(folder, **changes):
    """What a run of these keys leaves, with other contents."""
    folder.mkdir()
    config = {"model_name_or_path": "tiny", "positive": "honest", "negative": "dishonest", "adapter": "lora"}
    for name in RESULTS:
        (folder / name).write_text(f"older {name}")
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OTHERS = {
    "another behaviour": {"positive": "cheerful", "negative": "gloomy"},
    "another base": {"model_name_or_path": "smollm2"},
    "another kind of adapter": {"adapter": "svd"},
    "pairs of a file": {"positive": None, "negative": None, "pairs_file": "p.jsonl"},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("resume", ["true", "false"])
def test_the_folder_of_another_run_is_refused(name, resume, tmp_path, monkeypatch):
    before = older_run(tmp_path / "out", **OTHERS[name])
    monkeypatch.setattr(script, "build", None)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "out", "--resume", resume)
    key, value = list(OTHERS[name].items())[-1]
    assert all(word in str(stop.value) for word in (str(tmp_path / "out"), key, value, "another output_dir"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors", "report.json"])
@pytest.mark.parametrize("config", [None, "[1]", "a: [", "folder"])
def test_files_that_no_run_has_written_are_refused(name, config, tmp_path, monkeypatch):
    (tmp_path / name).write_text("own")
    if config == "folder":
        (tmp_path / "config.yaml").mkdir()
    elif config is not None:
        (tmp_path / "config.yaml").write_text(config)
    monkeypatch.setattr(script, "build", None)
    with pytest.raises(SystemExit, match="output_dir") as stop:
        train(tmp_path)
    assert "\n" not in str(stop.value) and "another output_dir" in str(stop.value)
    assert (tmp_path / name).read_text() == "own"


def test_a_run_to_the_same_aim_replaces_the_older_one_and_nothing_is_mixed(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    older_run(folder, learning_rate=0.1)
    (folder / "evaluation").mkdir()
    for name in ("calibration.json", "evaluation/report.json", "own.txt"):
        (folder / name).write_text("older")
    at("comparison", INT, monkeypatch)
    with pytest.raises(SystemExit):
        train(folder)
    assert not {path.name for path in folder.iterdir()} & (RESULTS - DONE | {"calibration.json"})
    assert not list((folder / "evaluation").iterdir()) and (folder / "own.txt").exists()
    assert b"older" not in b"".join((folder / name).read_bytes() for name in DONE)


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "build", lambda *_: train(tmp_path))
    with pytest.raises(SystemExit, match=rf"output_dir .*{tmp_path}.* in use by process {os.getpid()} "):
        train(tmp_path)
