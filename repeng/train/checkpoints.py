"""Checkpoints that are written whole or not at all, and those that a run can go on from."""

import os
import shutil
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from repeng.train.adapter_files import check_whole

STAGING = ".saving-checkpoint"


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are whole."""


def publish(staging: Path, folder: Path, args: TrainingArguments, best: str | None = None) -> None:
    """Move the one checkpoint in `staging`, after reading it back, to its place in `folder`; then delete old ones.

    As many as `save_total_limit` says stay, among them the newest and the `best`.

    Raises:
        OSError: a tensor file was not written whole.
    """
    (written,) = staging.glob("checkpoint-*")
    for path in written.glob("*.safetensors"):
        check_whole(path)
    place = folder / written.name
    if place.exists():  # of an earlier run in the same folder
        shutil.rmtree(place)
    os.replace(written, place)
    shutil.rmtree(staging, ignore_errors=True)
    rotate_checkpoints(str(folder), args.save_total_limit, best_model_checkpoint=best, use_mtime=True)


def newest(folder: str | Path) -> str | None:
    """The checkpoint that was written last into a folder, if there is one with a state of the trainer."""
    found = [path for path in Path(folder).glob("checkpoint-*") if (path / TRAINER_STATE_NAME).is_file()]
    return str(max(found, key=when_written)) if found else None


def when_written(path: Path) -> int:
    """When a checkpoint was written, in ns; an earlier run may have gone further in steps."""
    state = path / TRAINER_STATE_NAME
    return (state if state.is_file() else path).stat().st_mtime_ns
