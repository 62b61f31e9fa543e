"""The change that an adapter makes to each weight, as two factors; every export is built from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from repeng.control.lora import lora_modules, lora_names
from repeng.control.steer import steer
from repeng.data.folders import check_new
from repeng.tuner.base import base_of
from repeng.tuner.layer import Linear, SvdSteeringLayer
from repeng.tuner.residual import Residual


class Factors(NamedTuple):
    """The change `b @ a` of the weight `(d_out d_in)` of a linear layer: `a (r d_in)`, `b (d_out r)`, float32."""

    a: Tensor
    b: Tensor


class Parts(NamedTuple):
    """LoRAs whose scales are functions of one coefficient c.

    `factors` and `scales` are by the name of the part; a scale is an expression as text: "c" or "c * c". `units` holds
    the numbers by which a positive ("plus") and a negative ("minus") c is multiplied first.
    """

    factors: dict[str, dict[str, Factors]]
    scales: dict[str, str]
    units: dict[str, float]


def active_adapter(model: nn.Module, adapter_name: str | None = None) -> str:
    """The active adapter of this name, or the only active adapter; raises ValueError if there is none or several."""
    layers = [layer for layer in model.modules() if isinstance(layer, SvdSteeringLayer)]
    names = {name for layer in layers for name in layer.active_adapters if name in layer.r} | lora_names(model)
    listed = ", ".join(sorted(names)) or "none"
    if adapter_name is None and len(names) != 1:
        raise ValueError(f"adapter_name must say which adapter to export; the active adapters are: {listed}")
    (name,) = names if adapter_name is None else (adapter_name,)
    if name not in names:
        raise ValueError(f"there is no active adapter {name!r}; the active adapters are: {listed}")
    return name


def adapter_to_export(model: nn.Module, adapter_name: str | None = None) -> str:
    """The active adapter of this name, or the only active adapter.

    Raises:
        ValueError: there is none, there are several, or the adapter has a part that is not a low-rank change of a
            weight.
    """
    name = active_adapter(model, adapter_name)
    for layer in model.modules():
        if isinstance(layer, Residual) and name in layer.r:
            _refuse_residual(layer, name)
    for place, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and name in module.active_adapters:
            raise ValueError(f"adapter {name!r} has a trained copy of {place}, which a LoRA cannot hold")
        if isinstance(module, LoraLayer) and module.lora_bias.get(name):
            raise ValueError(f"adapter {name!r} has a bias at {place}, which cannot be exported")
    return name


def new_places(path: str | Path, coefficient: float | Sequence[float], ending: str = "") -> list[tuple[float, Path]]:
    """Each coefficient with the path of its export: `path` for a single number, paths inside `path` for a sequence.

    Raises:
        ValueError: there is no coefficient, or two of them would have the same path.
        FileExistsError: a path already exists.
    """
    if isinstance(coefficient, Sequence):
        wanted = [float(c) for c in coefficient]
        places = [Path(path) / f"c{c:+g}{ending}" for c in wanted]
    else:
        wanted, places = [float(coefficient)], [Path(path)]
    if not wanted or len(set(places)) != len(wanted):
        raise ValueError(f"give at least one coefficient, and each once (six digits count); got {wanted}")
    for place in places:
        check_new(place)
    return list(zip(wanted, places, strict=True))


def _refuse_residual(layer: Residual, name: str) -> None:
    if name in layer.svd_steering_in:
        raise ValueError(
            f"adapter {name!r} rotates the residual stream. This is not a change of a weight, so no LoRA and no "
            "merged model can hold it. Train on residual-writers instead, or on other linear sites"
        )
    raise ValueError(
        f"adapter {name!r} shifts the residual stream, which is not a change of a weight. It is a steering vector: "
        "get it with repeng.export.vector_of(model), and write it with its save or save_gguf"
    )


@torch.no_grad()
def factors_at(model: nn.Module, coefficient: float, adapter_name: str) -> dict[str, Factors]:
    """The change that an adapter adds to each weight at a coefficient, by the module's name in the base model.

    Raises:
        ValueError: a part of the adapter is not a pair of matrices.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found: dict[str, Factors] = {}
    lora_modules(model, adapter_name)  # raises if the adapter has a part that a coefficient does not scale
    with steer(model, coefficient, adapter_name=adapter_name):
        for name, module in base.named_modules():
            if isinstance(module, Linear) and adapter_name in module.r:
                u, v = (store[adapter_name].float() for store in (module.svd_steering_u, module.svd_steering_v))
                found[name] = Factors(v.mT.cpu().contiguous(), (u @ module.single_core(adapter_name)).cpu())
            elif isinstance(module, LoraLayer) and adapter_name in module.lora_A:
                a, b = (
                    cast(Tensor, store[adapter_name].weight).detach().float()
                    for store in (module.lora_A, module.lora_B)
                )
                if a.ndim != 2:
                    kind = type(base_of(module)).__name__
                    raise ValueError(f"{name} is a {kind}; only linear layers can be exported")
                found[name] = Factors(a.cpu(), (b * module.scaling[adapter_name] * coefficient).cpu())
    return found


def parts_of(model: nn.Module, adapter_name: str) -> Parts:
    """Split an adapter into an odd LoRA, scaled by c, and an even LoRA, scaled by c²; a zero even part is left out.

    The odd part is half the difference between the adapter's changes at +1 and at −1; the even part is half their sum.
    Together they are exact at −1, 0 and 1, and approximate in between.
    """
    calibration: Any = getattr(getattr(model, "peft_config", {}).get(adapter_name), "calibration", None) or {}
    units = {arm: float(calibration.get(arm, 1.0)) for arm in ("plus", "minus")}
    plus, minus = (factors_at(model, c, adapter_name) for c in (1 / units["plus"], -1 / units["minus"]))
    factors = {
        part: {key: Factors(one.a, (one.b + sign * minus[key].b) / 2) for key, one in plus.items()}
        for part, sign in (("odd", -1.0), ("even", 1.0))
    }
    scales = {"odd": "c", "even": "c * c"}
    if not any(one.b.any() for one in factors["even"].values()):
        del factors["even"], scales["even"]
    return Parts(factors, scales, units)


def of_one_rank(factors: Mapping[str, Factors], adapter_name: str) -> dict[str, Factors]:
    """The same changes, padded with zeros to the largest rank, so all have the same rank `r`.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    r = max(one.a.shape[0] for one in factors.values())
    padded = {}
    for module, one in factors.items():
        missing = r - one.a.shape[0]
        a = torch.nn.functional.pad(one.a, (0, 0, 0, missing)).contiguous()
        padded[module] = Factors(a, torch.nn.functional.pad(one.b, (0, missing)).contiguous())
    if not all(tensor.isfinite().all() for one in padded.values() for tensor in one):
        raise ValueError(f"adapter {adapter_name!r} gives NaN or infinite weights; the adapter seems to be broken")
    return padded
