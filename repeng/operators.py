"""What a steering vector does to an output, and to which tokens."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repeng.tuner.layer import rows_of

Operator = Literal["add", "ablate", "rotate"]
Positions = Literal["all", "prompt", "generated"] | slice


def add(h: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """`h + c v` (CAA, arXiv 2312.06681)."""
    return h + c * v


def ablate(h: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """`h − c (h·û) û` with û = v/‖v‖: at c = 1 nothing is left along v (Arditi et al., arXiv 2406.11717)."""
    unit = v / v.norm()
    return h - c * (h @ unit)[..., None] * unit


def rotate(h: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """`‖h‖ (h + c v) / ‖h + c v‖`: toward v in the plane of h and v, at the norm of h."""
    moved = h + c * v
    return moved * (h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(1e-30))


OPERATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"add": add, "ablate": ablate, "rotate": rotate}


def edit_with(
    operator: str, direction: Tensor, coefficient: Tensor, clamp: float | None, where: "TokenFilter"
) -> Callable[[Tensor], Tensor]:
    """An edit of an output `(b t d)` by `operator`, in float32, row by row where the coefficient is `(b,)`.

    With `clamp`, no token's norm grows above `clamp` times what it was.
    """
    apply = OPERATORS[operator]

    def edit(output: Tensor) -> Tensor:
        c, v, h = coefficient.to(output.device), direction.to(output.device), output.float()
        if c.ndim == 1:
            c = c[rows_of(torch.arange(c.numel(), device=c.device), output)][:, None, None]
        moved = apply(h, v, c)
        if clamp is not None:
            norm, before = moved.norm(dim=-1, keepdim=True), h.norm(dim=-1, keepdim=True)
            moved = torch.where(norm > clamp * before, moved * (clamp * before / norm.clamp_min(1e-30)), moved)
        chosen = c != 0 if where.tokens is None else (c != 0) & where.tokens.to(output.device)[..., None]
        return torch.where(chosen, moved.to(output.dtype), output)

    return edit


class TokenFilter:
    """Which tokens of the running forward are steered: `tokens (b t)`, or None for all of them.

    `before` is a forward pre-hook of the module that runs the decoder layers. The prompt is what the first forward of
    the context sees, or of a new cache; what follows it, with or without a cache, is generated. Padding is never
    steered where a mask `(b t)` tells it.

    Args:
        positions: "all", "prompt", "generated", or a slice of real tokens, counted from the first; negative bounds
            count from the end of the prompt.

    Raises:
        ValueError: `positions` is something else.
    """

    def __init__(self, positions: Positions) -> None:
        named = isinstance(positions, str) and positions in ("all", "prompt", "generated")
        if not named and not (isinstance(positions, slice) and (positions.step or 1) > 0):
            raise ValueError(f"positions must be 'all', 'prompt', 'generated' or a slice; got {positions!r}")
        self.positions = positions
        self.tokens: Tensor | None = None
        self._prompt: Tensor | None = None  # what the prompt's forward was given: ids (b t) or embeddings (b t d)
        self._columns = 0  # of the sequence so far
        self._lengths: Tensor | None = None  # real tokens of each prompt, (b,)

    def before(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        cache, t = kwargs.get("past_key_values"), given.shape[1]
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        known = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= past + t
        mask = mask[:, : past + t].bool() if known else given.new_ones((given.shape[0], past + t), dtype=torch.bool)
        if not (self._follows(given) if past == 0 else self._prompt is not None):
            self._prompt, self._lengths = given.detach(), mask.sum(dim=1)
            self._first = past
        self._columns = past + t
        self.tokens = self._select(mask, past) if known or self.positions != "all" else None

    def _follows(self, given: Tensor) -> bool:
        """Whether this forward, which has no cache, is the last one's sequence with one more token."""
        if self._prompt is None or given.shape[0] != self._prompt.shape[0] or given.shape[1] != self._columns + 1:
            return False
        return torch.equal(given[:, : self._prompt.shape[1]], self._prompt)

    def _select(self, mask: Tensor, past: int) -> Tensor:
        """The steered ones of the columns from `past` on."""
        column = torch.arange(past, mask.shape[1], device=mask.device)
        real, in_prompt = mask[:, past:], column < self._first + self._prompt.shape[1]
        match self.positions:
            case "all":
                return real
            case "prompt":
                return real & in_prompt
            case "generated":
                return real & ~in_prompt
        index, lengths = mask.cumsum(dim=1)[:, past:] - 1, self._lengths.to(mask.device)[:, None]
        start, stop = (bound if bound is None or bound >= 0 else (lengths + bound).clamp_min(0)
                       for bound in (self.positions.start, self.positions.stop))  # fmt: skip
        start = 0 if start is None else start
        chosen = real & (index >= start) & ((index - start) % (self.positions.step or 1) == 0)
        return chosen if stop is None else chosen & (index < stop)
