"""Select the tokens that are steered, in the prompt and at every step of generation."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin

from repeng.control.cache_guard import cache_of, columns_of

STATES = ("state", "cache_params", "mems")  # arguments that carry the state of recurrent models without a cache
PACKING = ("generate_batch", "init_continuous_batching")  # methods of models that batch continuously
Positions = Literal["all", "prompt", "generated"] | slice


class TokenFilter:
    """Selects the steered tokens of the current forward pass: `tokens (b t)`, or None for all of them.

    The prompt is the input of `generate`, or, outside of `generate`, the input of a forward pass without a filled
    cache. All later tokens are generated. If a mask `(b t)` marks padding, padding is never steered.

    Args:
        positions: "all", "prompt", "generated", or a slice of real tokens. A slice counts from the first real token;
            negative bounds count from the end of the prompt.

    Raises:
        ValueError: `positions` has another value.
    """

    def __init__(self, positions: Positions) -> None:
        named = isinstance(positions, str) and positions in ("all", "prompt", "generated")
        if not named and not (isinstance(positions, slice) and (positions.step or 1) > 0):
            raise ValueError(f"positions must be 'all', 'prompt', 'generated' or a slice; got {positions!r}")
        self.positions: Positions = positions
        self.tokens: Tensor | None = None
        self._given: int | None = None  # prompt columns passed to `generate`, while it runs
        self._given_mask: Tensor | None = None  # the mask (b t) passed to `generate`
        self._outside: tuple[Any, ...] = ()  # (mask of the model around the trunk,), if that model runs
        self._seen: WeakKeyDictionary[Cache, int] = WeakKeyDictionary()  # columns in caches that do not report them
        self._prompt = 0  # columns of the prompt
        self._lengths: Tensor | None = None  # real tokens of each prompt, (b,)

    @contextmanager
    def watching(self, model: nn.Module, trunk: nn.Module) -> Iterator[None]:
        """Inside the context, track the forward passes of `trunk` and all calls of `generate` in `model`."""
        with ExitStack() as stack:
            stack.callback(trunk.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            for module in model.modules():
                if isinstance(module, GenerationMixin):
                    stack.enter_context(replaced(module, "generate", self._watched))
                    if module is not trunk:
                        stack.callback(module.register_forward_pre_hook(self._around, with_kwargs=True).remove)
            yield

    def _around(self, _model: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        self._outside = (kwargs.get("attention_mask"),)

    def _watched(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            outer = self._given, self._given_mask
            prompts = (*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
            self._given = next((prompt.shape[1] for prompt in prompts if prompt is not None), None)
            self._given_mask, self._lengths = kwargs.get("attention_mask"), None
            try:
                return generate(*args, **kwargs)
            finally:
                self._given, self._given_mask = outer

        return watched

    def _before(self, _trunk: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs.get("input_ids")
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        if self.positions != "all" and kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError(
                f"positions={self.positions!r} does not work with continuous batching, which packs tokens of several "
                "texts into one row; steer 'all' positions, or use generate"
            )
        t = inputs.shape[1]
        past = self._past(kwargs, t)
        if past is None:
            self.tokens, self._outside = None, ()
            return
        mask = self._mask(kwargs.get("attention_mask"), inputs.shape[0], past + t)
        self._outside = ()
        known = mask is not None
        if mask is None:
            mask = inputs.new_ones((inputs.shape[0], past + t), dtype=torch.bool)
        lengths = self._lengths
        if past == 0 or lengths is None or len(lengths) != len(mask):
            self._prompt = past + t if self._given is None else self._given
            # If the prompt comes in chunks, only the mask passed to `generate` covers all of its padding.
            whole = mask if mask.shape[1] >= self._prompt else self._extended(len(mask), self._prompt)
            lengths = mask.new_full((len(mask),), self._prompt, dtype=torch.long)
            if whole is not None:
                lengths = whole[:, : self._prompt].sum(dim=1)
            self._lengths = lengths
        self.tokens = self._select(mask, past, lengths) if known or self.positions != "all" else None

    def _past(self, kwargs: dict[str, Any], t: int) -> int | None:
        """Number of columns before the `t` columns of this forward pass; None if it is unknown and not needed.

        Raises:
            ValueError: the number is unknown, and `positions` depends on it.
        """
        cache = cache_of(kwargs)
        state = next((name for name in STATES if kwargs.get(name) is not None), None)
        past = columns_of(cache) if cache is not None else None if state else 0
        if past is None:
            masks = (kwargs.get("attention_mask"), *self._outside, self._given_mask if t > 1 else None)
            known = [mask.shape[1] for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2]
            past = self._seen.get(cache) if cache is not None else None
            past = max(known) - t if past is None and known else past
        if past is None and self.positions != "all":
            raise ValueError(
                f"positions={self.positions!r} is not known, because the {state or type(cache).__name__} was made "
                "elsewhere and does not report how many tokens it holds; pass a mask (batch, tokens) for all "
                "tokens so far, or steer 'all' positions"
            )
        if cache is not None and past is not None:
            self._seen[cache] = past + t
        return past

    def _mask(self, own: Any, rows: int, columns: int) -> Tensor | None:
        """The mask `(b columns)` of real tokens in the text so far; None if no mask of padding is known.

        Raises:
            ValueError: `positions` is a slice, which counts real tokens, and the model's mask does not mark padding.
        """
        for mask in (own, *self._outside):
            if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= columns:
                return mask[:, :columns].bool()
        extended = self._extended(rows, columns)
        if extended is not None:
            return extended
        if own is not None and self._outside != (None,) and isinstance(self.positions, slice):
            raise ValueError(
                f"positions={self.positions} counts real tokens, but the attention mask of this model is a "
                f"{type(own).__name__}, which does not tell padding; pass a mask (batch, tokens)"
            )
        return None

    def _extended(self, rows: int, columns: int) -> Tensor | None:
        """The mask passed to `generate`, repeated for beams and returned sequences; columns after it are real."""
        mask = self._given_mask
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        mask = mask.bool().repeat_interleave(rows // len(mask), dim=0)
        return nn.functional.pad(mask, (0, max(0, columns - mask.shape[1])), value=True)[:, :columns]

    def _select(self, mask: Tensor, past: int, lengths: Tensor) -> Tensor:
        """The mask of steered tokens in the columns from `past` on, for prompts of `lengths (b,)` real tokens."""
        column = torch.arange(past, mask.shape[1], device=mask.device)
        real, in_prompt = mask[:, past:], column < self._prompt
        match self.positions:
            case "all":
                return real
            case "prompt":
                return real & in_prompt
            case "generated":
                return real & ~in_prompt
        index, lengths = mask.cumsum(dim=1)[:, past:] - 1, lengths.to(mask.device)[:, None]
        start, stop = (
            bound if bound is None or bound >= 0 else (lengths + bound).clamp_min(0)
            for bound in (self.positions.start, self.positions.stop)
        )
        start = 0 if start is None else start
        chosen = real & (index >= start) & ((index - start) % (self.positions.step or 1) == 0)
        return chosen if stop is None else chosen & (index < stop)


@contextmanager
def unpacked(model: nn.Module, what: str | None) -> Iterator[None]:
    """Inside the context, continuous batching raises ValueError, since it does not support `what`; None allows it.

    Continuous batching runs in its own thread. There, an error in a forward pass would only be logged, and the answer
    would have no tokens. The call is therefore refused before it starts.
    """

    def refusing(_method: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*_args: Any, **_kwargs: Any) -> Any:
            raise ValueError(
                f"{what} does not work with continuous batching, which packs tokens of several texts into one row; "
                "use generate, or steer 'all' positions by a single number"
            )

        return refuse

    with ExitStack() as stack:
        for module in model.modules() if what is not None else ():
            for name in PACKING if isinstance(module, GenerationMixin) else ():
                if hasattr(module, name):
                    stack.enter_context(replaced(module, name, refusing))
        yield


@contextmanager
def replaced(module: nn.Module, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the context, the instance attribute `name` is replaced by `change` of its value."""
    before = module.__dict__.get(name)
    module.__dict__[name] = change(getattr(module, name))
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before
