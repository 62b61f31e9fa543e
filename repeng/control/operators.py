"""Operators that apply a steering vector to an output."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from repeng.control.positions import TokenFilter
from repeng.tuner.coefficients import repeat_rows

TINY = 1e-30  # against a division by zero
Operator = Literal["add", "ablate", "rotate"]


def add(h: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """`h + c v` (CAA, arXiv 2312.06681)."""
    return h + c * v


def ablate(h: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """`h − c (h·û) û` with û = v/‖v‖: at c = 1 no component along v is left (Arditi et al., arXiv 2406.11717)."""
    unit = v / v.norm().clamp_min(TINY)
    return h - c * (h @ unit)[..., None] * unit


def rotate(h: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """`‖h‖ (h + c v) / ‖h + c v‖`: rotate h toward v in the plane of h and v, at constant norm."""
    moved = h + c * v
    return moved * (h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(TINY))


OPERATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"add": add, "ablate": ablate, "rotate": rotate}


def _for(output: Tensor, tokens: Tensor) -> Tensor:
    """The mask of steered tokens `(b t)`, reshaped to broadcast over an output `(b t …)`."""
    if output.shape[:2] != tokens.shape:
        raise ValueError(
            f"the output of a site has shape {tuple(output.shape)}, not (batch, tokens, …) for {tokens.shape[0]} × "
            f"{tokens.shape[1]} tokens, so its padding is not known; steer 'residual' or another site"
        )
    return tokens.to(output.device).reshape(*tokens.shape, *[1] * (output.ndim - 2))


def edit_with(
    operator: str,
    direction: Tensor,
    coefficient: Tensor,
    clamp: float | None,
    where: TokenFilter,
    gate: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[Tensor], Tensor]:
    """A function that edits an output `(b t d)` by `operator`, in float32.

    The coefficient is `()`, `(b,)` per row, or `(b t)` per token. With `clamp`, the norm of a token is limited to
    `clamp` times its norm before the edit. With `gate`, each token's coefficient is multiplied by the factor `(b t 1)`
    that the gate computes from the output.
    """
    apply = OPERATORS[operator]
    moved_to: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}  # copied to a device only once

    def edit(output: Tensor) -> Tensor:
        h = output if output.dtype == torch.float64 else output.float()
        where_to = (h.device, h.dtype)
        if where_to not in moved_to:
            with torch.inference_mode(False):  # a later forward pass may need gradients
                moved_to[where_to] = coefficient.to(h.device, h.dtype), direction.to(h.device, h.dtype)
        c, v = moved_to[where_to]
        if c.ndim:
            c = repeat_rows(c, output)
            c = c.reshape(*c.shape, *[1] * (output.ndim - c.ndim))
        if gate is not None:
            c = c * gate(h)
        moved = apply(h, v, c)
        if clamp is not None:
            norm, before = moved.norm(dim=-1, keepdim=True), h.norm(dim=-1, keepdim=True)
            moved = torch.where(norm > clamp * before, moved * (clamp * before / norm.clamp_min(TINY)), moved)
        chosen = c != 0 if where.tokens is None else (c != 0) & _for(output, where.tokens)
        return torch.where(chosen, moved.to(output.dtype), output)

    return edit
