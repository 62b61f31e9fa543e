"""Routing of the PEFT method: which modules it replaces, and strict loading."""

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.constants import (
    EMBEDDING_LAYER_NAMES,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from repeng.tuner.config import PREFIX, SvdSteeringConfig
from repeng.tuner.layer import Coefficients, Linear, SvdSteeringLayer, linear_shape


class SvdSteeringModel(BaseTuner):
    """The base model with `SvdSteeringLayer`s in place of its target modules.

    `coefficients` is the one place that holds the coefficient of every adapter; `repeng.steer` sets it.
    """

    prefix = PREFIX
    tuner_layer_cls = SvdSteeringLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    coefficients: Coefficients

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.__dict__.setdefault("coefficients", Coefficients())
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        check_targets(model, config)

    def _create_and_replace(
        self,
        peft_config: SvdSteeringConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, SvdSteeringLayer):
            target.update_layer(adapter_name, peft_config)
            return
        module = Linear(target, adapter_name, peft_config, self.coefficients)
        if adapter_name not in self.active_adapters:
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        # PEFT loads with strict=False; without this a missing base would stay NaN and a stray key would be dropped.
        for name in self.peft_config:
            given = {key for key in state_dict if f".{PREFIX}" in key and key.endswith(f".{name}")}
            if given:
                expected = {prefix + key for key in adapter_keys(self, name)}
                check_keys(expected, given, name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        expected = {key.removesuffix(f".{adapter_name}") for key in adapter_keys(model, adapter_name)}
        given = {key for key in state_dict if not is_auxiliary(key)}
        check_keys(expected, given, adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def adapter_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """State-dict keys of this method's tensors for one adapter, with its name at the end."""
    return [key for key in model.state_dict() if f".{PREFIX}" in key and key.endswith(f".{adapter_name}")]


def is_auxiliary(key: str) -> bool:
    """Whether PEFT itself may have put `key` into the file: modules_to_save, or an embedding of a grown vocabulary."""
    parts = key.split(".")
    return "modules_to_save" in parts or any(name in parts for name in EMBEDDING_LAYER_NAMES)


def check_keys(expected: set[str], given: set[str], adapter_name: str) -> None:
    """Raise ValueError, naming keys, unless the file holds exactly the tensors that the configuration calls for."""
    problems = [
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:3])}{' …' if len(keys) > 3 else ''}"
        for what, keys in (("missing", expected - given), ("unexpected", given - expected))
        if keys
    ]
    if problems:
        raise ValueError(
            f"the weights of adapter {adapter_name!r} do not fit its configuration and this model "
            f"({'; '.join(problems)}); check "
            "that adapter_config.json and adapter_model.safetensors come from one save, for this base model"
        )


def check_targets(model: nn.Module, config: SvdSteeringConfig) -> None:
    """Refuse, before any SVD, targets that match nothing, are not linear, or are narrower than the rank.

    Raises:
        ValueError: naming what was asked for and what the model has.
    """
    modules = {
        name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, module in model.named_modules()
        if ".base_layer" not in name
    }
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    available = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
    matched = [name for name in modules if name and check_target_module_exists(config, name)]
    if not matched:
        raise ValueError(
            f"target_modules={targets_text(config.target_modules)} with layers "
            f"{config.layers_to_transform} matches nothing in this model; its linear modules are: {available}"
        )
    for name in matched:
        if name not in linear:
            raise ValueError(
                f"target module {name!r} is a {type(modules[name]).__name__}, which cannot be adapted; "
                f"the linear modules of this model are: {available}"
            )
        shape = linear_shape(linear[name])
        if config.r > min(shape):
            raise ValueError(
                f"r={config.r} is above the rank of {name!r}, whose weight is {shape[1]} x {shape[0]}; "
                f"give r ≤ {min(shape)}"
            )
    if not isinstance(config.target_modules, str):
        missing = [t for t in config.target_modules if not any(m == t or m.endswith(f".{t}") for m in matched)]
        if missing:
            raise ValueError(
                f"target_modules {targets_text(missing)} match nothing in this model; "
                f"its linear modules are: {available}"
            )


def targets_text(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else ", ".join(map(repr, sorted(targets)))
