"""Checkpoints of other runs, and broken ones: a run goes on from its own whole ones alone."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import arguments, trainer_for

from repeng.train.resume import RUN, BrokenError, _check_optimizer, check_checkpoint, checkpoint_to_resume

IDENTITY = {"model_name_or_path": "tiny", "seed": 42, "r": 8, "pairs": "abc", "max_steps": 2, "positive": "happy"}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The model of a run and the folder with its checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_for(arguments(folder, max_steps=2, save_strategy="steps", save_steps=1))
    trainer.identity = IDENTITY
    trainer.train()
    return trainer.model, folder


@pytest.fixture
def run(written, tmp_path):
    """The same, to be damaged."""
    model, folder = written
    return model, shutil.copytree(folder, tmp_path / "run")


def test_a_run_goes_on_from_its_newest_checkpoint(run):
    model, folder = run
    assert checkpoint_to_resume(folder, IDENTITY, model).endswith("checkpoint-2")
    longer = {**IDENTITY, "max_steps": 9, "output_dir": "x"}
    assert checkpoint_to_resume(folder, longer, model).endswith("checkpoint-2")
    assert checkpoint_to_resume(folder / "nowhere", IDENTITY, model) is None


@pytest.mark.parametrize("key", ["model_name_or_path", "seed", "r", "pairs", "positive", "learning_rate"])
def test_a_checkpoint_of_another_run_is_refused_by_name(run, key):
    model, folder = run
    with pytest.raises(ValueError, match=rf"of another run: {key} .* there and 'other' here"):
        checkpoint_to_resume(folder, {**IDENTITY, key: "other"}, model)


def test_a_checkpoint_that_does_not_say_its_run_or_is_beyond_the_end_is_refused(run):
    model, folder = run
    with pytest.raises(ValueError, match="step 2, after max_steps: 1"):
        checkpoint_to_resume(folder, {**IDENTITY, "max_steps": 1}, model)
    (folder / "checkpoint-2" / RUN).unlink()
    with pytest.raises(ValueError, match=f"no {RUN}"):
        checkpoint_to_resume(folder, IDENTITY, model)
    with pytest.raises(ValueError, match="no checkpoint 'nowhere'"):
        check_checkpoint("nowhere", IDENTITY, model)


def tensors(change):
    def damage(folder):
        stored = load_file(folder / WEIGHTS)
        key = next(key for key in sorted(stored) if "lambda" in key)
        save_file(change(stored, key), folder / WEIGHTS)

    return damage


def optimizer(change):
    def damage(folder):
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "optimizer.pt")

    return damage


def state(**changes):
    def damage(folder):
        path = folder / "trainer_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def cut(name):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-30])

    return damage


def wrong_moments(stored):
    first = next(iter(stored["state"].values()))
    first.update({name: torch.ones(3) for name in ("exp_avg", "exp_avg_sq")})


def infinite_moments(stored):
    next(iter(stored["state"].values()))["exp_avg"][...] = float("nan")


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def evil(name):
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Evil()))


DAMAGES = {
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "no state, no run": lambda folder: [(folder / name).unlink() for name in ("trainer_state.json", RUN)],
    "empty state": lambda folder: (folder / "trainer_state.json").write_text(""),
    "step as a text": state(global_step="2"),
    "step of another folder": state(global_step=1),
    "no log": state(log_history=None),
    "run cut": cut(RUN),
    "run as a list": lambda folder: (folder / RUN).write_text("[]"),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "weights cut": cut(WEIGHTS),
    "weights empty": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "weights NaN": tensors(lambda stored, key: {**stored, key: stored[key] * float("nan")}),
    "weights of another shape": tensors(lambda stored, key: {**stored, key: stored[key][:-1].clone()}),
    "weights of another type": tensors(lambda stored, key: {**stored, key: stored[key].int()}),
    "a weight missing": tensors(lambda stored, key: {k: t for k, t in stored.items() if k != key}),
    "a weight added": tensors(lambda stored, key: {**stored, "more": torch.ones(1)}),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "optimizer cut": cut("optimizer.pt"),
    "optimizer of a text": lambda folder: torch.save("x", folder / "optimizer.pt"),
    "optimizer of other parameters": optimizer(lambda stored: stored["param_groups"][0]["params"].append(99)),
    "optimizer of other shapes": optimizer(wrong_moments),
    "optimizer NaN": optimizer(infinite_moments),
    "optimizer that runs code": evil("optimizer.pt"),
    "no scheduler": lambda folder: (folder / "scheduler.pt").unlink(),
    "scheduler that runs code": evil("scheduler.pt"),
    "no random state": lambda folder: (folder / "rng_state.pth").unlink(),
    "random state that runs code": evil("rng_state.pth"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_left_aside_aloud(run, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, folder = run
    DAMAGES[damage](folder / "checkpoint-2")
    with pytest.warns(UserWarning, match=r"left aside: .*checkpoint-2"):
        assert checkpoint_to_resume(folder, IDENTITY, model).endswith("checkpoint-1")
    with pytest.raises(BrokenError, match="checkpoint-2"):
        check_checkpoint(folder / "checkpoint-2", IDENTITY, model)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.filterwarnings("ignore:this checkpoint is left aside:UserWarning")
def test_without_a_whole_checkpoint_a_run_does_not_begin_anew_unasked(run):
    model, folder = run
    for path in folder.glob("checkpoint-*"):
        (path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="is complete; train without"):
        checkpoint_to_resume(folder, IDENTITY, model)


@pytest.mark.parametrize("optim", ["Adafactor", "Adagrad"])
def test_the_state_of_another_optimizer_is_whole(tmp_path, optim):
    """Adafactor keeps rows and columns of its moments, in other shapes than the parameters."""
    layer = torch.nn.Linear(3, 2)
    optimizer = getattr(torch.optim, optim)(layer.parameters(), lr=1e-3)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    _check_optimizer(tmp_path / "optimizer.pt", layer, optim.lower())
    for state in optimizer.state.values():
        state["moment"] = torch.tensor(torch.nan)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="NaN or infinite"):
        _check_optimizer(tmp_path / "optimizer.pt", layer, optim.lower())


@pytest.mark.parametrize("key", ["ddp_timeout", "log_level", "dataloader_num_workers", "push_to_hub", "save_steps"])
def test_a_run_may_go_on_with_other_keys_of_its_surroundings(run, key):
    model, folder = run
    assert checkpoint_to_resume(folder, {**IDENTITY, key: 5}, model) == str(folder / "checkpoint-2")
