"""Checks of adapter names: whether a new name is allowed, and whether a given name exists."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from repeng.tuner.undo import sites_of


def check_new(model: nn.Module, name: str) -> None:
    """Raise ValueError if a new adapter of `model` cannot have this name."""
    if not isinstance(name, str) or not name or set(name) & set("./\\\0"):
        raise ValueError(
            f"an adapter cannot be called {name!r}, because its name is part of keys and of paths; give a text "
            "without dots and slashes, such as 'honesty'"
        )
    if any(name in site.r for site in sites_of(model)):
        raise ValueError(
            f"this model already has an adapter {name!r}; give another adapter_name, or remove the existing adapter "
            "with delete_adapter or unload() first"
        )
    if name in _parts(model) or any(hasattr(holder, name) for holder in (nn.ParameterDict(), BufferDict())):
        raise ValueError(
            f"an adapter cannot be called {name!r}: PEFT tells adapters apart by their names in keys, and "
            f"{type(model).__name__} or PyTorch already uses this name; give another name, such as 'adapter-{name}'"
        )


def _parts(model: nn.Module) -> set[str]:
    """Parts of the names of all parameters except those of other adapters."""
    adapted = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    inside = tuple(f"{name}." for name in adapted)
    keys = [key for key, _ in model.named_parameters() if not key.startswith(inside)]
    return {part for key in (*keys, *adapted) for part in key.split(".")}


def check_saved(model: nn.Module, modules: Iterable[str]) -> None:
    """Raise ValueError, naming the nearest match, if an entry of modules_to_save is not the end of a module's name."""
    there = [name for name, _ in model.named_modules() if name]
    for wanted in modules:
        if not any(name.endswith(wanted) for name in there):
            ends = sorted({name.rpartition(".")[2] for name in there})
            near = get_close_matches(str(wanted), ends, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(ends)}"
            raise ValueError(f"modules_to_save names {wanted!r}, which {type(model).__name__} does not have; {mend}")


def check_known(names: Collection[str], available: Iterable[str]) -> None:
    """Raise ValueError, naming the nearest match, if an adapter does not exist or is named twice."""
    available = list(available)
    for name in names:
        if name not in available:
            near = get_close_matches(str(name), available, n=1)
            raise ValueError(
                f"there is no adapter {name!r}{f'; did you mean {near[0]!r}?' if near else ''} (available: "
                f"{', '.join(map(repr, available)) or 'none'})"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"{list(names)} names an adapter twice, so it would act twice; name each adapter once")
