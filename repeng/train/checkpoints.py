"""Write checkpoints completely or not at all, and find the newest one."""

import os
import shutil
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from repeng.train.adapter_files import check_whole

STAGING = ".saving-checkpoint"


class CheckpointError(OSError):
    """A checkpoint could not be written. Earlier checkpoints are intact."""


def publish(staging: Path, folder: Path, args: TrainingArguments, best: str | None = None) -> None:
    """Read back the one checkpoint in `staging`, move it to `folder`, then delete old checkpoints.

    `save_total_limit` checkpoints stay, among them the newest and the `best`.

    Raises:
        OSError: a tensor file is incomplete.
    """
    (written,) = staging.glob("checkpoint-*")
    for path in written.glob("*.safetensors"):
        check_whole(path)
    place = folder / written.name
    if place.exists():  # written by an earlier run in the same folder
        shutil.rmtree(place)
    os.replace(written, place)
    shutil.rmtree(staging, ignore_errors=True)
    rotate_checkpoints(str(folder), args.save_total_limit, best_model_checkpoint=best, use_mtime=True)


def newest(folder: str | Path) -> str | None:
    """The most recently written checkpoint in a folder that holds a trainer state; None if there is none."""
    found = [path for path in Path(folder).glob("checkpoint-*") if (path / TRAINER_STATE_NAME).is_file()]
    return str(max(found, key=when_written)) if found else None


def when_written(path: Path) -> int:
    """When a checkpoint was written, in ns. Step numbers do not tell: an earlier run may have taken more steps."""
    state = path / TRAINER_STATE_NAME
    return (state if state.is_file() else path).stat().st_mtime_ns
