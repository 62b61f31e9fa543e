"""Checkpoints: whole or not at all, and the same run after one as without."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import arguments, prepare, trainer_for

from repeng.data.pairs import ContrastPair
from repeng.data.task import hold_out
from repeng.eval.eval_report import Arm
from repeng.train.adapter_files import adapter_state, check_saved, check_whole
from repeng.train.checkpoints import STAGING, CheckpointError, newest
from repeng.train.trainer import SteeringTrainer


def adapter(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


SIX_STEPS = {
    "num_pairs": 32,
    "max_steps": 6,  # they end in the second epoch
    "save_strategy": "steps",
    "save_steps": 2,
}


def stop_at(trainer, step):
    """Let the trainer see a SIGTERM at this step."""
    original = trainer.stop.on_step_end

    def on_step_end(args, state, control, **_):
        trainer.stop.received = state.global_step == step
        return original(args, state, control)

    trainer.stop.on_step_end = on_step_end


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = trainer_for(arguments(tmp_path / "whole", **SIX_STEPS))
    whole.train()
    first = trainer_for(arguments(tmp_path / "parts", **SIX_STEPS))
    stop_at(first, 3)
    first.train()
    assert first.state.global_step == 3 and newest(tmp_path / "parts").endswith("checkpoint-3")
    second = trainer_for(arguments(tmp_path / "parts", **SIX_STEPS))
    second.train(resume_from_checkpoint=newest(tmp_path / "parts"))
    for name, parameter in adapter(whole).items():
        assert torch.equal(parameter, adapter(second)[name]), name
    assert not (tmp_path / "parts" / STAGING).exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(tmp_path, monkeypatch):
    trainer = trainer_for(arguments(tmp_path, **SIX_STEPS))
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
    again = trainer_for(arguments(tmp_path, **SIX_STEPS))
    again.train(resume_from_checkpoint=newest(tmp_path))
    assert again.state.global_step == 6


def test_a_checkpoint_that_holds_another_adapter_is_not_kept(tmp_path, monkeypatch):
    trainer = trainer_for(arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1))
    save = type(trainer)._save

    def wrong(self, output_dir=None, state_dict=None):
        save(self, output_dir, state_dict)
        path = Path(output_dir) / "adapter_model.safetensors"
        save_file({key: torch.zeros_like(tensor) for key, tensor in load_file(path).items()}, path)

    monkeypatch.setattr(type(trainer), "_save", wrong)
    with pytest.raises(CheckpointError, match="differs from the adapter"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_is_no_matter_of_files_is_not_called_one(tmp_path, monkeypatch):
    trainer = trainer_for(arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1))

    def fail(self, output_dir):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", fail)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


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


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path):
    """Not one that an earlier run in the same folder wrote at a later step."""
    assert newest(tmp_path / "nowhere") is None and newest(tmp_path) is None
    for time, name in enumerate(("checkpoint-120", "checkpoint-9", "checkpoint-10", f"{STAGING}/checkpoint-11")):
        (tmp_path / name).mkdir(parents=True)
        state = tmp_path / name / "trainer_state.json"
        state.write_text("{}")
        os.utime(state, (time, time))
    (tmp_path / "checkpoint-11").mkdir()  # without a state
    assert newest(tmp_path).endswith("checkpoint-10")


BEST = {
    "num_pairs": 24,
    "per_device_train_batch_size": 4,
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 6,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "early_stopping_patience": 2,
    "load_best_model_at_end": "true",
}


def give_ranges(monkeypatch, *ranges):
    """What the evaluations of a run find, in turn."""
    left = iter(ranges)
    report = SimpleNamespace(arm=lambda sign: Arm(0.5, None))
    monkeypatch.setattr(
        "repeng.train.trainer.evaluate", lambda *_, **__: SimpleNamespace(range=next(left), **vars(report))
    )


def check_best(trainer, folder):
    """Ended at step 8 with the adapter of step 4, which is kept beside the last checkpoint."""
    assert trainer.state.global_step == 8
    best = load_file(folder / "checkpoint-4" / "adapter_model.safetensors")
    last = load_file(folder / "checkpoint-6" / "adapter_model.safetensors")
    found = {name.removesuffix(".default"): tensor for name, tensor in adapter(trainer).items()}
    assert all(torch.equal(best[name], tensor) for name, tensor in found.items())
    assert any(not torch.equal(last[name], tensor) for name, tensor in found.items())
    for name in ("checkpoint-4", "checkpoint-6"):  # as written, wherever it was staged
        state = json.loads((folder / name / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]) == folder / "checkpoint-4"


def test_the_best_checkpoint_is_kept_and_ends_the_run(tmp_path, monkeypatch):
    """A checkpoint at every new best, though one is due at every sixth step; the second evaluation is the best."""
    give_ranges(monkeypatch, 1.0, 3.0, 2.0, 2.0, 9.0, 9.0)
    trainer = trainer_for(arguments(tmp_path, **BEST))
    trainer.train()
    check_best(trainer, tmp_path)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


def test_a_resumed_run_remembers_the_best_and_how_long_ago_it_was(tmp_path, monkeypatch):
    give_ranges(monkeypatch, 1.0, 3.0, 2.0)
    first = trainer_for(arguments(tmp_path, **BEST))
    stop_at(first, 6)
    first.train()
    give_ranges(monkeypatch, 2.0, 9.0, 9.0)
    second = trainer_for(arguments(tmp_path, **BEST))
    second.train(resume_from_checkpoint=newest(tmp_path))
    check_best(second, tmp_path)


def test_no_suffix_is_on_both_sides():
    pairs = [ContrastPair(f"yes {index}", "no", f"suffix {index % 12}") for index in range(60)]
    kept, held = hold_out(pairs)
    assert len(held) == 10 and len(kept) == 50  # two suffixes, as one has five pairs only
    assert not {pair.suffix for pair in kept} & {pair.suffix for pair in held}
    kept, held = hold_out([ContrastPair(f"yes {index}", "no", "") for index in range(60)], most=4)
    assert len(held) == 4 and len(kept) == 56


def test_the_range_is_measured_on_pairs_that_are_held_back(tmp_path):
    options = {"num_pairs": 60, "eval_strategy": "steps", "eval_steps": 7, "max_steps": 7, "learning_rate": 1e-2}
    args = arguments(tmp_path, **options)
    run = prepare(args)
    assert 40 < len(run.task.pairs) == len(run.examples) < 60 and len(run.validation) == 3
    assert not {question.suffix for question in run.validation} & {pair.suffix for pair in run.task.pairs}
    trained = {run.tokenizer.decode(example["neutral_ids"], skip_special_tokens=True) for example in run.examples}
    assert len(run.validation_texts) == 32 and not trained & set(run.validation_texts)
    trainer = SteeringTrainer(
        run.model, args, run.examples, run.tokenizer, eval_dataset=run.validation, neutral_texts=run.validation_texts
    )
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "eval_range" in row]
    assert "separation" not in row  # the terms of the loss stand beside the loss of the same steps
    assert row["eval_range"] == pytest.approx(row["eval_plus"] + row["eval_minus"]) and row["eval_range"] > 0


def test_what_was_saved_is_compared_with_the_adapter(tmp_path):
    trainer = trainer_for(arguments(tmp_path))
    model, state = trainer.model, adapter_state(trainer.model)
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path, state)
    key = next(key for key in state if "lambda" in key)
    with pytest.raises(OSError, match="differs from the adapter"):
        check_saved(model, tmp_path, {**state, key: state[key] + 1})
    with pytest.raises(OSError, match="differs from the adapter"):
        check_saved(model, tmp_path, {name: tensor for name, tensor in state.items() if name != key})


@pytest.mark.parametrize("keys", [{"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 9}])
def test_pairs_must_fill_an_optimizer_step(tmp_path, keys):
    args = arguments(tmp_path, num_pairs=8, **keys)
    with pytest.raises(ValueError, match=f"8 training pairs do not fill one optimizer step of {args.pairs_per_step}"):
        prepare(args)


def test_what_is_measured_must_be_named(tmp_path):
    with pytest.raises(ValueError, match=r"metric_for_best_model.*'range', 'plus' or 'minus'; got 'loss'"):
        arguments(tmp_path, metric_for_best_model="loss")


def test_early_stopping_needs_evaluations(tmp_path):
    with pytest.raises(ValueError, match="eval_strategy: steps and eval_steps"):
        arguments(tmp_path, early_stopping_patience=2)


def test_partial_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dataloader_drop_last must stay true"):
        arguments(tmp_path, dataloader_drop_last="false")


@pytest.mark.parametrize("key, value", [("torch_compile", "true"), ("torch_compile_backend", "inductor")])
def test_compilation_is_refused_before_anything_is_built(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"^{key}="):
        arguments(tmp_path, **{key: value})
