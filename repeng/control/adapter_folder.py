"""Read and check the folder of an adapter before anything is loaded, since its author may not be trusted."""

import warnings
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME as CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from pydantic import Field
from torch import Tensor, nn

from repeng.data.files import nearest
from repeng.data.schema import checked, shown
from repeng.data.trust import stays_inside
from repeng.model.strict_json import read_json
from repeng.model.tensor_files import read_tensors
from repeng.tuner import SvdSteeringConfig
from repeng.tuner.base import base_of, is_linear, linear_shape
from repeng.tuner.config import FORMAT_VERSION, PEFT_TYPE
from repeng.tuner.fields import check_expression
from repeng.tuner.keys import IN_PEFT, check_keys
from repeng.tuner.model import require_modules
from repeng.tuner.stored import check_numbers, check_tensors, does_nothing

KINDS: dict[str, type[PeftConfig]] = {PEFT_TYPE: SvdSteeringConfig, "LORA": LoraConfig}
# Fields of a LoRA that may differ from their defaults. Other fields would make it another method, or could run code.
PLAIN: dict[str, Any] = {
    "r": Annotated[int, Field(ge=1, le=1 << 20)],
    "lora_alpha": Annotated[float, Field(gt=0, le=1e6)],
    "lora_dropout": Annotated[float, Field(ge=0, le=1)],
    "target_modules": list[str] | str | None,
    "exclude_modules": list[str] | str | None,
    "fan_in_fan_out": bool,
    "bias": Literal["none"],
    "use_rslora": bool,
    "modules_to_save": Annotated[list[str] | None, Field(max_length=0)],
    # Other values, such as pissa and olora, change the weights of the base model when the adapter is loaded.
    "init_lora_weights": bool | Literal["gaussian", "eva", "orthogonal"],
    "layers_to_transform": list[int] | int | None,
    "layers_pattern": list[str] | str | None,
    "rank_pattern": dict[str, Annotated[int, Field(ge=1)]] | None,
    "alpha_pattern": dict[str, Annotated[float, Field(gt=0, le=1e6)]] | None,
    "base_model_name_or_path": str | None,
    "revision": str | None,
    "task_type": str | None,
    "inference_mode": bool,
    "auto_mapping": dict[str, Any] | None,
    "peft_version": str | None,
    "loftq_config": dict[str, Any] | None,
}
MEANS_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})  # values with which an unknown field has no effect


@dataclass(frozen=True)
class AdapterFolder:
    """The checked configuration and tensors of an adapter. `check` tests whether a model fits them."""

    path: Path
    config: PeftConfig
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: str | Path) -> "AdapterFolder":
        """Read and check the folder of an adapter.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the content of a file is invalid, the adapter is of another kind, or it would do nothing. The
                message names the file.
        """
        path = Path(path)
        for name in (CONFIG, WEIGHTS):
            _check_file(path, name)
        config = read_config(path)
        tensors, _ = read_tensors(path / WEIGHTS)
        if not tensors:
            raise ValueError(f"{path / WEIGHTS} holds no tensor; save the adapter again")
        for name in getattr(config, "modules_to_save", None) or ():
            if not any(f".{name}." in f".{key}" for key in tensors):
                raise ValueError(f"{path}: modules_to_save names {name!r}, but {WEIGHTS} holds no tensor of it")
        try:
            if isinstance(config, SvdSteeringConfig):
                own = {key: tensor for key, tensor in tensors.items() if ".svd_steering_" in key}
                for key in tensors.keys() - own.keys():
                    check_numbers(key, tensors[key])
                check_tensors(own, config)
                idle = does_nothing(own) and len(own) == len(tensors)
            else:
                idle = _check_lora(tensors, cast(LoraConfig, config))
        except ValueError as error:
            raise ValueError(f"{path / WEIGHTS}: {error}") from None
        if idle:
            raise ValueError(
                f"{path / WEIGHTS}: all learned parameters of this adapter are zero, so it does nothing at any "
                "coefficient; train it first"
            )
        return cls(path, config, tensors)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError, naming the module, unless the tensors have the shapes of this model's weights."""
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        names = {_module_of(key) for key in self.tensors if ".lora_" in key or ".svd_steering_" in key}
        try:
            require_modules(model, sorted(names))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        for key, tensor in self.tensors.items():
            side = next((s for part, s in SIDES.items() if part in key), None)
            module = base_of(model.get_submodule(_module_of(key))) if side is not None else None
            if side is None or module is None or not is_linear(module) or tensor.ndim != 2:
                continue
            dimension, of_shape = side
            if tensor.shape[dimension] != linear_shape(module)[of_shape]:
                raise ValueError(
                    f"{self.path / WEIGHTS}: {key} has shape {tuple(tensor.shape)}, but {type(model).__name__} is "
                    f"{linear_shape(module)[of_shape]} wide there; load the base model that the adapter was made for"
                )

    def load(self, model: nn.Module, adapter_name: str = "default") -> PeftModel:
        """Load the whole adapter into the model.

        Raises:
            ValueError: the adapter does not fit the model, or the file does not hold exactly the adapter's tensors.
        """
        self.check(model)
        try:
            with warnings.catch_warnings():
                # An adapter of another kind may be in the model on purpose. Missing keys are refused below.
                warnings.filterwarnings("ignore", message="Already found a `peft_config`|Found missing adapter keys")
                if isinstance(model, PeftModel):
                    model.load_adapter(str(self.path), adapter_name=adapter_name)
                    adapted = model
                else:
                    adapted = PeftModel.from_pretrained(cast(Any, model), self.path, adapter_name=adapter_name)
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} does not fit this model: {' '.join(str(error).split())[:300]}") from error
        if isinstance(self.config, LoraConfig):
            here = get_peft_model_state_dict(adapted, adapter_name=adapter_name)
            check_keys(set(here), set(self.tensors), adapter_name)
        return adapted


