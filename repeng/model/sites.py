"""Places where hidden states are read and changed: decoder layers, the sites inside them, and hooks on both."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repeng.tuner.base import base_of, dense_weight, is_linear, linear_shape
from repeng.tuner.bypassed import bypassed
from repeng.tuner.decoder import (
    RESIDUAL,
    check_one_stream,
    find_decoder,
    is_encoder_decoder,
    last,
    linear_modules,
    matches,
)
from repeng.tuner.targets import residual_width, writers

Place = tuple[str, int]  # (site, layer)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, with or without adapters.

    Raises:
        ValueError: the layers cannot be found, or the model has an encoder that reads the prompt.
    """
    if is_encoder_decoder(model):
        raise ValueError(
            f"{type(model).__name__} reads the prompt in an encoder; steering vectors, extraction and training need a "
            "decoder-only model. An SvdSteeringConfig adapts its decoder, and steer(model, c) sets its coefficient"
        )
    return find_decoder(model).layers


def layers_of(model: nn.Module, modules: Iterable[nn.Module]) -> list[int]:
    """Indices of the decoder layers that are, or contain, some of these modules."""
    wanted = set(modules)
    return [i for i, layer in enumerate(decoder_layers(model)) if not wanted.isdisjoint(layer.modules())]


def site_modules(model: nn.Module, places: Sequence[Place]) -> list[nn.Module]:
    """The module of each (site, layer), whose output is the site; for "residual" the decoder layer itself.

    Raises:
        ValueError: the layer does not exist, or has no module or several modules of the site's name, or the module is
            never called.
    """
    layers, modules = decoder_layers(model), []
    for site, layer in places:
        if not 0 <= layer < len(layers):
            raise ValueError(f"layer {layer} does not exist; this model has layers 0 to {len(layers) - 1}")
        if site == RESIDUAL:
            check_one_stream(model)
            modules.append(layers[layer])
            continue
        matching = {name: module for name, module in layers[layer].named_modules() if matches(name, [site])}
        if len(matching) != 1:
            names = list(linear_modules(layers[layer]))
            short = [last(name) for name in names]
            others = sorted(end if short.count(end) == 1 else name for name, end in zip(names, short, strict=True))
            raise ValueError(
                f"site {site!r} matches {len(matching)} modules of layer {layer}; choose {RESIDUAL!r} or one of: "
                f"{', '.join(others)}"
            )
        for name, module in matching.items():
            reader = bypassed(layers[layer], name)
            if reader is not None:
                raise ValueError(
                    f"site {site!r} of layer {layer} has no output (at least with fused kernels), because {reader} "
                    f"reads its weight without calling it; choose {RESIDUAL!r} or another site"
                )
            modules.append(module)
    return modules


def site_module(model: nn.Module, layer: int, site: str) -> nn.Module:
    """The module whose output is `site` of decoder layer `layer`; see `site_modules`."""
    return site_modules(model, [(site, layer)])[0]


def site_widths(model: nn.Module, places: Sequence[Place]) -> list[int]:
    """Widths `d` of the outputs at these (site, layer).

    Raises:
        ValueError: as in `site_modules`, or a site is not a linear module.
    """
    widths = []
    for (site, _), module in zip(places, site_modules(model, places), strict=True):
        if site == RESIDUAL:
            widths.append(residual_width(model, module))
        elif is_linear(module):
            widths.append(linear_shape(base_of(module))[1])
        else:
            raise ValueError(f"site {site!r} is a {type(module).__name__}; choose {RESIDUAL!r} or a linear module")
    return widths


def writing_basis(model: nn.Module, layer: int, site: str) -> Tensor:
    """Left singular vectors `(d r)`, on the CPU, of the weight that writes `site`.

    For the residual stream, the weights of all modules that write to it are concatenated.
    """
    module = site_module(model, layer, site)
    if site == RESIDUAL:
        weight = torch.cat(writers(module, residual_width(model, module)), dim=1)
    else:
        weight = dense_weight(base_of(module))
    return torch.linalg.svd(weight, full_matrices=False).U.cpu()


def trunk(model: nn.Module) -> nn.Module:
    """The module that runs the decoder layers. Its hooks see tokens, mask and cache of every forward pass."""
    return model.get_submodule(find_decoder(model).name.rpartition(".")[0])


@contextmanager
def edit_outputs(edits: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Inside the context, `edit(output)` replaces each module's output tensor; a tuple keeps its other elements.

    `edit` must return a new tensor: writing in place would change tensors that other hooks have captured.
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


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside the context, dropout is off."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
