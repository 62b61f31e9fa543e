"""Guard of key-value caches: a cache remembers how the model was steered, and use under other steering is an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin

MARK = "_steering"  # attribute of a cache; a cache without the attribute was made without steering


@dataclass(frozen=True)
class Influence:
    """A steering influence: its name, how it acts, and its coefficient."""

    name: str
    how: tuple[Any, ...]
    coefficient: float | tuple[float, ...]


State = tuple[Influence, ...]
# By the module that runs the decoder layers: the state of each open context, and whether it accepts other caches.
_open: WeakKeyDictionary[nn.Module, list[tuple[State, bool]]] = WeakKeyDictionary()


def current(trunk: nn.Module) -> State:
    """The influences that steer the model in the innermost open context."""
    contexts = _open.get(trunk)
    return contexts[-1][0] if contexts else ()


@contextmanager
def guarded(trunk: nn.Module, state: State, reuse_cache: bool) -> Iterator[None]:
    """Inside the context, the model is in `state`; a cache from another state raises unless `reuse_cache` is set."""
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
    if torch.compiler.is_compiling():  # the state would be compiled in, with a new compilation per coefficient
        return
    cache = cache_of(kwargs)
    if cache is None:
        return
    contexts = _open.get(trunk)
    if not contexts:  # the model is a copy that was made, with this hook, inside a context
        return
    state, reuse_cache = contexts[-1]
    made_in = getattr(cache, MARK, ())
    if made_in != state and not reuse_cache and columns_of(cache) != 0:
        raise ValueError(
            f"this key-value cache was made {_told(made_in)}, but the model now runs {_told(state)}; the old steering "
            "would go on through the cache. Start a new cache, or allow this with steer(…, reuse_cache=True)"
        )
    setattr(cache, MARK, state)


def _mark_cache(trunk: nn.Module, _args: tuple, output: Any) -> None:
    """Forward hook: store the current state on a cache that this forward pass created."""
    if torch.compiler.is_compiling():
        return
    cache = cache_of(output) if isinstance(output, dict) else None
    if cache is not None and _open.get(trunk):
        setattr(cache, MARK, current(trunk))


def cache_of(named: dict[str, Any]) -> Cache | None:
    """The key-value cache among the arguments or outputs of a forward pass; its name differs between versions."""
    return next((value for value in named.values() if isinstance(value, Cache)), None)


def columns_of(cache: Cache) -> int | None:
    """Number of tokens in a cache; None if it holds some but not their number, as caches of state-space models do."""
    if isinstance(cache, EncoderDecoderCache):
        return columns_of(cache.self_attention_cache)
    if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return int(cache.get_seq_length())
    return None if cache.layers and cache.has_previous_state() else 0


def _told(state: State) -> str:
    listed = ", ".join(f"{one.name} at {one.coefficient}" for one in state)
    return f"with steering by {listed}" if listed else "without steering"
