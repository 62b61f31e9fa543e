"""A hash that identifies a base model by samples of its parameters and by its tokenizer."""

import hashlib
import json

from torch import nn
from transformers import PreTrainedTokenizerBase

from repeng.tuner.config import PREFIX

SAMPLES = 64  # entries of each parameter


def model_key(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *parts: object) -> str:
    """Hash of the base parameters, the tokenizer and further parts (as JSON), as sixteen hexadecimal digits.

    The parameters of adapters are left out.
    """
    adapters = (PREFIX, getattr(getattr(model, "base_model", None), "prefix", PREFIX))
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, parameter in model.named_parameters():
        if any(prefix in name for prefix in adapters):
            continue
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        digest.update(f"{plain} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[::step][:SAMPLES].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
