"""Routing of the PEFT method: which modules it replaces, and strict loading."""

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
    """The base model with steering layers in place of its target modules, or beside them.

    `coefficients` is the one place that holds the coefficient of every adapter; `repeng.steer` sets it.
    """

    prefix: str = PREFIX
    tuner_layer_cls: type[BaseTunerLayer] = SvdSteeringLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    coefficients: Coefficients
    _bar: tqdm
    _injected: str
    _like: str | None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_new(model, adapter_name)  # before PEFT writes the new configuration over the old one's
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        *args: Any,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As PEFT's own; on an error, also in the middle of it, `model` is as it was.

        Raises:
            ValueError: the name cannot be an adapter's or is taken, or the configuration does not fit the model.
        """
        here = next((site.coefficients for site in sites_of(model)), None)  # of an injection before this one
        vars(self).setdefault("coefficients", here or Coefficients())
        config = self._config(adapter_name)
        like = self._made_with(config, adapter_name)
        if like is not None and config.init_bases and config.calibration is not None:  # of what the other has learned
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
        """Another adapter with tensors whose configuration this is, or is a copy of."""
        for name, other in self.peft_config.items():
            if name != adapter_name and isinstance(other, SvdSteeringConfig) and _same(config, other):
                sites = [site for site in sites_of(self.model) if name in site.r]
                if sites and not any(site.is_empty(name) for site in sites):
                    return name
        return None

    def _take_sites(self, config: SvdSteeringConfig, adapter_name: str) -> None:
        """Record what a state dict has injected, which need not be what the configuration asks for."""
        names = [name for name in self.targeted_module_names if adapter_name in self._site(name).r]
        if set(names) != set(config.resolved_modules or ()):
            config.resolved_modules = names
            config.fingerprint = take_fingerprint(self.model, names)

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
        # PEFT warns of an exclusion that it has not seen. One that covers nothing was refused before.
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
        # PEFT's own also moves modules, which would touch a quantised base and put buffers beside an offloaded weight.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops these keywords after this context: a method that does not know them would ignore them silently.
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{PEFT_TYPE.value} does not take {name}; give each row its own coefficient: "
                    "with repeng.steer(model, torch.tensor([…]), adapter_name=…)"
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
        """Refused: rotations of different bases have no weighted sum.

        Raises:
            ValueError: always; it names what does the same.
        """
        raise ValueError(
            f"{PEFT_TYPE.value} adapters cannot be summed into one; let several act together with "
            "model.base_model.set_adapter([…]), each at its own repeng.steer(model, c, adapter_name=…)"
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for site in sites_of(self.model):
                site.cast_to_base(adapter_name)

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
        # What was learned may come alone, in part too: as an average of weights, or without what is frozen.
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
        if not any(key.startswith(IN_PEFT) for key in expected):  # injected, without a PeftModel around
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
    """Record which modules are adapted, of which base; or compare with what a saved configuration says of them."""
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
    # A configuration that was used on another base before still names that one's commit.
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    config.revision = commit or config.revision


def _same(config: SvdSteeringConfig, other: SvdSteeringConfig) -> bool:
    """Whether one is the other, or a copy of it; that it is trained or not makes no difference."""
    return {**vars(config), "inference_mode": None} == {**vars(other), "inference_mode": None}


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


def require_same_targets(model: nn.Module, config: SvdSteeringConfig) -> None:
    """Raise ValueError if the modules that a saved configuration names are not those that it asks for.

    A regular expression of a file is not matched.
    """
    if isinstance(config.target_modules, str) or not config.target_modules:
        return
    asked, named = set(resolve(model, config)), set(config.resolved_modules or ())
    for one, there in ((asked - named, "resolved_modules lacks"), (named - asked, "resolved_modules adds")):
        if one:
            raise ValueError(
                f"target_modules, layers_to_transform and exclude_modules here ask for {len(asked)} modules"
                f" and {there} {min(one)!r}: one was changed; take adapter_config.json from where it was saved again"
            )
