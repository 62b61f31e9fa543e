"""Keys of an adapter's tensors in files and state dicts, and checks of given keys and shapes."""

from collections.abc import Mapping, Set

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from repeng.tuner.config import PREFIX
from repeng.tuner.residual import CHILD

IN_PEFT = "base_model.model."  # prefix of module names inside a PeftModel


def adapter_keys(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """This method's tensors of one adapter, by their keys in the state dict; each key ends in the adapter's name."""
    state = model.state_dict()
    return {key: t for key, t in state.items() if f".{PREFIX}" in key and key.endswith(f".{adapter_name}")}


def is_basis(key: str) -> bool:
    """Whether the key, which ends in an adapter's name, belongs to a frozen basis."""
    return key.split(".")[-2] in {f"{PREFIX}{letter}" for letter in "usv"}


def site_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an adapter's keys to the form that PEFT expects: the name of the module, then the method's prefix."""
    return {key.removeprefix(IN_PEFT).replace(f".{CHILD}.{PREFIX}", f".{PREFIX}"): t for key, t in state_dict.items()}


def beside_adapter(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """By key, tensors that PEFT may add to an adapter's file: modules_to_save, and embeddings of a new size."""
    places = [f"{name}." for name, module in model.named_modules() if module in _embeddings(model)]
    copies = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    places += [f"{name}.modules_to_save.{adapter_name}." for name in copies]
    state = model.state_dict()
    return {key: t for key, t in state.items() if key.startswith(tuple(places)) and f".{PREFIX}" not in key}


def _embeddings(model: nn.Module) -> list[nn.Module]:
    readers = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    return [module for read in readers if read is not None and (module := read()) is not None]


def check_keys(expected: Set[str], given: Set[str], adapter_name: str) -> None:
    """Raise ValueError, naming keys, unless exactly the expected tensors are given."""
    problems = [
        f"{len(keys)} {what}: {', '.join(map(_plain, sorted(keys)[:3]))}{' …' if len(keys) > 3 else ''}"
        for what, keys in (("missing", expected - given), ("unexpected", given - expected))
        if keys
    ]
    if problems:
        raise ValueError(
            f"the weights of adapter {adapter_name!r} do not fit its configuration and this model "
            f"({'; '.join(problems)}); check "
            "that adapter_config.json and adapter_model.safetensors were saved together, for this base model"
        )


def _plain(key: str) -> str:
    """The key, escaped and shortened to one line, since it may come from an untrusted file."""
    return key.encode("unicode_escape").decode()[:200]


def check_shapes(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming a key, if a given tensor and the tensor that it replaces have different shapes."""
    for key, tensor in sorted(given.items()):
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{key} has shape {tuple(tensor.shape)} in the given tensors and {tuple(expected[key].shape)} in this "
                "model; load it into a model of the same sizes (if the vocabulary has grown, call "
                "resize_token_embeddings first)"
            )
