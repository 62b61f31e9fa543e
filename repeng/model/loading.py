"""The base model on its device, in its own precision or in 4 bits, and its tokenizer."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

# Models in the package, by the names that `model_name_or_path` takes.
EMBEDDED = {"tiny": Path(__file__).parents[1] / "tiny" / "weights"}
# Attribute of a layer in 4 bits: whether bitsandbytes repacks its weight on some CPUs in the first evaluation, for a
# kernel without gradients.
REPACKED_ON_CPU = "support_avx512bf16_for_cpu"


def model_path(name_or_path: str) -> str:
    """The folder of an embedded model, or the hub id or folder as it is."""
    return str(EMBEDDED.get(name_or_path, name_or_path))


def model_name(model: PreTrainedModel) -> str:
    """The name of an embedded model, or the hub id or folder that the model came from."""
    path = model.name_or_path or ""
    embedded = {str(folder): name for name, folder in EMBEDDED.items()}
    return embedded.get(path, path) or f"{model.config.model_type}, made in memory"


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer of an embedded model, a hub id or a folder."""
    return AutoTokenizer.from_pretrained(model_path(name_or_path))


def load_base(
    name_or_path: str,
    device: torch.device,
    *,
    load_in_4bit: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The base model on the device of this process.

    Args:
        name_or_path: an embedded model, a hub id or a folder.
        device: of this process.
        load_in_4bit: quantise to NF4, by bitsandbytes.
        compute_dtype: of the matrix products of a model in 4 bits.

    Raises:
        ValueError: 4 bits without bitsandbytes.
    """
    options: dict[str, Any] = {}
    if device.type != "cpu":
        options["device_map"] = {"": device}  # else it would pass through main memory, once for each process
    if load_in_4bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("load_in_4bit needs bitsandbytes: pip install 'repeng[bnb]'")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(model_path(name_or_path), **options)
    for module in model.modules():
        if hasattr(module, REPACKED_ON_CPU):
            setattr(module, REPACKED_ON_CPU, False)
    return model
