"""Loads that fail leave the model as it was.

PEFT and transformers put an adapter into the model before they read its file. If that is missing, broken or of another
model, they leave the adapter behind without its tensors.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from peft import PeftModel
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from repeng.tuner.config import PREFIX
from repeng.tuner.undo import all_or_nothing, sites_of


def make_loads_whole() -> None:
    """Let `PeftModel.from_pretrained`, its `load_adapter` and that of transformers' models load all or nothing.

    For adapters of other methods they stay as they are.
    """
    PeftModel.load_adapter = _whole(PeftModel.load_adapter)
    from_pretrained: Any = PeftModel.from_pretrained
    PeftModel.from_pretrained = classmethod(_whole_class(from_pretrained.__func__))
    PeftAdapterMixin.load_adapter = _complete(PeftAdapterMixin.load_adapter)


def _whole(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_all_or_nothing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(self):
            return load(self, *args, **kwargs)

    return load_all_or_nothing


def _whole_class(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_all_or_nothing(cls: type, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(model):
            return load(cls, model, *args, **kwargs)

    return load_all_or_nothing


def _complete(load: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers reports tensors that are missing or left over, and goes on."""

    @wraps(load)
    def load_complete(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(self):
            info = load(self, *args, **kwargs)
            missing = [key for key in info.missing_keys if f".{PREFIX}" in key]
            strange = [key for key in info.unexpected_keys if f".{PREFIX}" in key]
            for what, keys in (("lacks", missing), ("has no place for", strange)):
                if keys and sites_of(self):
                    raise ValueError(
                        f"this adapter {what} {len(keys)} tensors, such as {min(keys)}; check that its "
                        "adapter_config.json and its weights come from one save, for this base model"
                    )
            return info

    return load_complete
