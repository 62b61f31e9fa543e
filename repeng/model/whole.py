"""Whether a base model is whole: its files may be somebody else's, or damaged."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.model.strict_json import read_json

CONFIG = "config.json"


def check_folder(name_or_path: str) -> None:
    """Raise ValueError for the folder of a model whose configuration cannot be one, before its weights are read."""
    path = Path(name_or_path) / CONFIG
    if not path.is_file():
        return  # a name; a folder without it is refused where names are looked up
    config = read_json(path, constants=True)  # some models write Infinity
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f'{path} names no model_type as a text, such as "llama"; take it from the model again')
    text: Any = config.get("text_config", config)
    text = text if isinstance(text, dict) else config
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "n_layer", "n_embd"):
        if key in text and (type(text[key]) is not int or not 0 < text[key] < 1 << 24):
            raise ValueError(f"{path}: {key} must be a whole number from 1; got {text[key]!r}. Take it from the model")


def check_loaded(model: PreTrainedModel, report: dict[str, Any], name: str) -> None:
    """Raise ValueError unless every weight came from the files, as it is there, and is finite.

    Args:
        model: the model.
        report: `output_loading_info` of `from_pretrained`.
        name: what the model is called.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(report.get("missing_keys") or ()) - tied)
    if missing:
        raise ValueError(
            f"{name}: the files lack {len(missing)} weights that the configuration calls for, such as {missing[0]!r}, "
            "which would be random; take the configuration and the weights from one place"
        )
    broken = next((key for key, weight in model.named_parameters() if not is_finite(weight)), None)
    if broken is not None:
        raise ValueError(f"{name}: the weight {broken!r} holds NaN or infinite values; take the file from its source")


def is_finite(weight: nn.Parameter) -> bool:
    """Whether a weight, if it is one of floating-point numbers that are at hand, is finite throughout."""
    if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
        return True
    return bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))) or bool(weight.isfinite().all())


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the tokenizer has token ids that the model has no embedding for."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows is None:
        return
    token, index = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1], default=("", -1))
    if index >= rows:
        raise ValueError(
            f"the tokenizer gives {token!r} the id {index}, and the model has embeddings for ids up to {rows - 1}: "
            "they do not belong together; give the folder or hub id that holds both"
        )
