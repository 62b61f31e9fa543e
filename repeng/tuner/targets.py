"""From what a configuration asks for to full names of modules; every request that matches nothing is an error."""

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from numbers import Integral
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from repeng.tuner.base import base_of, dense_weight, is_linear, linear_shape, weight_of
from repeng.tuner.config import SvdSteeringConfig

RESIDUAL = "residual"
ALL_LINEAR = "all-linear"
# What each group stands for: Llama and its heirs, Phi-3, GPT-2, GPT-NeoX, OPT, GPT-J, MPT, Qwen3-Next, DeepSeek.
GROUPS: dict[str, tuple[str, ...]] = {
    "residual-writers": ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "out_proj", "fc2", "fc_out"),
    "residual-readers": (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "up_proj", "gate_proj", "gate_up_proj"),
        *("c_attn", "c_fc", "query_key_value", "dense_h_to_4h", "fc1", "fc_in", "Wqkv", "in_proj_qkvz", "in_proj_ba"),
        *("q_a_proj", "kv_a_proj_with_mqa"),
    ),
    "kv": ("k_proj", "v_proj"),
}
OTHER_MODALITIES = ("*vision*", "*visual*", "*image*", "*audio*", "*speech*")


class Decoder(NamedTuple):
    """The decoder layers of a model and the full name of their list."""

    name: str
    layers: nn.ModuleList

    def available(self) -> str:
        """What could be adapted, for error messages."""
        names = sorted({last(name) for layer in self.layers for name in linear_modules(layer)})
        return f"this model has {len(self.layers)} layers with the linear modules {', '.join(names)}, and {RESIDUAL!r}"


def find_decoder(model: nn.Module, layers_pattern: list[str] | str | None = None) -> Decoder:
    """The decoder layers of a causal language model, adapters or not.

    Found by structure: the outermost `ModuleList` as long as the text configuration's `num_hidden_layers`, towers of
    other modalities left aside; or the one whose name is, or ends in, one of `layers_pattern`.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    model_config = getattr(model, "config", None)
    if patterns:
        what = f"called {' or '.join(map(repr, patterns))}"
        lists_here = {name: module for name, module in lists.items() if matches(name, patterns)}
    elif model_config is None:
        raise ValueError(
            f"{type(model).__name__} has no config that tells its number of decoder layers; name their list with "
            f"layers_pattern: {', '.join(lists) or 'this model has no list of modules'}"
        )
    else:
        n = model_config.get_text_config(decoder=True).num_hidden_layers
        what = f"of {n} decoder layers"
        lists_here = {name: m for name, m in lists.items() if len(m) == n and not _is_other_modality(name)}
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in lists_here.items():
        if not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost[name] = module
    if len(outermost) != 1:
        raise ValueError(
            f"expected one list {what} in {type(model).__name__}, found {len(outermost)}; name it with "
            f"layers_pattern: {', '.join(lists) or 'this model has no list of modules'}"
        )
    return Decoder(*next(iter(outermost.items())))


def _is_other_modality(name: str) -> bool:
    return any(fnmatch(part, pattern) for part in name.split(".") for pattern in OTHER_MODALITIES)


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
        if any(name.startswith(f"{outer}.") for outer in wrapped):
            continue
        if name and is_linear(module):
            linear[name] = module
        if isinstance(module, BaseTunerLayer):
            wrapped.append(name)
    return linear


def last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _fused_experts(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters of a decoder layer that hold the weights of all experts at once, `(experts … …)`, by name."""
    return {n: p for n, p in layer.named_parameters() if p.ndim == 3 and last(n) not in ("weight", "bias")}


def residual_width(layer: nn.Module) -> int:
    """Width of the residual stream: what the linear modules that write to it put out.

    Raises:
        ValueError: the decoder layer has none.
    """
    names, linear = GROUPS["residual-writers"], linear_modules(layer)
    for name, module in linear.items():
        if last(name) in names:
            return linear_shape(base_of(module))[1]
    raise ValueError(
        f"a {type(layer).__name__} has none of the modules {', '.join(names)}, which would span the directions of "
        f"{RESIDUAL!r}; adapt linear modules instead: {', '.join(sorted(map(last, linear)))}"
    )


def writers(layer: nn.Module) -> list[Tensor]:
    """Weights `(width …)` in float32 that write to the residual stream in this layer, fused experts included."""
    names, width = GROUPS["residual-writers"], residual_width(layer)
    weights = [dense_weight(base_of(m)) for name, m in linear_modules(layer).items() if last(name) in names]
    for name, weight in _fused_experts(layer).items():
        if last(name) in names:
            weight = weight.detach().float()
            by_input = weight.mT if weight.shape[1] == width else weight  # (experts … width)
            weights.append(by_input.flatten(0, 1).mT)
    return [weight for weight in weights if weight.shape[0] == width]


def resolve(model: nn.Module, config: SvdSteeringConfig) -> list[str]:
    """Full names of the modules to adapt, in the order of the model; a decoder layer's own name means its residual.

    Raises:
        ValueError: naming the (layer, site) without a match, a module that cannot be adapted, a rank above a weight's,
            and what the model has instead.
    """
    decoder = find_decoder(model, config.layers_pattern)
    if isinstance(config.target_modules, str):
        wanted = _by_expression(model, decoder, config.target_modules)
    elif config.target_modules:
        wanted = {name for target in config.target_modules for name in _by_name(model, decoder, target, config)}
    else:
        raise ValueError(f"target_modules is empty; {decoder.available()}")
    wanted -= _excluded(model, wanted, config.exclude_modules)
    for name in sorted(wanted):
        parents = [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)]
        for saved in config.modules_to_save or ():
            if any(matches(parent, [saved]) for parent in parents):
                raise ValueError(f"{name!r} is a target and in modules_to_save, as {saved!r}; choose one")
    if not wanted:
        raise ValueError(
            f"nothing is left of target_modules={_texts(config.target_modules)} after "
            f"exclude_modules={_texts(config.exclude_modules)}"
        )
    _check_targets(model, config, wanted)
    return [name for name, _ in model.named_modules() if name in wanted]


