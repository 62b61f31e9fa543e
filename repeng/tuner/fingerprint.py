"""Fingerprint of a base model: a few entries of the adapted weights, compared when an adapter is loaded."""

from typing import Any

import torch
from torch import nn

from repeng.tuner.base import base_of, entries, is_linear, is_quantised, linear_shape, weight_of
from repeng.tuner.config import SvdSteeringConfig
from repeng.tuner.targets import last, linear_modules

MODULES, ENTRIES = 32, 8
SAME_SHARE = 0.9  # of entries must agree after rounding to bfloat16: two dtypes may round differently
QUANTISED_DISTANCE = 0.3  # relative distance; 4-bit quantisation changes weights by about 0.1


def take_fingerprint(model: nn.Module, names: list[str]) -> dict[str, Any]:
    """Sample up to 32 linear modules at or below `names`: `{"dtype": …, "weights": {name: [8 floats]}}`."""
    linear: dict[str, nn.Module] = {}
    for name in names:
        module = model.get_submodule(name)
        below = {name: module} if is_linear(module) else {f"{name}.{n}": m for n, m in linear_modules(module).items()}
        for key, m in below.items():
            # PEFT keeps a copy next to each module in another adapter's modules_to_save; the copy is not sampled.
            if last(key) != "lm_head" and ".modules_to_save." not in key:
                linear[key.replace(".original_module", "")] = base_of(m)
    keys = sorted(linear)
    chosen = [keys[i] for i in torch.linspace(0, len(keys) - 1, min(MODULES, len(keys))).long().tolist()]
    dtypes = {"quantised" if is_quantised(linear[key]) else str(weight_of(linear[key]).dtype) for key in chosen}
    return {"dtype": ", ".join(sorted(dtypes)), "weights": {key: _sample(linear[key]) for key in chosen}}


def _sample(linear: nn.Module) -> list[float]:
    """Eight entries along the diagonal of the weight."""
    d_in, d_out = linear_shape(linear)
    return entries(linear, *(torch.linspace(0, d - 1, ENTRIES).long() for d in (d_out, d_in))).tolist()


def require_fingerprint(config: SvdSteeringConfig) -> None:
    """Raise ValueError if an adapter's configuration has no fingerprint of its base model."""
    if config.fingerprint is None and not config.allow_other_base:
        raise ValueError(
            "this adapter's configuration has no fingerprint, so the base model cannot be checked; copy the adapter "
            "again from where it was saved, or pass allow_other_base=True to PeftModel.from_pretrained"
        )


def check_same_base(model: nn.Module, config: SvdSteeringConfig, names: list[str]) -> None:
    """Raise ValueError if the adapted weights of `model` differ from those that the adapter was made for."""
    if config.allow_other_base or not config.fingerprint:
        return
    known = config.fingerprint
    current = take_fingerprint(model, names)
    if set(current["weights"]) != set(known["weights"]):
        problem = "its adapted modules have other names"
    else:
        a, b = (torch.tensor([f["weights"][key] for key in sorted(f["weights"])]) for f in (known, current))
        if "quantised" in known["dtype"] + current["dtype"]:
            distance = ((a - b).norm() / a.norm().clamp_min(1e-12)).item()
            problem = f"sampled weights differ by {distance:.0%}" if distance > QUANTISED_DISTANCE else None
        else:
            same_dtype = known["dtype"] == current["dtype"]
            same = (a == b if same_dtype else a.bfloat16() == b.bfloat16()).float().mean().item()
            needed = 1.0 if same_dtype else SAME_SHARE
            problem = f"{1 - same:.0%} of the sampled weights differ" if same < needed else None
    if problem:
        raise ValueError(
            f"this adapter was made for another base model ({config.base_model_name_or_path or 'unnamed'}"
            f"{f', revision {config.revision}' if config.revision else ''}): {problem}. Load that model, or use "
            "the adapter on this model all the same: pass allow_other_base=True to PeftModel.from_pretrained, or set "
            "it in a configuration for add_adapter before load_adapter"
        )
