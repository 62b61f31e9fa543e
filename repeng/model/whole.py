"""Checks that a base model is complete and sound: its files may be damaged, or not fit together."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.model.strict_json import read_json

CONFIG = "config.json"


def check_folder(name_or_path: str) -> None:
    """Raise ValueError if a model folder's config.json is invalid, before the weights are read."""
    path = Path(name_or_path) / CONFIG
    if not path.is_file():
        return  # a hub id; `find_source` refuses folders without config.json
    config = read_json(path, constants=True)  # some models write Infinity
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f'{path} has no model_type as a text, such as "llama"; copy it from the model again')
    text: Any = config.get("text_config", config)
    text = text if isinstance(text, dict) else config
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "n_layer", "n_embd"):
        if key in text and (type(text[key]) is not int or not 0 < text[key] < 1 << 24):
            raise ValueError(
                f"{path}: {key} must be a whole number from 1; got {text[key]!r}. Copy the file from the model again"
            )


def check_loaded(model: PreTrainedModel, report: dict[str, Any], name: str) -> None:
    """Raise ValueError unless every weight was loaded from the files and is finite.

    Args:
        model: the model.
        report: `output_loading_info` of `from_pretrained`.
        name: name of the model in messages.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(report.get("missing_keys") or ()) - tied)
    if missing:
        raise ValueError(
            f"{name}: the files lack {len(missing)} weights that the configuration requires, such as {missing[0]!r}; "
            "they would be random. Take the configuration and the weights from one source"
        )
    broken = next((key for key, weight in model.named_parameters() if not is_finite(weight)), None)
    if broken is not None:
        raise ValueError(
            f"{name}: the weight {broken!r} holds NaN or infinite values; copy the file from its source again"
        )


def is_finite(weight: nn.Parameter) -> bool:
    """Whether all values of a weight are finite. Meta tensors and types below 16 bits are not checked: True."""
    if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
        return True
    return bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))) or bool(weight.isfinite().all())


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the tokenizer has token ids for which the model has no embedding."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows is None:
        return
    token, index = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1], default=("", -1))
    if index >= rows:
        raise ValueError(
            f"the tokenizer gives {token!r} the id {index}, but the model has embeddings for ids up to {rows - 1}: "
            "they do not belong together; give a folder or hub id that holds both"
        )
