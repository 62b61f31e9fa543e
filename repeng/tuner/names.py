"""Names of adapters: those that can be given, and those that are there."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from peft.tuners._buffer_dict import BufferDict
from torch import nn

from repeng.tuner.undo import sites_of


def check_new(model: nn.Module, name: str) -> None:
    """Raise ValueError if a new adapter of `model` cannot have this name."""
    if not isinstance(name, str) or not name or set(name) & set("./\\\0"):
        raise ValueError(
            f"an adapter cannot be called {name!r}: its name is part of keys and of paths; give a text without "
            "dots and slashes, such as 'honesty'"
        )
    if any(name in site.r for site in sites_of(model)):
        raise ValueError(
            f"this model has an adapter {name!r} already; give another adapter_name, or take that one away with "
            "delete_adapter or unload() first"
        )
    parts = {part for key, _ in model.named_parameters() for part in key.split(".")}
    if name in parts - {*(getattr(model, "peft_config", None) or ())} or any(hasattr(holder, name) for holder in (nn.ParameterDict(), BufferDict())):
        raise ValueError(
            f"an adapter cannot be called {name!r}, as parts of {type(model).__name__} are called so and PEFT tells "
            f"adapters apart by their names in keys; give another name, such as 'adapter-{name}'"
        )


def check_known(names: Collection[str], available: Iterable[str]) -> None:
    """Raise ValueError, naming the nearest, if there is no adapter of one of these names, or one is named twice."""
    available = list(available)
    for name in names:
        if name not in available:
            near = get_close_matches(str(name), available, n=1)
            raise ValueError(
                f"there is no adapter {name!r}{f'; did you mean {near[0]!r}?' if near else ''} (there is: "
                f"{', '.join(map(repr, available)) or 'none'})"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"an adapter is named twice in {list(names)}, and would act twice; name each once")
