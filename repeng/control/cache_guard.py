"""A key-value cache remembers the coefficient that it was made at; going on with it at another one is an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin

MARK = "_steering"  # attribute of a cache; a cache without it was made without steering


@dataclass(frozen=True)
class Influence:
    """One thing that steers: what it is, how it acts, and its coefficient."""

    name: str
    how: tuple[Any, ...]
    coefficient: float | tuple[float, ...]


State = tuple[Influence, ...]
# By the module that runs the decoder layers: states of the open contexts, and whether other caches may go on in them.
_open: WeakKeyDictionary[nn.Module, list[tuple[State, bool]]] = WeakKeyDictionary()


def current(trunk: nn.Module) -> State:
    """What steers the model in the innermost open context."""
    contexts = _open.get(trunk)
    return contexts[-1][0] if contexts else ()


@contextmanager
def guarded(trunk: nn.Module, state: State, reuse_cache: bool) -> Iterator[None]:
    """Inside the context, the model is in `state`, and a cache made in another one raises unless `reuse_cache`."""
    contexts = _open.setdefault(trunk, [])
    handles = (
        []
        if contexts
        else [
            trunk.register_forward_pre_hook(_check_cache, with_kwargs=True),
            trunk.register_forward_hook(_mark_cache),
        ]
    )
    contexts.append((state, reuse_cache))
    try:
        yield
    finally:
        contexts.pop()
        for handle in handles:
            handle.remove()


def _check_cache(trunk: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: raise ValueError if the cache was made in another state than the current one."""
    if torch.compiler.is_compiling():  # the state would be compiled in, once for each coefficient
        return
    cache = cache_of(kwargs)
    if cache is None:
        return
    state, reuse_cache = _open[trunk][-1]
    made_in = getattr(cache, MARK, ())
    if made_in != state and not reuse_cache and columns_of(cache) != 0:
        raise ValueError(
            f"this key-value cache was made {_told(made_in)}, and the model is now steered {_told(state)}; the cache "
            "would go on acting as before. Start a new one, or say steer(…, reuse_cache=True) to mean it"
        )
    setattr(cache, MARK, state)


def _mark_cache(trunk: nn.Module, _args: tuple, output: Any) -> None:
    """Forward hook: remember the state in a cache that the forward itself has made."""
    if torch.compiler.is_compiling():
        return
    cache = cache_of(output) if isinstance(output, dict) else None
    if cache is not None:
        setattr(cache, MARK, _open[trunk][-1][0])


def cache_of(named: dict[str, Any]) -> Cache | None:
    """The key-value cache among arguments or outputs of a forward, whatever this version of transformers calls it."""
    return next((value for value in named.values() if isinstance(value, Cache)), None)


def columns_of(cache: Cache) -> int | None:
    """How many tokens a cache holds; None if it is not empty and does not tell, as that of a state-space model."""
    if isinstance(cache, EncoderDecoderCache):
        return columns_of(cache.self_attention_cache)
    if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return int(cache.get_seq_length())
    return None if cache.layers and cache.has_previous_state() else 0


def _told(state: State) -> str:
    return ", ".join(f"by {one.name} at {one.coefficient}" for one in state) or "without steering"
