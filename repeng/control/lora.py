"""Scale PEFT's LoRA adapters by a coefficient, per row if needed, without changing PEFT's own state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from repeng.tuner.coefficients import repeat_rows


class Factor:
    """A factor for outputs: a single number, or a tensor per row or token that is copied to each device only once."""

    def __init__(self, value: Tensor) -> None:
        self.number: float | None = None if value.ndim else value.item()
        self._by_device = {value.device: value}

    def on(self, device: torch.device) -> Tensor:
        """The tensor on a device."""
        if device not in self._by_device:
            self._by_device[device] = next(iter(self._by_device.values())).to(device)
        return self._by_device[device]


# Values of init_lora_weights start with one of these if they change the weights of the base model.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_set: WeakKeyDictionary[nn.Module, Factor] = WeakKeyDictionary()  # current factor, by B matrix


def lora_modules(model: nn.Module, adapter_name: str | None = None) -> dict[str, list[nn.Module]]:
    """The B matrices of the active LoRA adapters of a model, or of the one called `adapter_name`, by adapter name.

    Raises:
        ValueError: an adapter is merged into the weights, or has a part that a coefficient does not scale.
    """
    found: dict[str, list[nn.Module]] = {}
    for place, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if layer.merged:
            raise ValueError(
                f"adapter {', '.join(layer.merged_adapters)} is merged into the weights, where no coefficient can "
                "scale it; call unmerge_adapter() first"
            )
        for name in layer.active_adapters:
            if adapter_name not in (None, name):
                continue
            if name in layer.lora_embedding_B:
                _refuse(name, f"an embedding at {place}")
            if name in layer.lora_B:
                if layer.lora_variant.get(name) is not None:
                    _refuse(name, f"{type(layer.lora_variant[name]).__name__} at {place}")
                if isinstance(layer, ParamWrapper | MultiheadAttention):
                    _refuse(name, f"a {type(layer).__name__} at {place}")
                found.setdefault(name, []).append(layer.lora_B[name])
    for place, module in model.named_modules() if found else ():
        if isinstance(module, AuxiliaryTrainingWrapper) and found.keys() & set(module.active_adapters):
            _refuse(", ".join(found), f"a trained copy of {place}")
    configs = getattr(model, "peft_config", {})
    for name in found:
        bias = getattr(configs.get(name), "bias", "none")
        if bias != "none":
            _refuse(name, f"trained biases (bias={bias!r})")
        start = getattr(configs.get(name), "init_lora_weights", True)
        if isinstance(start, str) and start.startswith(CHANGE_THE_BASE):
            _refuse(
                name,
                f"init_lora_weights={start!r}, which has changed the base model; convert the adapter to a plain LoRA: "
                "save it with path_initial_model_for_weight_conversion",
            )
    return found


@torch.no_grad()
def scale_weights(model: nn.Module, factor: float) -> None:
    """Multiply the B matrices of the model's active LoRA adapters by `factor`, in place.

    Raises:
        ValueError: see `lora_modules`.
    """
    for modules in lora_modules(model).values():
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            parameter.mul_(factor)


def lora_names(model: nn.Module) -> set[str]:
    """The names of all active LoRA adapters."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    return {name for layer in layers for name in layer.active_adapters}


def _refuse(name: str, what: str) -> None:
    raise ValueError(
        f"LoRA adapter {name!r} has {what}. No coefficient scales this part, so 0 would not be the base model. Steer "
        "a plain LoRA on linear layers"
    )


@contextmanager
def scaled(modules: list[nn.Module], value: Tensor) -> Iterator[None]:
    """Inside the context, the outputs of these modules are multiplied by `value`, `()`, `(b,)` or `(b t)`.

    An inner context overrides an outer one.
    """
    factor = Factor(value)
    before = {module: _set.get(module) for module in modules}
    hooks = [module.register_forward_hook(_scale) for module, outer in before.items() if outer is None]
    _set.update(dict.fromkeys(modules, factor))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, outer in before.items():
            if outer is None:
                _set.pop(module, None)
            else:
                _set[module] = outer


def _scale(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    factor = _set.get(module)
    if factor is None or factor.number == 1:
        return output  # None: the module is a copy that was made inside a context
    if factor.number is not None:
        return output * factor.number
    value = repeat_rows(factor.on(output.device), output)
    return (output * value.reshape(*value.shape, *[1] * (output.ndim - value.ndim))).to(output.dtype)
