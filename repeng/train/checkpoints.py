"""Checkpoints that are written whole or not at all, and a stop that loses nothing."""

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

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


def check_saved(model: PeftModel, folder: str | Path, state: dict[str, Tensor]) -> None:
    """Raise OSError unless the file of an adapter in `folder` holds exactly `state`, from `adapter_state`."""
    path = Path(folder) / "adapter_model.safetensors"
    expected = get_peft_model_state_dict(model, state_dict=state)
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise OSError(f"{path} was not written whole: {error}") from error
    wrong = found.keys() ^ expected.keys()
    wrong |= {key for key in found.keys() & expected.keys() if not torch.equal(found[key], expected[key].cpu())}
    if wrong:
        raise OSError(f"{path} was not written whole: {min(wrong)} differs from the adapter")


def check_whole(path: Path) -> None:
    """Raise OSError unless every tensor that the file's header promises can be read, and there is one.

    Distributed saving can write a file of a header alone.
    """
    try:
        with safe_open(path, framework="pt") as file:
            elements = sum(file.get_tensor(key).numel() for key in file.keys())
    except SafetensorError as error:
        raise OSError(f"{path} was not written whole: {error}") from error
    if elements == 0:
        raise OSError(f"{path} was written without any element")


def newest(folder: str | Path) -> str | None:
    """The checkpoint that was written last into a folder, if there is one; an earlier run may have gone further."""
    states = Path(folder).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")
    found = max(states, key=lambda path: path.stat().st_mtime_ns, default=None)
    return None if found is None else str(found.parent)


class StopOnSignal(TrainerCallback):
    """On SIGTERM, in any process, all finish the step that runs and write a checkpoint before training ends."""

    def __init__(self) -> None:
        self.received = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = signal.signal(signal.SIGTERM, self._remember)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if hasattr(self, "_before"):
            signal.signal(signal.SIGTERM, self._before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if args.world_size > 1:
            flag = torch.tensor(float(self.received), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.received = bool(flag.item())
        if self.received:
            control.should_save = control.should_training_stop = True
        return control

    def _remember(self, *_: Any) -> None:
        self.received = True
