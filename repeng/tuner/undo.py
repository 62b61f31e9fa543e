"""Undo a change to a model if it fails halfway."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from repeng.tuner.layer import SvdSteeringLayer

_nested: ContextVar[bool] = ContextVar("inside all_or_nothing", default=False)


def sites_of(model: nn.Module) -> list[SvdSteeringLayer]:
    """The steering sites of a model."""
    return [module for module in model.modules() if isinstance(module, SvdSteeringLayer)]


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If the code inside the context raises, restore the modules, parameters, hooks and adapters of `model`.

    The values of tensors are not restored. A model without steering layers at the time of the error is not changed.
    """
    if _nested.get():  # the outer context restores everything
        yield
        return
    coefficients = {id(site.coefficients): site.coefficients for site in sites_of(model)}
    before = [_State(holder) for holder in (*model.modules(), *coefficients.values())]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    token = _nested.set(True)
    try:
        yield
    except BaseException:
        if sites_of(model):
            for state in before:
                state.restore()
            for parameter, requires_grad in trained:
                parameter.requires_grad = requires_grad
        raise
    finally:
        _nested.reset(token)


class _State:
    """The attributes of an object, and the contents of those that are containers."""

    def __init__(self, holder: object) -> None:
        self.attributes = vars(holder)
        self.before = dict(self.attributes)
        self.held = [(c, _held(c)) for c in self.before.values() if isinstance(c, dict | list | set)]

    def restore(self) -> None:
        _fill(self.attributes, self.before)
        for container, held in self.held:
            _fill(container, held)


def _held(container: Any) -> Iterable[Any]:
    return dict(container) if isinstance(container, dict) else list(container)


def _fill(container: Any, held: Iterable[Any]) -> None:
    """Restore the contents of a container in place, because other objects refer to it."""
    container.clear()
    container.extend(held) if isinstance(container, list) else container.update(held)
