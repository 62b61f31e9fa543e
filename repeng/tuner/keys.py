"""The keys of an adapter's tensors in files and state dicts, and whether what is given fits."""

from collections.abc import Mapping, Set

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from repeng.tuner.config import PREFIX
from repeng.tuner.residual import CHILD

IN_PEFT = "base_model.model."  # before the names of modules, if a PeftModel stands around them


def adapter_keys(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """This method's tensors for one adapter by their keys in the state dict, the adapter's name at the end."""
    state = model.state_dict()
    return {key: t for key, t in state.items() if f".{PREFIX}" in key and key.endswith(f".{adapter_name}")}


def is_basis(key: str) -> bool:
    """Whether the key, an adapter's name at its end, is that of a frozen basis."""
    return key.split(".")[-2] in {f"{PREFIX}{letter}" for letter in "usv"}


def site_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of an adapter with the names of adapted modules before the method's prefix, as PEFT reads them."""
    return {key.removeprefix(IN_PEFT).replace(f".{CHILD}.{PREFIX}", f".{PREFIX}"): t for key, t in state_dict.items()}


def beside_adapter(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """By key, what PEFT may have put into the file of an adapter: modules_to_save, and embeddings of a new size."""
    places = [f"{name}." for name, module in model.named_modules() if module in _embeddings(model)]
    copies = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    places += [f"{name}.modules_to_save.{adapter_name}." for name in copies]
    state = model.state_dict()
    return {key: t for key, t in state.items() if key.startswith(tuple(places)) and f".{PREFIX}" not in key}


def _embeddings(model: nn.Module) -> list[nn.Module]:
    readers = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    return [module for read in readers if read is not None and (module := read()) is not None]


def check_keys(expected: Set[str], given: Set[str], adapter_name: str) -> None:
    """Raise ValueError, naming keys, unless the file holds exactly the tensors that the configuration calls for."""
    problems = [
        f"{len(keys)} {what}: {', '.join(map(_plain, sorted(keys)[:3]))}{' …' if len(keys) > 3 else ''}"
        for what, keys in (("missing", expected - given), ("unexpected", given - expected))
        if keys
    ]
    if problems:
        raise ValueError(
            f"the weights of adapter {adapter_name!r} do not fit its configuration and this model "
            f"({'; '.join(problems)}); check "
            "that adapter_config.json and adapter_model.safetensors come from one save, for this base model"
        )


def _plain(key: str) -> str:
    """A key of a file of somebody else in one short line."""
    return key.encode("unicode_escape").decode()[:200]


def check_shapes(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming a key, if a tensor has another shape than the one that it is to replace."""
    for key, tensor in sorted(given.items()):
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{key} is given in shape {tuple(tensor.shape)} and has shape {tuple(expected[key].shape)} here; "
                "load it into a model of the same sizes (a vocabulary that has grown: resize_token_embeddings first)"
            )
