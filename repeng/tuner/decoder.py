"""Find the decoder layers of a model by its structure, and the linear modules in them."""

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from numbers import Integral
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from repeng.tuner.base import is_linear

RESIDUAL = "residual"
OTHER_MODALITIES = ("*vision*", "*visual*", "*image*", "*audio*", "*speech*")
# Names of the number of decoder layers in configurations. The first two are used beside a number of encoder layers.
# Longcat's num_hidden_layers counts two sublayers per layer, so num_layers is tried too.
DEPTHS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "num_layers")

STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")  # names of the number of residual streams in configurations


class Decoder(NamedTuple):
    """The decoder layers of a model and the full name of their list."""

    name: str
    layers: nn.ModuleList

    def available(self) -> str:
        """The modules that could be adapted, for error messages."""
        names = sorted({last(name) for layer in self.layers for name in linear_modules(layer)})
        return f"this model has {len(self.layers)} layers with the linear modules {', '.join(names)}, and {RESIDUAL!r}"


def find_decoder(model: nn.Module, layers_pattern: list[str] | str | None = None) -> Decoder:
    """Find the decoder layers of a language model, with or without adapters.

    The result is the outermost `ModuleList` whose length is the number of layers in the text configuration. Towers of
    other modalities and an encoder are skipped. With `layers_pattern`, the result is instead the list whose name is,
    or ends in, one of the patterns.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if patterns:
        what = f"called {' or '.join(map(repr, patterns))}"
        found = _outermost({name: module for name, module in lists.items() if matches(name, patterns)})
    elif getattr(model, "config", None) is None:
        what, found = "of decoder layers", {}
    else:
        depths = list(_depths(model.config))
        what = f"of {' or '.join(map(str, dict.fromkeys(depths)))} decoder layers"
        own = {name: m for name, m in lists.items() if not is_elsewhere(model, name)}
        by_depth = (_outermost({name: m for name, m in own.items() if len(m) == depth}) for depth in depths)
        found = next((lists_here for lists_here in by_depth if lists_here), {})
    if len(found) != 1:
        raise ValueError(
            f"expected one list {what} in {type(model).__name__}, found {len(found)}; its lists of modules are: "
            f"{', '.join(_outermost(lists)) or 'none'}"
        )
    return Decoder(*next(iter(found.items())))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether an encoder reads the prompt and a separate decoder writes, as in T5, BART and Whisper."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder, or None."""
    config = getattr(model, "config", None)
    return None if config is None else config.get_text_config(decoder=True)


def check_one_stream(model: nn.Module) -> None:
    """Raise ValueError if the decoder layers pass on several residual streams, where no single direction exists."""
    for name in STREAMS:
        n = getattr(text_config(model), name, 1)
        if isinstance(n, int) and n > 1:
            raise ValueError(
                f"{type(model).__name__} has {n} parallel residual streams ({name}={n}), which {RESIDUAL!r} cannot "
                "steer; choose linear modules, such as o_proj or up_proj"
            )


def _depths(config: Any) -> Iterator[int]:
    """Candidates for the number of decoder layers from the configuration, the likeliest first."""
    text = config.get_text_config(decoder=True)
    for name in DEPTHS:
        depth = getattr(text, name, None)
        if isinstance(depth, int):
            yield depth


def _outermost(lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """The lists that are not inside another of the lists, in the order of the model."""
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in lists.items():
        if not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost[name] = module
    return outermost


def is_elsewhere(model: nn.Module, name: str) -> bool:
    """Whether a module is in a tower that reads images or sound, or in the encoder of an encoder-decoder model."""
    parts = name.split(".")
    if is_encoder_decoder(model):
        return next(("encoder" in part for part in parts if "coder" in part), False)
    return any(fnmatch(part, pattern) for part in parts for pattern in OTHER_MODALITIES)


def select_layers(depth: int, layers: Iterable[int] | int | str | None) -> list[int]:
    """Indices of decoder layers from a list, a single index, a range of the depth such as "0.3-0.7", or None for all.

    A range selects every layer i whose interval [i/depth, (i+1)/depth) overlaps it.

    Raises:
        ValueError: an index or a range lies outside the model, or the text is not a range.
    """
    if layers is None:
        return list(range(depth))
    if isinstance(layers, str):
        match = re.fullmatch(r"\s*(\d+|\d*\.\d+)\s*-\s*(\d+|\d*\.\d+)\s*", layers)
        low, high = (float(part) for part in match.groups()) if match else (1.0, 0.0)
        if not 0 <= low < high <= 1:
            raise ValueError(f"layers {layers!r} is not a share of the depth; write for example 0.3-0.7, within 0-1")
        return [i for i in range(depth) if (i + 1) / depth > low + 1e-9 and i / depth < high - 1e-9]
    chosen = [int(layers)] if isinstance(layers, int | Integral) else sorted({int(layer) for layer in layers})
    for index in chosen:
        if not 0 <= index < depth:
            raise ValueError(f"layer {index} does not exist; this model has layers 0 to {depth - 1}")
    if not chosen:
        raise ValueError("layers is empty; leave it out for all layers")
    return chosen


def linear_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Linear modules below `root` by name. Adapted modules are included; modules inside adapters are not."""
    linear: dict[str, nn.Module] = {}
    wrapped: list[str] = []
    for name, module in root.named_modules():
        if any(name.startswith(f"{outer}.") for outer in wrapped) or "modules_to_save" in name.split("."):
            continue
        if name and is_linear(module):
            linear[name] = module
        if isinstance(module, BaseTunerLayer):
            wrapped.append(name)
    return linear


def last(name: str) -> str:
    """The last part of a module's name."""
    return name.rsplit(".", 1)[-1]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` is, or ends in, one of the patterns."""
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)
