"""Adapters as files: gathered from all processes, written whole, read back, loaded."""

import filecmp
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from repeng.data.files import staged
from repeng.model.sharded import whole
from repeng.tuner.config import PREFIX
from repeng.tuner.keys import check_keys

ADAPTER = (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)


def save_adapter(
    model: PeftModel,
    folder: str | Path,
    state: dict[str, Tensor] | None = None,
    *,
    more: Mapping[str, str] | None = None,
    stale: Iterable[Path] = (),
) -> None:
    """Write the adapter completely or not at all.

    It is written to a temporary folder, read back, compared with the model, and moved to its place.

    Args:
        model: the PEFT model.
        folder: the folder to write to.
        state: result of `adapter_state`; if the model is sharded, every process must call that function.
        more: texts of further files, by file name. They are moved to the folder before the adapter.
        stale: files that describe the adapter already in the folder; they are deleted if the new one differs from it.

    Raises:
        WriteError: the folder cannot be written to, or the written file differs from the adapter.
    """
    state, more, going = adapter_state(model) if state is None else state, more or {}, list[Path]()
    with staged(folder, (*more, *ADAPTER), going) as temporary:
        model.save_pretrained(str(temporary), state_dict=state)
        check_saved(model, temporary, state)
        for name, text in more.items():
            (temporary / name).write_text(text, encoding="utf-8")
        places = [Path(folder) / name for name in ADAPTER]
        tensors, config = (not p.is_file() or not filecmp.cmp(p, temporary / p.name, shallow=False) for p in places)
        going += [*stale, *places[1:]] if tensors and config else stale if tensors else []


def check_saved(model: PeftModel, folder: str | Path, state: dict[str, Tensor]) -> None:
    """Raise OSError unless the adapter file in `folder` holds exactly `state`, the result of `adapter_state`."""
    path = Path(folder) / "adapter_model.safetensors"
    expected = get_peft_model_state_dict(model, state_dict=state)
    try:
        written = load_file(path)
    except SafetensorError as error:
        raise OSError(f"{path} was not written whole: {error}") from error
    wrong = written.keys() ^ expected.keys()
    wrong |= {key for key in written.keys() & expected.keys() if not torch.equal(written[key], expected[key].cpu())}
    if wrong:
        raise OSError(f"{path} was not written whole: {min(wrong)} differs from the adapter")


def check_whole(path: Path) -> None:
    """Raise OSError unless the file holds at least one element and every tensor in its header can be read.

    Distributed saving can write a file that consists of a header only.
    """
    try:
        with safe_open(path, framework="pt") as file:
            elements = sum(file.get_tensor(key).numel() for key in file.keys())
    except SafetensorError as error:
        raise OSError(f"{path} was not written whole: {error}") from error
    if elements == 0:
        raise OSError(f"{path} was written without any element")


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Tensors of the adapter by their names in the model, gathered and on the CPU. Every process must call this."""
    return {key: whole(tensor).detach().cpu() for key, tensor in _adapter_tensors(model).items()}


def _adapter_tensors(model: PeftModel) -> dict[str, Any]:
    """Tensors of the adapter as they are in the model: trained parameters and all other tensors of the method."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = f".{getattr(model.base_model, 'prefix', PREFIX)}"
    return {key: tensor for key, tensor in model.state_dict().items() if key in trained or own in key}


@torch.no_grad()
def load_adapter_state(model: PeftModel, folder: str | Path) -> None:
    """Load the adapter of a checkpoint into a model whose parameters may be sharded. Every process must call this.

    Raises:
        ValueError: the tensors in the file are not those of the model.
    """
    stored = load_file(Path(folder) / "adapter_model.safetensors")
    name = cast(str, model.active_adapter)  # a `PeftModel` always has one
    expected = {
        key.removesuffix(f".{name}").replace(f".{name}.", "."): tensor
        for key, tensor in _adapter_tensors(model).items()
    }
    check_keys(set(expected), set(stored), name)
    for key, tensor in expected.items():
        value = stored[key].to(tensor.device, tensor.dtype)
        if hasattr(tensor, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor  # missing in some builds of PyTorch

            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        tensor.copy_(value)
