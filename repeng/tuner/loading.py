"""A failed load leaves the model unchanged.

PEFT and transformers add an adapter to the model before they read its file. If the file is missing, broken or for
another model, they leave the adapter in the model without its tensors. The wrappers here undo that.
"""

import os
from collections.abc import Callable
from functools import wraps
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from repeng.tuner.config import PREFIX
from repeng.tuner.undo import all_or_nothing, sites_of


def make_loads_whole() -> None:
    """Wrap `PeftModel.from_pretrained` and both `load_adapter` (PEFT's and transformers') to load all or nothing.

    For models without an adapter of this method, their behaviour does not change.
    """
    peft_model: Any = PeftModel
    if hasattr(peft_model.load_adapter, "__wrapped__"):
        return
    peft_model.load_adapter = _whole(peft_model.load_adapter)
    peft_model.from_pretrained = classmethod(_whole_from_base(peft_model.from_pretrained.__func__))
    PeftAdapterMixin.load_adapter = _complete(PeftAdapterMixin.load_adapter)


def _whole(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_all_or_nothing(self: nn.Module, model_id: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(self):
            try:
                return load(self, model_id, *args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except _BROKEN as error:
                folder = os.path.join(model_id, *filter(None, [kwargs.get("subfolder")]))
                if not sites_of(self) or not os.path.isdir(folder):
                    raise
                raise ValueError(f"the adapter in {folder} cannot be loaded: {_reason(folder, error)}") from error

    return load_all_or_nothing


# Errors from reading a weights file that is broken, absent, or lacks a tensor of modules_to_save.
_BROKEN = (SafetensorError, UnpicklingError, EOFError, RuntimeError, OSError, KeyError, HFValidationError)


def _reason(folder: str, error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"its weights file lacks {error.args[0]}, which modules_to_save in adapter_config.json requires"
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    there = [name for name in names if os.path.exists(os.path.join(folder, name))]
    if not there:
        return f"it has neither {' nor '.join(names)}; copy the whole folder that save_pretrained wrote"
    return f"{there[0]} is broken ({str(error).splitlines()[0]}); copy it again, or save the adapter again"


def _whole_from_base(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_all_or_nothing(cls: type, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(model):
            return load(cls, model, *args, **kwargs)

    return load_all_or_nothing


def _complete(load: Callable[..., Any]) -> Callable[..., Any]:
    """Raise ValueError for missing and unexpected tensors, which transformers only reports."""

    @wraps(load)
    def load_complete(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(self):
            info = load(self, *args, **kwargs)
            missing = [key for key in getattr(info, "missing_keys", ()) if f".{PREFIX}" in key]
            strange = [key for key in getattr(info, "unexpected_keys", ()) if f".{PREFIX}" in key]
            for what, keys in (("lacks", missing), ("holds unexpected tensors", strange)):
                if keys and sites_of(self):
                    named = ", ".join(sorted(keys)[:3]) + (" …" if len(keys) > 3 else "")
                    raise ValueError(
                        f"the file of this adapter {what} {named}; check that it and adapter_config.json were "
                        "saved together, for this base model"
                    )
            return info

    return load_complete
