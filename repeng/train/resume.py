"""Check whether a run can continue from a checkpoint: that it belongs to the same run, and that it is complete."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from pydantic import Field
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from repeng.data.schema import checked, shown
from repeng.model.strict_json import read_json
from repeng.model.tensor_files import read_tensors
from repeng.train.adapter_files import adapter_state
from repeng.train.checkpoints import when_written
from repeng.tuner.stored import check_numbers

RUN = "run.json"  # file in a checkpoint that describes its run
# Keys that may differ when a run is resumed: output, logging and length.
FREE = {
    "output_dir",
    "resume",
    "resume_from_checkpoint",
    "require_steering",
    "max_steps",
    "run_name",
    "disable_tqdm",
    "use_cpu",
    "num_train_epochs",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    # The pairs themselves are compared.
    "pairs_file",
    "suffixes_file",
}
FREE_FAMILIES = ("hub_", "push_to_hub", "ddp_", "dataloader_", "log", "save_", "report_")


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a run as JSON reads it back."""
    return json.loads(json.dumps(values, default=str))


def checkpoint_to_resume(
    folder: str | Path, run: Mapping[str, Any], model: PeftModel, whole: bool = True
) -> str | None:
    """The newest complete checkpoint in the folder of a run; None if the folder has no checkpoint.

    Args:
        folder: the folder of the run.
        run: the description of this run.
        model: the model with its adapter.
        whole: whether a checkpoint holds the complete state of the optimizer, as it does without sharding.

    Warns:
        UserWarning: a checkpoint is damaged and skipped.

    Raises:
        ValueError: the newest checkpoint belongs to another run, or no checkpoint is complete.
    """
    found = sorted(Path(folder).glob("checkpoint-*"), key=when_written, reverse=True)
    for path in found:
        try:
            check_checkpoint(path, run, model, whole)
        except BrokenError as error:
            warnings.warn(f"this checkpoint is left aside: {error}", stacklevel=2)
            continue
        return str(path)
    if found:
        raise ValueError(f"no checkpoint in {folder} is complete; train without resume, with another output_dir")
    return None


class BrokenError(ValueError):
    """A checkpoint is damaged."""


def check_checkpoint(path: str | Path, run: Mapping[str, Any], model: PeftModel, whole: bool = True) -> None:
    """Raise ValueError unless a run can continue from a checkpoint; see `checkpoint_to_resume`.

    Raises:
        BrokenError: the checkpoint is damaged.
        ValueError: the checkpoint belongs to another run, or does not exist.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint {str(path)!r}: give a folder such as outputs/x/checkpoint-60")
    _check_same_run(path, run)
    try:
        step = _check_state(path)
        _check_adapter(path / WEIGHTS, model)
        if whole:
            _check_optimizer(path / OPTIMIZER_NAME, model, str(run.get("optim", "adamw")))
            _unpickled(path / SCHEDULER_NAME)
            for numbers in [*path.glob("rng_state*.pth")] or [path / "rng_state.pth"]:
                _unpickled(numbers)
    except (ValueError, OSError) as error:
        raise BrokenError(str(error)) from None
    most = run.get("max_steps")
    if isinstance(most, int) and 0 < most < step:
        raise ValueError(
            f"{path} was written at step {step}, after max_steps: {most}; raise max_steps, or give another output_dir"
        )


def _check_same_run(path: Path, run: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the keys that differ, if a checkpoint belongs to another run."""
    try:
        there = checked(dict[str, Any], read_json(path / RUN), str(path / RUN))
    except FileNotFoundError:
        if not (path / TRAINER_STATE_NAME).is_file():
            raise BrokenError(f"{path} holds neither {RUN} nor {TRAINER_STATE_NAME}") from None
        raise ValueError(
            f"{path} has no {RUN}, which describes its run: an older version or another program wrote it. Train "
            "without resume, with another output_dir"
        ) from None
    except (ValueError, OSError) as error:
        raise BrokenError(str(error)) from None
    here = plain(run)
    different = [
        f"{key} {shown(there.get(key))} there and {shown(here.get(key))} here"
        for key in sorted(there.keys() | here.keys())
        if key not in FREE and not key.startswith(FREE_FAMILIES) and there.get(key) != here.get(key)
    ]
    if different:
        raise ValueError(
            f"{path} is of another run: {'; '.join(different[:4])}{' …' if len(different) > 4 else ''}. Resume with "
            "the keys that it was trained with, or give another output_dir"
        )


def _check_state(path: Path) -> int:
    """The step of a checkpoint. Raises ValueError if the trainer's state is invalid or belongs to another step."""
    where = path / TRAINER_STATE_NAME
    state = checked(dict[str, Any], _read_json(where), str(where))
    hints: dict[str, Any] = {
        "global_step": Annotated[int, Field(ge=1)],
        "max_steps": Annotated[int, Field(ge=1)],
        "epoch": Annotated[float, Field(ge=0)],
        "log_history": list[dict[str, Any]],
    }
    for key, hint in hints.items():
        checked(hint, state.get(key), f"{where}: {key}")
    step = path.name.rpartition("-")[2]
    if step.isdigit() and int(step) != state["global_step"]:
        raise ValueError(f"{where}: global_step is {state['global_step']}, but the folder is called {path.name}")
    return state["global_step"]


def _read_json(path: Path) -> Any:
    """Read JSON as `Trainer` writes it, which may hold NaN in the log."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); the checkpoint is damaged") from None


def _check_adapter(path: Path, model: PeftModel) -> None:
    """Raise ValueError unless the file holds the tensors of this model's adapter, with finite values."""
    stored, _ = read_tensors(path)
    expected = get_peft_model_state_dict(model, state_dict=adapter_state(model))
    wrong = stored.keys() ^ expected.keys()
    if wrong:
        raise ValueError(f"{path} does not hold the tensors of this adapter: {min(wrong)} is in one of the two only")
    for key, tensor in stored.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(f"{path}: {key} has shape {tuple(tensor.shape)}, not {tuple(expected[key].shape)}")
        try:
            check_numbers(key, tensor)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _check_optimizer(path: Path, model: nn.Module, optim: str) -> None:
    """Raise ValueError unless the optimizer's state fits the trained parameters, with finite values."""
    state = _unpickled(path)
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    groups = state.get("param_groups") if isinstance(state, dict) else None
    moments = state.get("state") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not isinstance(moments, dict):
        raise ValueError(f"{path} holds no optimizer state")
    count = sum(len(group.get("params", ())) for group in groups if isinstance(group, dict))
    if count != len(shapes):
        raise ValueError(f"{path} belongs to {count} parameters, but this run trains {len(shapes)}")
    # The state of Adam has the shapes of the parameters. Other optimizers factor or project theirs.
    own = [one["exp_avg"] for one in moments.values() if isinstance(one, dict) and "exp_avg" in one]
    if optim.startswith("adam") and len(own) == len(shapes):
        if sorted(tuple(t.shape) for t in own) != sorted(tuple(shape) for shape in shapes):
            raise ValueError(f"{path} belongs to parameters whose shapes differ from those that this run trains")
    for index, one in moments.items():
        for name, value in one.items() if isinstance(one, dict) else ():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{path} holds NaN or infinite values at {index}, {name}")


def _unpickled(path: Path) -> Any:
    """Load what `torch.save` wrote, without running code from the file."""
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}")
    try:
        with warnings.catch_warnings(), safe_globals():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file may raise anything
        told = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} cannot be read as tensors alone ({type(error).__name__}: {told})") from None