# By part of a key: the dimension of the tensor, and the index into (d_in, d_out) of the size that it must have.
SIDES = {".lora_A.": (1, 0), ".lora_B.": (0, 1), ".svd_steering_u": (0, 1), ".svd_steering_v": (0, 0)}


def _module_of(key: str) -> str:
    name = key.removeprefix(IN_PEFT)
    for part in (".lora_", ".svd_steering_"):
        name = name.partition(part)[0]
    return name.removesuffix(".steering_residual")


def _check_file(folder: Path, name: str) -> None:
    """Raise unless the folder has a regular file of this name, or a link into itself or into its hub cache."""
    path = folder / name
    if not path.is_file():
        pickles = [one.name for one in folder.glob("adapter_model.*") if one.suffix in (".bin", ".pt", ".pth")]
        more = f"; {pickles[0]} is a pickle and is not read, because reading it can run code" if pickles else ""
        raise FileNotFoundError(f"{folder} is not an adapter's folder: it holds no {name}{more}; give another folder")
    if not stays_inside(path):
        raise ValueError(f"{path} is a link to {path.resolve()}, outside its folder; put the file itself there")


def read_config(folder: Path) -> PeftConfig:
    """Read the configuration in an adapter's folder; check that all its fields are known and their values are allowed.

    Raises:
        FileNotFoundError, ValueError: as `AdapterFolder.read`.
    """
    _check_file(folder, CONFIG)
    path = folder / CONFIG
    values = read_json(path)
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind == "APASTOADAPTER":
        raise ValueError(
            f"{path} is an AntiPaSTO adapter; load it with repeng.tuner.load_antipasto and save it with "
            "save_pretrained"
        )
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{path}: peft_type must be one of {', '.join(KINDS)}; got {shown(kind)}")
    config_class = KINDS[kind]
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION and config_class is SvdSteeringConfig:
        raise ValueError(
            f"{path}: format_version is {version}, but this version of repeng reads formats up to {FORMAT_VERSION}; "
            "install a newer repeng"
        )
    known = {field.name: field for field in fields(config_class) if field.init} | {"peft_type": None}
    for key in values.keys() - known.keys():
        if values[key] not in MEANS_NOTHING:
            raise ValueError(
                f"{path}: unknown field {shown(key)}{nearest(key, known)}; it would be ignored. Install the peft "
                f"version that wrote it ({shown(values.get('peft_version'))}), or remove the field"
            )
    values = {key: value for key, value in values.items() if key in known and key != "peft_type"}
    try:
        if config_class is LoraConfig:
            _check_plain(values)
        elif values.get("resolved_modules") is None:
            raise ValueError("resolved_modules, the names of the adapted modules, is missing; save the adapter again")
        elif values.get("init_bases") is not False:
            raise ValueError(
                f"init_bases must be false, as in every saved configuration; got {shown(values.get('init_bases'))}"
            )
        return config_class(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _check_plain(values: dict[str, Any]) -> None:
    """Raise ValueError unless the configuration is that of a plain LoRA with valid values."""
    if values.get("target_modules") is None:
        raise ValueError("target_modules, the names of the adapted modules, is missing")
    defaults = {field.name: _default(field) for field in fields(LoraConfig)}
    for key, value in values.items():
        if key in PLAIN:
            checked(PLAIN[key], value, key)
        elif value not in MEANS_NOTHING and value != defaults[key]:
            raise ValueError(
                f"{key} is {shown(value)}; only a plain LoRA can be steered, where it is {defaults[key]!r}"
            )
    for key in ("target_modules", "exclude_modules"):
        if isinstance(values.get(key), str):
            check_expression(key, values[key], from_file=True)
    for pattern in (*(values.get("rank_pattern") or ()), *(values.get("alpha_pattern") or ())):
        check_expression("a key of rank_pattern or alpha_pattern", pattern, from_file=True)


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _check_lora(tensors: dict[str, Tensor], config: LoraConfig) -> bool:
    """Whether the LoRA does nothing. Raises ValueError, naming the tensor, if one does not fit the configuration."""
    strengths = {}
    ranks = {config.r, *(config.rank_pattern or {}).values()}
    for key, tensor in tensors.items():
        check_numbers(key, tensor)
    for key, tensor in tensors.items():
        if ".lora_A." not in key and ".lora_B." not in key:
            continue
        other = key.replace(".lora_A.", ".lora_B.") if ".lora_A." in key else key.replace(".lora_B.", ".lora_A.")
        if other not in tensors:
            raise ValueError(f"{key} has no counterpart {other}; copy the adapter again from where it was saved")
        rank = tensor.shape[0 if ".lora_A." in key else -1] if tensor.ndim else 0
        if tensor.ndim != 2 or rank not in ranks:
            raise ValueError(
                f"{key} has shape {tuple(tensor.shape)}, but {CONFIG} gives it the rank r={config.r}; use both files "
                "from the same save"
            )
        if ".lora_A." in key:
            strengths[key] = (tensor.float().abs().max() * tensors[other].float().abs().max()).item()
    if not strengths:
        raise ValueError("no tensor is called lora_A or lora_B; copy the adapter again from where it was saved")
    key = max(strengths, key=lambda one: strengths[one])
    if not strengths[key] < 1e6:
        raise ValueError(f"{key} times its lora_B reaches {strengths[key]:.3g}; the limit is 1e6. The file is damaged")
    return strengths[key] < 1e-30
