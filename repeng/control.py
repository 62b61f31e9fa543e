"""The context manager that sets how far a model is steered."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from repeng.extract import SteeringVector
from repeng.sites import edit_outputs, site_module
from repeng.tuner import Coefficients, SvdSteeringLayer
from repeng.tuner.layer import rows_of


@contextmanager
def steer(
    model: nn.Module,
    coefficient: float | Tensor,
    vector: SteeringVector | None = None,
    adapter_name: str | None = None,
) -> Iterator[None]:
    """Steer `model` by `coefficient` inside the context: its adapters, or `vector`.

    Args:
        model: a model with steering adapters (a `PeftModel`, or a module that they were injected into); any causal
            language model if `vector` is given.
        coefficient: one number, or a `(b,)` tensor with one for each batch row; 0 is the base model exactly.
        vector: what to add, times the coefficient, to the outputs of its sites, instead of using adapters.
        adapter_name: the adapter to set; by default, every active steering adapter.

    Contexts nest; on exit, also by an exception, the state is what it was before.

    Raises:
        ValueError: no such adapter, or a coefficient of another shape.
    """
    if vector is not None:
        if adapter_name is not None:
            raise ValueError(f"vector and adapter_name={adapter_name!r} exclude each other; nest two contexts instead")
        value = torch.as_tensor(coefficient, dtype=torch.float32)
        edits = [
            (site_module(model, layer, site), addition(direction, value))
            for (site, layer), direction in vector.directions.items()
        ]
        with edit_outputs(edits if value.any() else []):
            yield
        return
    stores = coefficient_stores(model, adapter_name)
    before = [(store, store.snapshot()) for store, _ in stores]
    try:
        for store, names in stores:
            for name in names:
                store.set(name, coefficient)
        yield
    finally:
        for store, snapshot in before:
            store.restore(snapshot)


def addition(direction: Tensor, coefficient: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit that adds `coefficient · direction` to an output `(b t d)`, row by row where asked."""

    def edit(output: Tensor) -> Tensor:
        c = coefficient.to(output.device)
        if c.ndim == 1:
            c = c[rows_of(torch.arange(c.numel(), device=c.device), output)][:, None, None]
        return output + (c * direction.to(output.device)).to(output.dtype)

    return edit


def coefficient_stores(model: nn.Module, adapter_name: str | None) -> list[tuple[Coefficients, list[str]]]:
    """Every coefficient store of `model`, with the adapters to set in it."""
    names: dict[int, set[str]] = {}
    stores: dict[int, Coefficients] = {}
    available: set[str] = set()
    for layer in model.modules():
        if isinstance(layer, SvdSteeringLayer):
            if layer.merged:
                raise ValueError(
                    f"adapter {', '.join(layer.merged_adapters)} is merged into the weights, where no coefficient "
                    "reaches it; call unmerge_adapter() first"
                )
            here = set(layer.r)
            available |= here
            wanted = set(layer.active_adapters) if adapter_name is None else {adapter_name}
            stores[id(layer.coefficients)] = layer.coefficients
            names.setdefault(id(layer.coefficients), set()).update(here & wanted)
    if not any(names.values()):
        wanted_text = (
            "an active steering adapter" if adapter_name is None else f"the steering adapter {adapter_name!r}"
        )
        listed = ", ".join(sorted(available)) or "none"
        raise ValueError(
            f"{type(model).__name__} lacks {wanted_text}; it has: {listed}. "
            "Load one with PeftModel.from_pretrained, or pass vector="
        )
    return [(store, sorted(names[key])) for key, store in stores.items()]