def _excluded(model: nn.Module, wanted: set[str], patterns: Iterable[str] | str | None) -> set[str]:
    """Those of `wanted` that exclude_modules covers; raises ValueError for an entry that covers none."""
    if isinstance(patterns, str):
        patterns = [patterns]
        by_pattern = {patterns[0]: {name for name in wanted if re.fullmatch(patterns[0], name)}}
    else:
        by_pattern = {
            pattern: {
                name
                for name in wanted
                if (_is_called(name, pattern) if is_linear(model.get_submodule(name)) else pattern in (RESIDUAL, name))
            }
            for pattern in patterns or ()
        }
    for pattern, covered in by_pattern.items():
        if not covered:
            raise ValueError(f"exclude_modules {pattern!r} covers none of the targets: {_texts(wanted)}")
    return set().union(*by_pattern.values())


def _by_expression(model: nn.Module, decoder: Decoder, expression: str) -> set[str]:
    """Linear modules and decoder layers whose full name matches."""
    candidates = [*linear_modules(model), *(f"{decoder.name}.{i}" for i in range(len(decoder.layers)))]
    matched = {name for name in candidates if re.fullmatch(expression, name) and not _is_other_modality(name)}
    if not matched:
        others = [name for name, _ in model.named_modules() if re.fullmatch(expression, name)]
        raise ValueError(
            f"the regular expression target_modules={expression!r} matches no linear module and no decoder layer"
            f"{f' (but {others[0]!r}, which cannot be adapted)' if others else ''}; {decoder.available()}"
        )
    return matched


def _by_name(model: nn.Module, decoder: Decoder, target: str, config: SvdSteeringConfig) -> set[str]:
    """Modules that one entry of target_modules stands for: at least one in every selected layer, or one full name."""
    prefix, layers = decoder
    indices = select_layers(len(layers), config.layers_to_transform)
    if target == RESIDUAL:
        return {f"{prefix}.{i}" for i in indices}
    everywhere = {name for name in linear_modules(model) if not _is_other_modality(name)}
    if target in everywhere:
        return {target}
    matched: set[str] = set()
    missing: list[int] = []
    for i in indices:
        in_layer = {name for name in linear_modules(layers[i]) if _is_called(name, target)}
        matched |= {f"{prefix}.{i}.{name}" for name in in_layer}
        fused = [name for name in _fused_experts(layers[i]) if _is_called(name, target)]
        if fused:
            raise ValueError(
                f"{target!r} takes in {prefix}.{i}.{fused[0]}, all experts in one tensor of shape "
                f"{tuple(layers[i].get_parameter(fused[0]).shape)}, which cannot be adapted one by one; adapt "
                f"{RESIDUAL!r} or, by name, {', '.join(sorted({last(n) for n in linear_modules(layers[i])}))}"
            )
        if not in_layer:
            missing.append(i)
    outside = {name for name in everywhere if _is_called(name, target) and not name.startswith(f"{prefix}.")}
    if outside and not matched and config.layers_to_transform is None:
        return outside
    if missing:
        whole = f"layers {missing[0]}–{missing[-1]}" if len(missing) > 1 else f"layer {missing[0]}"
        others = [name for name, _ in layers[missing[0]].named_modules() if _is_called(name, target)]
        raise ValueError(
            f"target_modules {target!r} matches no linear module in {whole} ({len(missing)} of {len(indices)} layers)"
            f"{f' (but {others[0]!r}, which cannot be adapted)' if others else ''}; {decoder.available()}"
        )
    return matched


def _is_called(name: str, target: str) -> bool:
    """Whether `target`, a group or the end of a name, stands for the module of this name."""
    if target == ALL_LINEAR:
        return last(name) != "lm_head"
    if target in GROUPS:
        return last(name) in GROUPS[target]
    return matches(name, [target])


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` is, or ends in, one of the patterns."""
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _check_targets(model: nn.Module, config: SvdSteeringConfig, wanted: set[str]) -> None:
    """Raise ValueError for a tied weight, a site with nothing to learn, or a rank that a weight does not have."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    tied = getattr(embeddings, "weight", None)
    for name in sorted(wanted):
        module = base_of(model.get_submodule(name))
        parts = ("rotate_input", "rotate_output", "scale" if is_linear(module) else "shift")
        if not any(getattr(config, part) for part in parts):
            raise ValueError(f"nothing to learn at {name!r}: set at least one of {', '.join(parts)}")
        if is_linear(module) and tied is not None and weight_of(module) is tied:
            raise ValueError(
                f"{name!r} shares its weight with the input embeddings, which would change too; leave it out"
            )
        limit = max_rank(model, name)
        if config.r > limit:
            raise ValueError(f"r={config.r} is above the rank of {name!r}, which is at most {limit}; give r ≤ {limit}")


def max_rank(model: nn.Module, name: str) -> int:
    """The largest `r` for the module of this full name: the smaller side of a weight, a decoder layer's width."""
    module = base_of(model.get_submodule(name))
    return min(linear_shape(module)) if is_linear(module) else residual_width(module)


def _texts(targets: Iterable[str] | str | None) -> str:
    return repr(targets) if isinstance(targets, str) or targets is None else ", ".join(map(repr, sorted(targets)))
