"""Resolve the targets of a configuration to full module names. A target that matches nothing is an error."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from repeng.tuner.base import base_of, dense_weight, is_linear, linear_shape, weight_of
from repeng.tuner.bypassed import bypassed
from repeng.tuner.config import SvdSteeringConfig
from repeng.tuner.decoder import (
    RESIDUAL,
    Decoder,
    check_one_stream,
    find_decoder,
    is_elsewhere,
    last,
    linear_modules,
    matches,
    select_layers,
    text_config,
)
from repeng.tuner.groups import GROUPS, WRITERS, fused_experts, is_called, role_of, unknown, writer_names


def residual_width(model: nn.Module, layer: nn.Module) -> int:
    """Width of the residual stream, from the configuration, or else from a module that writes to the stream.

    Raises:
        ValueError: neither gives the width.
    """
    width = getattr(text_config(model), "hidden_size", None)
    if isinstance(width, int):
        return width
    for name, module in linear_modules(layer).items():
        if role_of(name) == "writes":
            return linear_shape(base_of(module))[1]
    raise ValueError(
        f"a {type(layer).__name__} has none of {WRITERS!r}, so the width of {RESIDUAL!r} is not known; adapt "
        f"linear modules instead: {', '.join(sorted(map(last, linear_modules(layer))))}"
    )


@torch.no_grad()
def writers(layer: nn.Module, width: int | None = None) -> list[Tensor]:
    """Weights `(width …)`, float32, that write to the residual stream in this layer, including fused experts.

    The default of `width` is the output width of the first linear module that writes to the stream.

    Raises:
        ValueError: see `writer_names`.
    """
    linear, fused = linear_modules(layer), fused_experts(layer)
    if width is None:
        width = next((linear_shape(base_of(m))[1] for name, m in linear.items() if role_of(name) == "writes"), 0)
    weights = []
    for name in writer_names(layer, width):
        if name in linear:
            weights.append(dense_weight(base_of(linear[name])))
        else:
            weight = fused[name].detach().float()
            by_input = weight.mT if weight.ndim == 3 and weight.shape[1] == width else weight  # (… width)
            weights.append(by_input.flatten(0, -2).mT)
    return [weight for weight in weights if weight.shape[0] == width]


def resolve(model: nn.Module, config: SvdSteeringConfig) -> list[str]:
    """Full names of the modules to adapt, in the order of the model. A decoder layer's name stands for its residual.

    Raises:
        ValueError: a (layer, site) has no match, a module cannot be adapted, or the rank is too high for a weight. The
            message names it and the modules that the model has.
    """
    try:
        decoder = find_decoder(model, config.layers_pattern)
    except ValueError as error:
        raise ValueError(f"{error}; name the right one with layers_pattern") from error
    if isinstance(config.target_modules, str):
        wanted = _by_expression(model, decoder, config.target_modules)
    elif config.target_modules:
        wanted = {name for target in config.target_modules for name in _by_name(model, decoder, target, config)}
    else:
        raise ValueError(f"target_modules is empty; {decoder.available()}")
    wanted -= _excluded(model, decoder, wanted, config.exclude_modules)
    for name in sorted(wanted):
        parents = [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)]
        for saved in config.modules_to_save or ():
            if any(matches(parent, [saved]) for parent in parents):
                raise ValueError(f"{name!r} is both a target and in modules_to_save, as {saved!r}; choose one")
    if not wanted:
        raise ValueError(
            f"nothing is left of target_modules={_texts(config.target_modules)} after "
            f"exclude_modules={_texts(config.exclude_modules)}"
        )
    _check_targets(model, config, wanted)
    return [name for name, _ in model.named_modules() if name in wanted]


def _excluded(model: nn.Module, decoder: Decoder, wanted: set[str], patterns: Iterable[str] | str | None) -> set[str]:
    """The names in `wanted` that exclude_modules covers; raises ValueError for an entry that covers none."""
    if isinstance(patterns, str):
        patterns = [patterns]
        by_pattern = {patterns[0]: {name for name in wanted if re.fullmatch(patterns[0], name)}}
    else:
        by_pattern = {
            pattern: {
                name
                for name in wanted
                if (
                    is_called(_in_layer(decoder, name), pattern) or matches(name, [pattern])
                    if is_linear(model.get_submodule(name))
                    else pattern in (RESIDUAL, name)
                )
            }
            for pattern in patterns or ()
        }
    for pattern, covered in by_pattern.items():
        if not covered:
            raise ValueError(f"exclude_modules {pattern!r} covers none of the targets: {_texts(wanted)}")
    return set().union(*by_pattern.values())


def _by_expression(model: nn.Module, decoder: Decoder, expression: str) -> set[str]:
    """Linear modules and decoder layers whose full names match the regular expression."""
    candidates = [*linear_modules(model), *(f"{decoder.name}.{i}" for i in range(len(decoder.layers)))]
    matched = {name for name in candidates if re.fullmatch(expression, name) and not is_elsewhere(model, name)}
    if not matched:
        others = [name for name, _ in model.named_modules() if re.fullmatch(expression, name)]
        raise ValueError(
            f"the regular expression target_modules={expression!r} matches no linear module and no decoder layer"
            f"{f' (but {others[0]!r}, which cannot be adapted)' if others else ''}; {decoder.available()}"
        )
    return matched


def _by_name(model: nn.Module, decoder: Decoder, target: str, config: SvdSteeringConfig) -> set[str]:
    """The modules that an entry of target_modules names: at least one per selected layer, or one by its full name."""
    prefix, layers = decoder
    indices = select_layers(len(layers), config.layers_to_transform)
    if target == RESIDUAL:
        return {f"{prefix}.{i}" for i in indices}
    everywhere = {name for name in linear_modules(model) if not is_elsewhere(model, name)}
    if target in everywhere:
        return {target}
    matched: set[str] = set()
    missing: list[int] = []
    for i in indices:
        in_layer = {name for name in linear_modules(layers[i]) if is_called(name, target)}
        matched |= {f"{prefix}.{i}.{name}" for name in in_layer}
        _check_group(model, decoder, i, target, config.exclude_modules)
        fused = {name: weight for name, weight in fused_experts(layers[i]).items() if is_called(name, target)}
        if fused:
            name, weight = next(iter(fused.items()))
            raise ValueError(
                f"{target!r} includes {prefix}.{i}.{name}, which holds all experts in one tensor of shape "
                f"{tuple(weight.shape)}, and single experts of it cannot be adapted; adapt "
                f"{RESIDUAL!r} or, by name, {', '.join(sorted({last(n) for n in linear_modules(layers[i])}))}"
            )
        if not in_layer:
            missing.append(i)
    outside = {name for name in everywhere if is_called(name, target) and not name.startswith(f"{prefix}.")}
    if outside and not matched and config.layers_to_transform is None and target not in GROUPS:
        return outside
    if missing:
        whole = f"layers {missing[0]}–{missing[-1]}" if len(missing) > 1 else f"layer {missing[0]}"
        others = [name for name, _ in layers[missing[0]].named_modules() if is_called(name, target)]
        raise ValueError(
            f"target_modules {target!r} matches no linear module in {whole} ({len(missing)} of {len(indices)} layers)"
            f"{f' (but {others[0]!r}, which cannot be adapted)' if others else ''}; {decoder.available()}"
        )
    return matched


def _in_layer(decoder: Decoder, name: str) -> str:
    """The name relative to its decoder layer, or the full name if the module is in no decoder layer."""
    return re.sub(rf"^{re.escape(decoder.name)}\.\d+\.", "", name)


def _check_group(
    model: nn.Module, decoder: Decoder, index: int, target: str, excluded: Iterable[str] | str | None
) -> None:
    """Raise ValueError if a layer has a linear module for which it is unknown whether it belongs to the group."""
    if target not in GROUPS:
        return
    layer = decoder.layers[index]
    patterns = [] if excluded is None or isinstance(excluded, str) else list(excluded)
    others = [name for name in unknown(layer, residual_width(model, layer)) if not matches(name, patterns)]
    if others:
        raise ValueError(
            f"{target!r} is ambiguous, because the role of {', '.join(others)} in layer {index} is unknown; name the "
            f"target modules instead, or leave these out: exclude_modules={sorted(map(last, others))}"
        )


def _check_targets(model: nn.Module, config: SvdSteeringConfig, wanted: set[str]) -> None:
    """Raise ValueError for a site where an adapter has no effect, has nothing to learn or has too high a rank."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name in sorted(wanted):
        module = base_of(model.get_submodule(name))
        parts = ("rotate_input", "rotate_output", "scale" if is_linear(module) else "shift")
        if not any(getattr(config, part) for part in parts):
            raise ValueError(f"nothing to learn at {name!r}: set at least one of {', '.join(parts)}")
        if is_linear(module):
            others = [
                other for other in owners.get(id(weight_of(module)), ()) if model.get_submodule(other) is not module
            ]
            if others:
                raise ValueError(
                    f"{name!r} shares its weight with {', '.join(others)}, which a merge would change too; leave "
                    f"{name!r} out, for example with exclude_modules"
                )
        else:
            check_one_stream(model)
            if config.turns:
                writer_names(module, residual_width(model, module))
        limit = max_rank(model, name)
        if config.r > limit:
            raise ValueError(f"r={config.r} is above the largest rank of {name!r}, {limit}; give r ≤ {limit}")
    check_acting(model, wanted)


def check_acting(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError for a module in `names` whose weight is read without calling it: an adapter is idle there."""
    readers = {name: bypassed(model, name) for name in sorted(names)}
    idle = {name: reader for name, reader in readers.items() if reader is not None}
    if idle:
        name, reader = next(iter(idle.items()))
        raise ValueError(
            f"an adapter at {name!r} would have no effect, always or in fused kernels, because {reader} reads the "
            f"weight without calling the module; leave it out: exclude_modules={sorted({last(name) for name in idle})}"
        )


def max_rank(model: nn.Module, name: str) -> int:
    """The largest `r` for a module: the smaller side of its weight, or the width of a decoder layer."""
    module = base_of(model.get_submodule(name))
    return min(linear_shape(module)) if is_linear(module) else residual_width(model, module)


def _texts(targets: Iterable[str] | str | None) -> str:
    return repr(targets) if isinstance(targets, str) or targets is None else ", ".join(map(repr, sorted(targets)))
