"""What the tensors of an adapter's file may hold: it may come from somebody else, or be damaged."""

from collections.abc import Mapping

import torch
from torch import Tensor

from repeng.tuner.config import PREFIX, SvdSteeringConfig

LEARNED = ("in", "out", "lambda", "shift")
BASES = ("u", "v")  # with orthonormal columns, or zero ones where a module has fewer directions
# Sizes beyond which the change at c = ±1 would be NaN, infinite or rounding alone.
LARGEST = {"lambda": 40.0, "in": 1e4, "out": 1e4, "shift": 1e6, "u": 1.1, "v": 1.1, "s": 1e6}
ORTHONORMAL = 0.02
MEND = "the file is damaged: take the adapter from where it was saved again"


def part_of(key: str) -> str:
    """What a tensor is, by the end of its key: one of `LEARNED` and the bases, u, s, v."""
    return key.rpartition(f".{PREFIX}")[2].split(".")[0]


def check_tensors(tensors: Mapping[str, Tensor], config: SvdSteeringConfig) -> None:
    """Raise ValueError, naming the tensor, unless all can be those of an adapter with this configuration.

    Args:
        tensors: by the key of a file or of a state dict; bases and what is learned alike.
        config: of the adapter.
    """
    for key, tensor in tensors.items():
        check_numbers(key, tensor)
        part = part_of(key)
        if part not in LARGEST:
            raise ValueError(f"{key} ends in {part!r}; a tensor of this method ends in {', '.join(LARGEST)}")
        _check_shape(key, part, tensor, config)
        largest = tensor.abs().max().item()
        limit = LARGEST[part] if part != "lambda" or not config.additive_scale else LARGEST["s"]
        if largest > limit:
            raise ValueError(f"{key} holds {largest:.3g}; it may hold up to {limit:g} in size; {MEND}")
        if part == "s" and tensor.min() < 0:
            raise ValueError(f"{key} holds {tensor.min().item():.3g}; singular values are 0 or more; {MEND}")
        if part in BASES:
            _check_orthonormal(key, tensor)


def check_numbers(key: str, tensor: Tensor) -> None:
    """Raise ValueError, naming the tensor, unless it holds finite floating-point numbers, of 16 bits or more."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(f"{key} has dtype {tensor.dtype}; floating-point numbers of 16 bits or more are read; {MEND}")
    if tensor.numel() == 0:
        raise ValueError(f"{key} has shape {tuple(tensor.shape)}, so no element; {MEND}")
    if not tensor.isfinite().all():
        raise ValueError(f"{key} holds NaN or infinite values; {MEND}")


def does_nothing(tensors: Mapping[str, Tensor]) -> bool:
    """Whether everything that an adapter learns is zero, or too small to be told from it."""
    return all(tensor.abs().max() < 1e-30 for key, tensor in tensors.items() if part_of(key) in LEARNED)


def _check_shape(key: str, part: str, tensor: Tensor, config: SvdSteeringConfig) -> None:
    r = config.r
    last = {"in": r * (r - 1) // 2, "out": r * (r - 1) // 2, "lambda": r, "s": r, "u": r, "v": r}.get(part)
    dimensions = 2 if part in BASES else 1
    if tensor.ndim != dimensions or last not in (None, tensor.shape[-1]):
        wanted = "(d,)" if last is None else f"(d, {last})" if dimensions == 2 else f"({last},)"
        raise ValueError(
            f"{key} has shape {tuple(tensor.shape)} and r={r} calls for {wanted}; take adapter_config.json and "
            "adapter_model.safetensors from one save"
        )


def _check_orthonormal(key: str, basis: Tensor) -> None:
    gram = basis.float().mT @ basis.float()
    lengths = gram.diagonal()
    wanted = torch.diag((lengths > 0.5).float())
    if (gram - wanted).abs().max() > ORTHONORMAL:
        raise ValueError(f"{key} has columns that are not orthogonal and of length 1, as a basis is; {MEND}")
