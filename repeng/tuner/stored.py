"""Checks of the tensors in an adapter's file, which may be damaged or come from an unknown author."""

from collections.abc import Mapping

import torch
from torch import Tensor

from repeng.tuner.config import PREFIX, SvdSteeringConfig

LEARNED = ("in", "out", "lambda", "shift")
BASES = ("u", "v")  # their columns are orthonormal, or zero where a module has fewer directions
# Largest absolute values. Beyond them, the change at c = ±1 would be NaN, infinite or only rounding error.
LARGEST = {"lambda": 40.0, "in": 1e4, "out": 1e4, "shift": 1e6, "u": 1.1, "v": 1.1, "s": 1e6}
ORTHONORMAL = 0.02
MEND = "the file is damaged; copy the adapter again from where it was saved"


def part_of(key: str) -> str:
    """The kind of a tensor, from the end of its key: one of `LEARNED`, or u, s, v for a basis."""
    return key.rpartition(f".{PREFIX}")[2].split(".")[0]


def check_tensors(tensors: Mapping[str, Tensor], config: SvdSteeringConfig) -> None:
    """Raise ValueError, naming the tensor, if a tensor is not valid for an adapter with this configuration.

    Args:
        tensors: bases and learned parameters, by their keys in a file or state dict.
        config: the adapter's configuration.
    """
    for key, tensor in tensors.items():
        check_numbers(key, tensor)
        part = part_of(key)
        if part not in LARGEST:
            raise ValueError(f"{key} ends in {part!r}; the keys of this method end in one of {', '.join(LARGEST)}")
        _check_shape(key, part, tensor, config)
        largest = tensor.abs().max().item()
        limit = LARGEST[part] if part != "lambda" or not config.additive_scale else LARGEST["s"]
        if largest > limit:
            raise ValueError(f"{key} holds a value of size {largest:.3g}; the limit is {limit:g}; {MEND}")
        if part == "s" and tensor.min() < 0:
            raise ValueError(f"{key} holds {tensor.min().item():.3g}; singular values must be 0 or more; {MEND}")
        if part in BASES:
            _check_orthonormal(key, tensor)


def check_numbers(key: str, tensor: Tensor) -> None:
    """Raise ValueError, naming the tensor, unless it holds finite floating-point numbers of at least 16 bits."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(f"{key} has dtype {tensor.dtype}; it must be floating-point with at least 16 bits; {MEND}")
    if tensor.numel() == 0:
        raise ValueError(f"{key} has shape {tuple(tensor.shape)}, which has no elements; {MEND}")
    if not tensor.isfinite().all():
        raise ValueError(f"{key} holds NaN or infinite values; {MEND}")


def does_nothing(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all learned parameters of an adapter are zero, or too small to have an effect."""
    return all(tensor.abs().max() < 1e-30 for key, tensor in tensors.items() if part_of(key) in LEARNED)


def _check_shape(key: str, part: str, tensor: Tensor, config: SvdSteeringConfig) -> None:
    r = config.r
    last = {"in": r * (r - 1) // 2, "out": r * (r - 1) // 2, "lambda": r, "s": r, "u": r, "v": r}.get(part)
    dimensions = 2 if part in BASES else 1
    if tensor.ndim != dimensions or last not in (None, tensor.shape[-1]):
        wanted = "(d,)" if last is None else f"(d, {last})" if dimensions == 2 else f"({last},)"
        raise ValueError(
            f"{key} has shape {tuple(tensor.shape)}, but r={r} needs {wanted}; use adapter_config.json and "
            "adapter_model.safetensors from the same save"
        )


def _check_orthonormal(key: str, basis: Tensor) -> None:
    gram = basis.float().mT @ basis.float()
    lengths = gram.diagonal()
    wanted = torch.diag((lengths > 0.5).float())
    if (gram - wanted).abs().max() > ORTHONORMAL:
        raise ValueError(f"{key} must have orthogonal columns of length 1, but does not; {MEND}")
