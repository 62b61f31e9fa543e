"""The scale of PEFT's LoRA adapters as a coefficient, one for each row, without a change to PEFT's own state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from repeng.tuner.coefficients import repeat_rows

_set: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()  # by B of an adapter at a site


def lora_modules(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The B matrices of the active LoRA adapters of a model, by adapter name.

    Raises:
        ValueError: an adapter is merged into the weights, or its change is not linear in B (DoRA, embeddings).
    """
    found: dict[str, list[nn.Module]] = {}
    for place, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if layer.merged:
            raise ValueError(
                f"adapter {', '.join(layer.merged_adapters)} is merged into the weights, where no coefficient reaches "
                "it; call unmerge_adapter() first"
            )
        for name in layer.active_adapters:
            if name in layer.lora_embedding_B or layer.use_dora.get(name, False):
                raise ValueError(
                    f"LoRA adapter {name!r} has {'DoRA' if name not in layer.lora_embedding_B else 'an embedding'} at "
                    f"{place}: its change does not scale with a coefficient. Steer a plain LoRA on linear layers"
                )
            if name in layer.lora_B:
                found.setdefault(name, []).append(layer.lora_B[name])
    return found


@contextmanager
def scaled(modules: list[nn.Module], value: Tensor) -> Iterator[None]:
    """Inside the context, the outputs of these modules are times `value`, `()` or `(b,)`; an inner context wins."""
    before = {module: _set.get(module) for module in modules}
    hooks = [module.register_forward_hook(_scale) for module, outer in before.items() if outer is None]
    _set.update(dict.fromkeys(modules, value))
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
    value = _set.get(module)
    if value is None:
        return output  # of a copy that was made inside a context
    value = value.to(output)
    if value.ndim:
        value = value[repeat_rows(torch.arange(value.numel(), device=output.device), output)]
        value = value.reshape(-1, *[1] * (output.ndim - 1))
    return output * value
