"""Routing of the PEFT method: which modules it replaces, and strict loading."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import (
    EMBEDDING_LAYER_NAMES,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from torch import Tensor, nn
from tqdm.auto import tqdm

from repeng.tuner.base import is_linear
from repeng.tuner.coefficients import Coefficients
from repeng.tuner.config import PEFT_TYPE, PREFIX, SvdSteeringConfig
from repeng.tuner.decoder import RESIDUAL, last
from repeng.tuner.fingerprint import check_same_base, take_fingerprint
from repeng.tuner.layer import Linear, SvdSteeringLayer
from repeng.tuner.residual import CHILD, Residual, attach, detach
from repeng.tuner.targets import check_acting, residual_width, resolve


class SvdSteeringModel(BaseTuner):
    """The base model with steering layers in place of its target modules, or beside them.

    `coefficients` is the one place that holds the coefficient of every adapter; `repeng.steer` sets it.
    """

    prefix: str = PREFIX
    tuner_layer_cls: type[BaseTunerLayer] = SvdSteeringLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    coefficients: Coefficients
    _bar: tqdm
    _injected: str

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        vars(self).setdefault("coefficients", Coefficients())
        shown = self._config(adapter_name).init_bases
        with tqdm(desc="SVD of the adapted weights", leave=False, delay=1, disable=not shown) as bar:
            vars(self).update(_bar=bar, _injected=adapter_name)
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            finally:
                del vars(self)["_bar"], vars(self)["_injected"]

    def _config(self, adapter_name: str) -> SvdSteeringConfig:
        return _of_this_method(self.peft_config[adapter_name])

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        # PEFT calls this before it changes anything, for the first adapter and for those added later.
        config = _of_this_method(peft_config)
        merged = next((m for m in model.modules() if isinstance(m, SvdSteeringLayer) and m.merged), None)
        if merged is not None:
            raise ValueError(
                f"adapter {', '.join(merged.merged_adapters)} is merged into the weights, of which another one would "
                "take its bases; call unmerge_adapter() first"
            )
        if config.init_bases or config.resolved_modules is None:
            config.resolved_modules = resolve(model, config)
        else:
            require_modules(model, config.resolved_modules)
            check_acting(model, config.resolved_modules)
        if config.init_bases:
            config.fingerprint = take_fingerprint(model, config.resolved_modules)
            config.calibration = None
            # A configuration that was used on another base before still names that one's commit.
            commit = getattr(getattr(model, "config", None), "_commit_hash", None)
            config.revision = commit or config.revision
        else:
            check_same_base(model, config, config.resolved_modules)
        units = config.calibration or {"plus": 1.0, "minus": 1.0}
        self.coefficients.set_units(self._injected, units["plus"], units["minus"])
        self._bar.total = len(config.resolved_modules)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        return key in (_of_this_method(peft_config).resolved_modules or ())

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **_: Any,
    ) -> None:
        config = _of_this_method(peft_config)
        if isinstance(target, SvdSteeringLayer):
            target.update_layer(adapter_name, config)
        elif is_linear(target):
            module = Linear(target, adapter_name, config, self.coefficients)
            module.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, module, target)
        else:
            residual = attach(target, self.coefficients, residual_width(self.model, target))
            residual.update_layer(adapter_name, config)
            residual.set_adapter(self.active_adapters)
        self._bar.update()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also moves modules, which would touch a quantised base and put buffers beside an offloaded weight.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops these keywords after this context: a method that does not know them would ignore them silently.
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{PEFT_TYPE} does not take {name}; give each row its own coefficient: "
                    "with repeng.steer(model, torch.tensor([…]), adapter_name=…)"
                )
        yield

    def check_merge(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError, before any weight is written, if one of these adapters cannot be merged."""
        for site in (m for m in self.model.modules() if isinstance(m, SvdSteeringLayer)):
            site.check_merge([name for name in adapter_names or site.active_adapters if name in site.r])

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self.check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    # PEFT annotates None and returns the model.
    def _unload_and_optionally_merge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.check_merge(adapter_names)
        model = cast(nn.Module, super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names))
        for layer in [m for m in model.modules() if any(isinstance(child, Residual) for child in m.children())]:
            detach(layer)
        return model

    def set_units(self, calibration: dict[str, Any], adapter_name: str = "default") -> None:
        """Let c = ±1 of an adapter stand for `plus` and `−minus` of its own units, here and in the saved adapter.

        Args:
            calibration: `plus` and `minus`, positive, and whatever tells how they were found, as JSON.
            adapter_name: which adapter.

        Raises:
            ValueError: a unit is missing or not positive, or the adapter's coefficient is set at the moment.
        """
        if not {"plus", "minus"} <= calibration.keys():
            raise ValueError(f"a calibration needs 'plus' and 'minus'; got {', '.join(calibration) or 'nothing'}")
        self.coefficients.set_units(adapter_name, calibration["plus"], calibration["minus"])
        self._config(adapter_name).calibration = dict(calibration)

    @torch.no_grad()
    def select_directions(self, differences: dict[str, Tensor], adapter_name: str = "default") -> None:
        """Let those singular directions turn along which `differences` are largest, instead of the top ones.

        Of the leading singular triples (eight times as many as are kept), the adapter keeps those with the largest
        `s ‖dX v‖`; for the residual stream those output directions with the largest `‖dHS u‖`. For a new adapter.

        Args:
            differences: by name of `resolved_modules`, rows `(b d_in)` by which the inputs of a linear module differ
                between the two sides of pairs, or rows `(b d)` for the output of a decoder layer.
            adapter_name: which adapter.

        Raises:
            ValueError: a module without differences.
        """
        config = self._config(adapter_name)
        for name in tqdm(config.resolved_modules or (), desc="SVD of the adapted weights", leave=False, delay=1):
            if name not in differences:
                raise ValueError(
                    f"no differences were given for {name!r}; every module of resolved_modules needs them"
                )
            self._site(name).select_directions(differences[name], adapter_name, config)

    def _site(self, name: str) -> SvdSteeringLayer:
        module = self.model.get_submodule(name)
        return module if isinstance(module, Linear) else getattr(module, CHILD)

    def describe(self, adapter_name: str = "default") -> str:
        """What one adapter adapts: modules by name and layer, and how much of each weight lies outside its bases."""
        config = self._config(adapter_name)
        names = config.resolved_modules or []
        kinds: dict[str, list[tuple[int, float | None]]] = {}
        for name in names:
            layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
            site = self._site(name)
            kind = last(name) if isinstance(site, Linear) else RESIDUAL
            kinds.setdefault(kind, []).append((layer, site.svd_error.get(adapter_name)))
        lines = [f"{len(names)} modules adapted" + (f" at rank {config.r}" if config.turns or config.scale else "")]
        for kind, sites in kinds.items():
            errors = [error for _, error in sites if error is not None]
            outside = f", up to {max(errors):.0%} of a weight outside the bases" if errors else ""
            lines.append(f"  {kind}: {len(sites)}, layers {_spans(sorted({layer for layer, _ in sites}))}{outside}")
        return "\n".join(lines)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        # PEFT loads with strict=False; without this a missing base would stay NaN and a stray key would be dropped.
        for name in self.peft_config:
            stored = {key for key in state_dict if f".{PREFIX}" in key and key.endswith(f".{name}")}
            if stored:
                expected = {prefix + key for key in _adapter_keys(self, name)}
                check_keys(expected, stored, name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        expected = {key.removesuffix(f".{adapter_name}") for key in _adapter_keys(model, adapter_name)}
        stored = {key for key in state_dict if not _is_auxiliary(key)}
        check_keys(expected, stored, adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _of_this_method(config: PeftConfig) -> SvdSteeringConfig:
    """The configuration, which PEFT brings here by its `peft_type`."""
    return cast(SvdSteeringConfig, config)


def _spans(indices: list[int]) -> str:
    """Sorted indices with runs drawn together: 2–4, 7."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def require_modules(model: nn.Module, names: list[str]) -> None:
    """Raise ValueError unless all modules of an adapter file are there."""
    available = {name for name, _ in model.named_modules()}
    missing = [name for name in names if name not in available]
    if missing:
        raise ValueError(
            f"this adapter needs {len(names)} modules and {type(model).__name__} lacks {len(missing)} of them: "
            f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}; load the base model that it was made for"
        )


def _adapter_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """State-dict keys of this method's tensors for one adapter, with its name at the end."""
    return [key for key in model.state_dict() if f".{PREFIX}" in key and key.endswith(f".{adapter_name}")]


def _is_auxiliary(key: str) -> bool:
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
