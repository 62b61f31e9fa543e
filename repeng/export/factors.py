"""The change that an adapter makes to each weight, as two factors: what every export is made of."""

from pathlib import Path
from typing import NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from repeng.control.lora import lora_modules, lora_names
from repeng.control.steer import steer
from repeng.tuner.base import base_of
from repeng.tuner.layer import Linear, SvdSteeringLayer
from repeng.tuner.residual import Residual


class Factors(NamedTuple):
    """`b @ a` is added to the weight `(d_out d_in)` of one linear layer: `a (r d_in)`, `b (d_out r)`, float32."""

    a: Tensor
    b: Tensor


def active_adapter(model: nn.Module, adapter_name: str | None = None) -> str:
    """The active adapter of this name, or the only one; raises ValueError if there is none, or several."""
    layers = [layer for layer in model.modules() if isinstance(layer, SvdSteeringLayer)]
    names = {name for layer in layers for name in layer.active_adapters if name in layer.r} | lora_names(model)
    listed = ", ".join(sorted(names)) or "none"
    if adapter_name is None and len(names) != 1:
        raise ValueError(f"adapter_name must say which adapter to export; active are: {listed}")
    (name,) = names if adapter_name is None else (adapter_name,)
    if name not in names:
        raise ValueError(f"there is no active adapter {name!r}; active are: {listed}")
    return name


def adapter_to_export(model: nn.Module, adapter_name: str | None = None) -> str:
    """The adapter of this name, or the only active one.

    Raises:
        ValueError: there is none, there are several, or it has a part that is no change of a weight by two matrices.
    """
    name = active_adapter(model, adapter_name)
    for layer in model.modules():
        if isinstance(layer, Residual) and name in layer.r:
            _refuse_residual(layer, name)
    for place, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and name in module.active_adapters:
            raise ValueError(f"adapter {name!r} has a module of its own in place of {place}, which no LoRA holds")
        if isinstance(module, LoraLayer) and module.lora_bias.get(name):
            raise ValueError(f"adapter {name!r} has a bias beside its matrices at {place}, which is not exported")
    return name


def check_new(folder: str | Path) -> None:
    """Raise FileExistsError if something lies at the place of an export."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; an export gets a folder of its own")


def _refuse_residual(layer: Residual, name: str) -> None:
    if name in layer.svd_steering_in:
        raise ValueError(
            f"adapter {name!r} turns the residual stream, which is no change of a weight: no LoRA and no merged model "
            "can hold it. Train on residual-writers instead, or on other linear sites"
        )
    raise ValueError(
        f"adapter {name!r} shifts the residual stream, which is no change of a weight. It is a steering vector: "
        "repeng.export.vector_of(model) gives it, and its save and save_gguf write it"
    )


@torch.no_grad()
def factors_at(model: nn.Module, coefficient: float, adapter_name: str) -> dict[str, Factors]:
    """What an adapter adds to each weight at a coefficient, by the name of the module in the base model.

    Raises:
        ValueError: a part of the adapter is no pair of matrices.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found: dict[str, Factors] = {}
    lora_modules(model, adapter_name)  # raises for what no coefficient scales
    with steer(model, coefficient, adapter_name=adapter_name):
        for name, module in base.named_modules():
            if isinstance(module, Linear) and adapter_name in module.r:
                u, v = (store[adapter_name].float() for store in (module.svd_steering_u, module.svd_steering_v))
                found[name] = Factors(v.mT.cpu().contiguous(), (u @ module.single_core(adapter_name)).cpu())
            elif isinstance(module, LoraLayer) and adapter_name in module.lora_A:
                a, b = (cast(Tensor, store[adapter_name].weight).float() for store in (module.lora_A, module.lora_B))
                if a.ndim != 2:
                    raise ValueError(f"{name} is a {type(base_of(module)).__name__}; linear layers can be exported")
                found[name] = Factors(a.cpu(), (b * module.scaling[adapter_name] * coefficient).cpu())
    return found
