"""The decoder layers of a model, found by structure, and the linear modules inside."""

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
# What configurations call the number of decoder layers. The first two stand beside one for the encoder, and Longcat's
# num_hidden_layers counts two sublayers of each layer.
DEPTHS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "num_layers")

STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")  # what configurations call the number of residual streams


class Decoder(NamedTuple):
    """The decoder layers of a model and the full name of their list."""

    name: str
    layers: nn.ModuleList

    def available(self) -> str:
        """What could be adapted, for error messages."""
        names = sorted({last(name) for layer in self.layers for name in linear_modules(layer)})
        return f"this model has {len(self.layers)} layers with the linear modules {', '.join(names)}, and {RESIDUAL!r}"


def find_decoder(model: nn.Module, layers_pattern: list[str] | str | None = None) -> Decoder:
    """The decoder layers of a language model, adapters or not.

    Found by structure: the outermost `ModuleList` as long as the text configuration says, towers of other modalities
    and an encoder left aside; or the one whose name is, or ends in, one of `layers_pattern`.

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
            f"expected one list {what} in {type(model).__name__}, found {len(found)}; its lists of modules: "
            f"{', '.join(_outermost(lists)) or 'none'}"
        )
    return Decoder(*next(iter(found.items())))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether an encoder reads the prompt and a decoder writes beside it, as in T5, BART and Whisper."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder, or None."""
    config = getattr(model, "config", None)
    return None if config is None else config.get_text_config(decoder=True)


def check_one_stream(model: nn.Module) -> None:
    """Raise ValueError if decoder layers hand on several residual streams, which have no one direction."""
    for name in STREAMS:
        n = getattr(text_config(model), name, 1)
        if isinstance(n, int) and n > 1:
            raise ValueError(
                f"{type(model).__name__} keeps {n} residual streams side by side ({name}={n}), of which {RESIDUAL!r} "
                "steers none; choose linear modules, such as o_proj or up_proj"
            )


def _depths(config: Any) -> Iterator[int]:
    """Numbers of decoder layers that the configuration tells, the likeliest first."""
    text = config.get_text_config(decoder=True)
    for name in DEPTHS:
        depth = getattr(text, name, None)
        if isinstance(depth, int):
            yield depth


def _outermost(lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Those of the lists, in the order of the model, that lie in no other one."""
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in lists.items():
        if not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost[name] = module
    return outermost


def is_elsewhere(model: nn.Module, name: str) -> bool:
    """Whether a module is of a tower that reads images or sound, or of the encoder beside a decoder."""
    parts = name.split(".")
    if is_encoder_decoder(model):
        return next(("encoder" in part for part in parts if "coder" in part), False)
    return any(fnmatch(part, pattern) for part in parts for pattern in OTHER_MODALITIES)


def select_layers(depth: int, layers: Iterable[int] | int | str | None) -> list[int]:
    """Indices of decoder layers, from a list, one index, a share of the depth such as "0.3-0.7", or None for all.

    A layer belongs to a share if its stretch [i/depth, (i+1)/depth) of the depth overlaps it.

    Raises:
        ValueError: an index or a share outside the model, or text that is no share.
    """
    if layers is None:
        return list(range(depth))
    if isinstance(layers, str):
        match = re.fullmatch(r"\s*(\d+|\d*\.\d+)\s*-\s*(\d+|\d*\.\d+)\s*", layers)
        low, high = (float(part) for part in match.groups()) if match else (1.0, 0.0)
        if not 0 <= low < high <= 1:
            raise ValueError(f"layers {layers!r} is no share of the depth; write for example 0.3-0.7, within 0-1")
        return [i for i in range(depth) if (i + 1) / depth > low + 1e-9 and i / depth < high - 1e-9]
    chosen = [int(layers)] if isinstance(layers, int | Integral) else sorted({int(layer) for layer in layers})
    for index in chosen:
        if not 0 <= index < depth:
            raise ValueError(f"layer {index} does not exist; this model has layers 0 to {depth - 1}")
    if not chosen:
        raise ValueError("layers is empty; leave it out for all layers")
    return chosen


def linear_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Linear modules below `root` by name, adapted ones included and insides of adapters left out."""
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
