"""Where hidden states are read and changed: decoder layers, the sites inside them, and hooks on both."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from repeng.tuner import targets

RESIDUAL = targets.RESIDUAL


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, adapters or not.

    Raises:
        ValueError: they cannot be found.
    """
    return targets.find_decoder(model).layers


def site_module(model: nn.Module, layer: int, site: str) -> nn.Module:
    """The module whose output is `site` of decoder layer `layer`: the layer itself for "residual".

    Raises:
        ValueError: no such layer, or the layer has no single module of that name.
    """
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer {layer} does not exist; this model has layers 0 to {len(layers) - 1}")
    if site == RESIDUAL:
        return layers[layer]
    found = [module for name, module in layers[layer].named_modules() if name.rsplit(".", 1)[-1] == site]
    if len(found) != 1:
        raise ValueError(
            f"site {site!r} names {len(found)} modules of layer {layer}; choose {RESIDUAL!r} or one of: "
            f"{', '.join(sorted(set(map(targets.last, targets.linear_modules(layers[layer])))))}"
        )
    return found[0]


@contextmanager
def edit_outputs(edits: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Inside the context, each module's output tensor becomes `edit(output)`; a tuple keeps its other parts.

    `edit` must return a new tensor: writing in place would change tensors that others have captured.
    """

    def hook_for(edit: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            return edit(output)

        return hook

    with ExitStack() as stack:
        for module, edit in edits:
            stack.callback(module.register_forward_hook(hook_for(edit)).remove)
        yield


@contextmanager
def capture(modules: Sequence[nn.Module]) -> Iterator[list[Tensor | None]]:
    """Inside the context, the yielded list holds the latest output `(b t d)` of each module, with its graph."""
    outputs: list[Tensor | None] = [None] * len(modules)

    def keep(index: int) -> Callable[[Tensor], Tensor]:
        def store(output: Tensor) -> Tensor:
            outputs[index] = output
            return output

        return store

    with edit_outputs([(module, keep(index)) for index, module in enumerate(modules)]):
        yield outputs
