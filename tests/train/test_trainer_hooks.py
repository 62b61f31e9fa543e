"""The methods of `transformers.Trainer` that the trainer overrides or calls although they are private."""

import inspect

import pytest
from transformers import Trainer

from repeng.train.trainer import SteeringTrainer

# By name, its parameters in the versions of transformers that pyproject.toml allows.
PRIVATE = {
    "_get_train_sampler": ["self", "train_dataset"],
    "_run_epoch": [
        "self",
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_get_output_dir": ["self", "trial"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save": ["self", "output_dir", "state_dict"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_best_model": ["self"],
    "create_accelerator_and_postprocess": ["self"],
}


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_hook_is_what_it_was(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == PRIVATE[name]


def test_all_private_hooks_are_listed():
    overridden = {
        name for name in vars(SteeringTrainer) if name[0] == "_" and name[1] != "_" and hasattr(Trainer, name)
    }
    assert overridden <= PRIVATE.keys()


def test_checkpoints_are_still_written_by_the_hooks():
    """A hook that the training loop no longer calls would be overridden in vain."""
    code = inspect.getsource(inspect.getmodule(Trainer))
    for name in PRIVATE:
        assert code.count(f"self.{name}") >= 1, name
