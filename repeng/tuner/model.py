"""The PEFT tuner of the method: it replaces the target modules and checks adapters strictly when they are loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from tqdm.auto import tqdm

from repeng.tuner.base import is_linear
from repeng.tuner.coefficients import Coefficients
from repeng.tuner.config import PEFT_TYPE, PREFIX, SvdSteeringConfig
from repeng.tuner.decoder import RESIDUAL, last
from repeng.tuner.fingerprint import check_same_base, require_fingerprint, take_fingerprint
from repeng.tuner.keys import IN_PEFT, adapter_keys, beside_adapter, check_keys, check_shapes, is_basis, site_keys
from repeng.tuner.layer import Linear, SvdSteeringLayer, empty
from repeng.tuner.names import check_known, check_new, check_saved
from repeng.tuner.residual import CHILD, Residual, attach, detach
from repeng.tuner.stored import check_numbers, check_tensors
from repeng.tuner.targets import check_acting, residual_width, resolve
from repeng.tuner.undo import all_or_nothing, sites_of


class SvdSteeringModel(BaseTuner):
    """The base model with steering layers that replace its target modules or are attached to them.

    `coefficients` holds the coefficients of all adapters; `repeng.steer` sets them.
    """

    prefix: str = PREFIX
    tuner_layer_cls: type[BaseTunerLayer] = SvdSteeringLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    coefficients: Coefficients
    _bar: tqdm
    _injected: str
    _like: str | None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_new(model, adapter_name)  # before PEFT overwrites the configuration of an existing adapter
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        *args: Any,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Inject an adapter as PEFT does. On any error, `model` is restored to its state before the call.

        Raises:
            ValueError: the name is not allowed or is taken, or the configuration does not fit the model.
        """
        here = next((site.coefficients for site in sites_of(model)), None)  # from an earlier injection
        vars(self).setdefault("coefficients", here or Coefficients())
        config = self._config(adapter_name)
        like = self._made_with(config, adapter_name)
        if like is not None and config.init_bases and config.calibration is not None:
            # The calibration belongs to the trained parameters of the other adapter.
            config = copy(config)
            config.calibration = None
            self.peft_config[adapter_name] = config
        try:
            check_new(model, adapter_name)
            quiet = like is not None or not config.init_bases
            with (
                all_or_nothing(self),
                tqdm(desc="SVD of the adapted weights", leave=False, delay=1, disable=quiet) as bar,
            ):
                vars(self).update(_bar=bar, _injected=adapter_name, _like=like)
                state_dict = state_dict and site_keys(state_dict)
                super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
                if state_dict:
                    self._take_sites(config, adapter_name)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise
        finally:
            for attribute in ("_bar", "_injected", "_like"):
                vars(self).pop(attribute, None)

    def _made_with(self, config: SvdSteeringConfig, adapter_name: str) -> str | None:
        """Another adapter that has its tensors and the same configuration (the object or an equal copy), or None."""
        for name, other in self.peft_config.items():
            if name != adapter_name and isinstance(other, SvdSteeringConfig) and _same(config, other):
                sites = [site for site in sites_of(self.model) if name in site.r]
                if sites and not any(site.is_empty(name) for site in sites):
                    return name
        return None

    def _take_sites(self, config: SvdSteeringConfig, adapter_name: str) -> None:
        """Record the modules that a state dict has injected, which may differ from those of the configuration."""
        names = [name for name in self.targeted_module_names if adapter_name in self._site(name).r]
        if set(names) != set(config.resolved_modules or ()):
            config.resolved_modules = names
            config.fingerprint = take_fingerprint(self.model, names)

    def _config(self, adapter_name: str) -> SvdSteeringConfig:
        return _of_this_method(self.peft_config[adapter_name])

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        # PEFT calls this before it changes anything, for the first adapter and for every later one.
        config = _of_this_method(peft_config)
        merged = next((m for m in model.modules() if isinstance(m, SvdSteeringLayer) and m.merged), None)
        if merged is not None:
            raise ValueError(
                f"adapter {', '.join(merged.merged_adapters)} is merged into the weights, and a new adapter would "
                "take its bases from the merged weights; call unmerge_adapter() first"
            )
        check_saved(model, config.modules_to_save or ())
        if self._like is None:
            _fill_in(config, model)
        units = config.calibration or {"plus": 1.0, "minus": 1.0}
        self.coefficients.set_units(self._injected, units["plus"], units["minus"])
        self._bar.total = len(config.resolved_modules or ())

    @staticmethod
    def _check_target_module_exists(  # pyright: ignore[reportIncompatibleMethodOverride]
        peft_config: PeftConfig, key: str
    ) -> bool | _ExcludedModule:
        config = _of_this_method(peft_config)
        if key in (config.resolved_modules or ()):
            return True
        # PEFT warns if no module was excluded. `resolve` has already refused an exclusion that covers no target.
        return _ExcludedModule() if config.exclude_modules else False

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
            target.update_layer(adapter_name, config, self._like)
        elif is_linear(target):
            module = Linear(target, adapter_name, config, self.coefficients)
            module.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, module, target)
        else:
            residual = attach(target, self.coefficients, residual_width(self.model, target))
            residual.update_layer(adapter_name, config, self._like)
            residual.set_adapter(self.active_adapters)
        self._bar.update()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's method also moves modules, which would change a quantised base and misplace offloaded buffers.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops these keywords after this context, so without this check they would be ignored silently.
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{PEFT_TYPE.value} does not support {name}; give each row its own coefficient with "
                    "repeng.steer(model, torch.tensor([…]), adapter_name=…)"
                )
        yield

    def check_merge(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError, before any weight is written, if one of these adapters cannot be merged."""
        check_known(adapter_names or (), self.peft_config)
        for site in (m for m in self.model.modules() if isinstance(m, SvdSteeringLayer)):
            site.check_merge([name for name in adapter_names or site.active_adapters if name in site.r])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        check_known([adapter_name] if isinstance(adapter_name, str) else adapter_name, self.peft_config)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def add_weighted_adapter(self, *_args: Any, **_kwargs: Any) -> None:
        """Not supported: rotations of different bases have no weighted sum.

        Raises:
            ValueError: always; the message names the alternative.
        """
        raise ValueError(
            f"{PEFT_TYPE.value} adapters cannot be summed into one; activate several together with "
            "model.base_model.set_adapter([…]), and set each with its own repeng.steer(model, c, adapter_name=…)"
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for site in sites_of(self.model):
                site.cast_to_base(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self.check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    # PEFT's annotation says None, but the method returns the model.
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
        """Let c = ±1 of an adapter stand for `plus` and `−minus` in its own units, in this model and when it is saved.

        Args:
            calibration: `plus` and `minus`, both positive, and further JSON entries that tell how they were found.
            adapter_name: the adapter.

        Raises:
            ValueError: a unit is missing or not positive, or a `steer` context that sets the adapter is open.
        """
        if not {"plus", "minus"} <= calibration.keys():
            raise ValueError(f"a calibration needs 'plus' and 'minus'; got {', '.join(calibration) or 'nothing'}")
        self.coefficients.set_units(adapter_name, calibration["plus"], calibration["minus"])
        self._config(adapter_name).calibration = dict(calibration)

    @torch.no_grad()
    def select_directions(self, differences: dict[str, Tensor], adapter_name: str = "default") -> None:
        """Choose the singular directions along which `differences` are largest, instead of the top ones.

        Call this for a new, untrained adapter. The candidates are the leading singular triples, eight times as many as
        are kept. A linear module keeps the triples with the largest `s ‖dX v‖`; a residual site keeps the output
        directions with the largest `‖dHS u‖`.

        Args:
            differences: for each name in `resolved_modules`, the differences between the two sides of the pairs: rows
                `(b d_in)` of a linear module's inputs, or rows `(b d)` of a decoder layer's outputs.
            adapter_name: the adapter.

        Raises:
            ValueError: a module has no differences.
        """
        config = self._config(adapter_name)
        for name in tqdm(config.resolved_modules or (), desc="SVD of the adapted weights", leave=False, delay=1):
            if name not in differences:
                raise ValueError(
                    f"no differences were given for {name!r}; give differences for every module of resolved_modules"
                )
            self._site(name).select_directions(differences[name], adapter_name, config)

    def _site(self, name: str) -> SvdSteeringLayer:
        module = self.model.get_submodule(name)
        return module if isinstance(module, Linear) else getattr(module, CHILD)

    def describe(self, adapter_name: str = "default") -> str:
        """Describe an adapter: its modules by name and layer, and how much of their weights lies outside the bases."""
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
        # PEFT loads with strict=False. Without this check, a missing basis would stay NaN and an unexpected key would
        # be ignored. Learned parameters may be given without the bases, and only some of them: for example averaged
        # weights, or a state dict without frozen tensors.
        for name in self.peft_config:
            given = {key for key in state_dict if f".{PREFIX}" in key and key.endswith(f".{name}")}
            if given:
                expected = {prefix + key: tensor for key, tensor in adapter_keys(self, name).items()}
                whole = any(is_basis(key) for key in given) or any(site.is_empty(name) for site in sites_of(self))
                check_keys(set(expected) if whole else set(expected) & given, given, name)
                check_shapes(expected, {key: state_dict[key] for key in given})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        if any(site.is_empty(adapter_name) for site in sites_of(model)):
            raise ValueError(empty(adapter_name))
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        expected = {key.removesuffix(f".{adapter_name}"): t for key, t in adapter_keys(model, adapter_name).items()}
        if not any(key.startswith(IN_PEFT) for key in expected):  # the adapter was injected without a PeftModel
            state_dict = {key.removeprefix(IN_PEFT): tensor for key, tensor in state_dict.items()}
        beside = beside_adapter(model, adapter_name)
        own = {key: tensor for key, tensor in state_dict.items() if key not in beside}
        check_keys(expected.keys(), own.keys(), adapter_name)
        check_tensors(own, _of_this_method(config))
        for key in state_dict.keys() - own.keys():
            check_numbers(key, state_dict[key])
        check_shapes({**beside, **expected}, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _fill_in(config: SvdSteeringConfig, model: nn.Module) -> None:
    """Record the adapted modules and the base model in a new configuration, or check them against a saved one."""
    if not config.init_bases and config.resolved_modules is not None:
        require_fingerprint(config)
        require_modules(model, config.resolved_modules)
        check_acting(model, config.resolved_modules)
        require_same_targets(model, config)
        check_same_base(model, config, config.resolved_modules)
        return
    config.resolved_modules = resolve(model, config)
    if not config.init_bases:
        check_same_base(model, config, config.resolved_modules)
        return
    config.fingerprint = take_fingerprint(model, config.resolved_modules)
    config.calibration = None
    # A configuration that was used on another base model still holds the commit of that model.
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    config.revision = commit or config.revision


def _same(config: SvdSteeringConfig, other: SvdSteeringConfig) -> bool:
    """Whether two configurations are equal; `inference_mode` does not count."""
    return {**vars(config), "inference_mode": None} == {**vars(other), "inference_mode": None}


def _of_this_method(config: PeftConfig) -> SvdSteeringConfig:
    """The configuration with its type; PEFT has selected this tuner by `peft_type`."""
    return cast(SvdSteeringConfig, config)


def _spans(indices: list[int]) -> str:
    """Sorted indices as text, consecutive ones as a range: 2–4, 7."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def require_modules(model: nn.Module, names: list[str]) -> None:
    """Raise ValueError unless the model has all modules that an adapter file needs."""
    available = {name for name, _ in model.named_modules()}
    missing = [name for name in names if name not in available]
    if missing:
        raise ValueError(
            f"this adapter needs {len(names)} modules, but {type(model).__name__} lacks {len(missing)} of them: "
            f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}; load the base model that the adapter is for"
        )


def require_same_targets(model: nn.Module, config: SvdSteeringConfig) -> None:
    """Raise ValueError if `resolved_modules` of a saved configuration does not follow from its `target_modules`.

    A regular expression from a file is not matched, so it is not checked.
    """
    if isinstance(config.target_modules, str) or not config.target_modules:
        return
    asked, named = set(resolve(model, config)), set(config.resolved_modules or ())
    for one, there in ((asked - named, "resolved_modules lacks"), (named - asked, "resolved_modules adds")):
        if one:
            raise ValueError(
                f"target_modules, layers_to_transform and exclude_modules ask for {len(asked)} modules of this model, "
                f"but {there} {min(one)!r}; one of these fields was changed, so copy adapter_config.json again from "
                "where it was saved"
            )
