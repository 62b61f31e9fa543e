"""Checkpoints: whole or not at all, and the same run after one as without."""

import os

import pytest
import torch
from safetensors.torch import save_file
from test_trainer import arguments, trainer_for

from repeng.train.checkpoints import STAGING, CheckpointError, check_whole, newest


def adapter(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    steps = {"num_pairs": 32, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_for(arguments(tmp_path / "whole", **steps))
    whole.train()
    first = trainer_for(arguments(tmp_path / "parts", **steps))
    first.stop.on_step_end_ = first.stop.on_step_end
    limit = first.stop

    def stop_after_three(args, state, control, **_):
        limit.received = state.global_step == 3
        return limit.on_step_end_(args, state, control)

    limit.on_step_end = stop_after_three
    first.train()
    assert first.state.global_step == 3 and newest(tmp_path / "parts").endswith("checkpoint-3")
    second = trainer_for(arguments(tmp_path / "parts", **steps))
    second.train(resume_from_checkpoint=newest(tmp_path / "parts"))
    for name, parameter in adapter(whole).items():
        assert torch.equal(parameter, adapter(second)[name]), name
    assert not (tmp_path / "parts" / STAGING).exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(tmp_path, monkeypatch):
    steps = {"num_pairs": 32, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(arguments(tmp_path, **steps))
    save = type(trainer)._save_optimizer_and_scheduler

    def full(self, output_dir):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", full)
    with pytest.raises(CheckpointError, match=r"step 4.*No space left.*checkpoint-2.*--resume"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    again = trainer_for(arguments(tmp_path, **steps))
    again.train(resume_from_checkpoint=newest(tmp_path))
    assert again.state.global_step == 6


def test_files_are_read_back(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({}, path)
    with pytest.raises(OSError, match="without any element"):
        check_whole(path)
    save_file({"a": torch.ones(1000)}, path)
    check_whole(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(OSError, match="not written whole"):
        check_whole(path)


def test_the_newest_checkpoint_is_of_the_last_step(tmp_path):
    assert newest(tmp_path / "nowhere") is None and newest(tmp_path) is None
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / STAGING / "checkpoint-99").mkdir(parents=True)
    assert newest(tmp_path).endswith("checkpoint-10")
