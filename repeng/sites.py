"""Where hidden states are read and changed: decoder layers, the sites inside them, and hooks on both."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

RESIDUAL = "residual"
LINEAR_SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, adapters or not.

    Found by structure: the one `ModuleList` as long as the text configuration's `num_hidden_layers`.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    config = model.config.get_text_config(decoder=True)
    n = config.num_hidden_layers
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n]
    if len(found) != 1:
        raise ValueError(
            f"expected one list of {n} decoder layers in {type(model).__name__}, found {len(found)}; "
            "pass the text decoder of a larger model"
        )
    return found[0]


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
            f"{', '.join(linear_names(layers[layer]))}"
        )
    return found[0]


def linear_names(module: nn.Module) -> list[str]:
    """Last parts of the names of the linear modules below `module`, those that an adapter wraps included."""
    names = {name.split(".base_layer")[0] for name, child in module.named_modules() if is_linear(child)}
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | BaseTunerLayer) or type(module).__name__ == "Conv1D"


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
