"""Loading the base model onto its device, in its own precision or in 4 bits, and its tokenizer."""

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from repeng._extras import install_command
from repeng.model.hub import unreachable
from repeng.model.sources import WAYS, Source, find_source, name_of_folder
from repeng.model.templates import check_template
from repeng.model.whole import check_folder, check_loaded, check_vocabulary

# Attribute of a 4-bit layer. If it is true, bitsandbytes repacks the weight at the first evaluation on some CPUs, for
# a kernel without gradients.
REPACKED_ON_CPU = "support_avx512bf16_for_cpu"
# Exceptions that libraries raise for files that they cannot read.
UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    SafetensorError,
)


def model_name(model: PreTrainedModel) -> str:
    """The name of an embedded or packaged model, or the hub id or folder from which the model was loaded."""
    path = model.name_or_path or f"{model.config.model_type}, made in memory"
    return name_of_folder(path) or path


def load_tokenizer(name_or_path: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model and check that its chat template works, if it has one; see `load_base`."""
    source = find_source(name_or_path, gguf_file)
    _check_reachable(source)
    with _named(name_or_path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False, **_gguf_option(source))
    check_template(tokenizer)
    return tokenizer


def load_shape(name_or_path: str, gguf_file: str | None = None) -> PreTrainedModel | None:
    """The model without its weights, on the meta device; None for a GGUF file, which can only be loaded whole.

    Raises:
        ValueError: the model does not exist.
    """
    source = find_source(name_or_path, gguf_file)
    if source.gguf_file is not None:
        return None
    check_folder(source.path)
    with _named(name_or_path, "configuration"):
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check_reachable(source: Source) -> None:
    """Raise ValueError if the model must be downloaded and the hub cannot be reached."""
    if Path(source.path).is_dir() or try_to_load_from_cache(source.path, source.gguf_file or "config.json"):
        return
    why = None if constants.HF_HUB_OFFLINE else unreachable()
    if why is not None:
        raise ValueError(f"model_name_or_path: {source.path!r} is not in the download cache, and {why}; give {WAYS}")


@contextmanager
def _named(name: str, part: str) -> Iterator[None]:
    """Inside the context, an error of transformers becomes a ValueError that names the model and its broken part."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except UNREADABLE as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"model_name_or_path: the {part} of {name!r} cannot be read ({why}); give {WAYS}") from error


def check_bits(source: Source) -> None:
    """Raise ValueError unless a model from this source can be loaded in 4 bits."""
    if source.gguf_file is not None:
        raise ValueError(f"load_in_4bit does not go with {source.gguf_file}: a GGUF file is dequantised")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"load_in_4bit needs bitsandbytes: {install_command('bnb')}")


def load_base(
    name_or_path: str,
    device: torch.device | str = "cpu",
    *,
    gguf_file: str | None = None,
    load_in_4bit: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Load the base model onto a device. A GGUF file is dequantised to float32 and gives an ordinary model.

    Python code in the model's folder or repository is never run.

    Args:
        name_or_path: an embedded model ("tiny"), a model in a package ("smollm2"), a folder, a GGUF file, or a hub id.
        device: device of the model.
        gguf_file: name of a GGUF file in the folder or on the hub.
        load_in_4bit: quantise to NF4 with bitsandbytes.
        compute_dtype: dtype of the matrix products of a 4-bit model.

    Raises:
        ValueError: a package is missing, options do not go together, or the model is incomplete or damaged.
        FileNotFoundError: the folder has no GGUF file of that name.
    """
    source, device = find_source(name_or_path, gguf_file), torch.device(device)
    options: dict[str, Any] = _gguf_option(source)
    if device.type != "cpu":
        options["device_map"] = {"": device}  # otherwise every process would first load it into main memory
    if load_in_4bit:
        check_bits(source)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    if source.gguf_file is None:
        check_folder(source.path)
    else:
        options["dtype"] = torch.float32
    with _named(name_or_path, "model"):
        model, report = cast(Any, AutoModelForCausalLM).from_pretrained(
            source.path, trust_remote_code=False, output_loading_info=True, **options
        )
    check_loaded(model, report, name_or_path)
    if source.gguf_file is not None:
        model = _plain(model)
    for module in model.modules():
        if hasattr(module, REPACKED_ON_CPU):
            setattr(module, REPACKED_ON_CPU, False)
    return model


def load_model(
    name_or_path: str, *, gguf_file: str | None = None, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer by any value that `model_name_or_path` accepts; see `load_base`."""
    tokenizer = load_tokenizer(name_or_path, gguf_file)
    model = load_base(name_or_path, device, gguf_file=gguf_file)
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def _gguf_option(source: Source) -> dict[str, Any]:
    return {} if source.gguf_file is None else {"gguf_file": source.gguf_file}


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model without the mark of GGUF, because of which transformers would refuse to save its float weights."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(config)
    state = model.state_dict()
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    # Buffers that are not in the state dict, such as rotary frequencies, are still on the meta device.
    for name, buffer in model.named_buffers():
        owner = plain.get_submodule(name.rpartition(".")[0])
        owner.register_buffer(name.rpartition(".")[2], buffer, persistent=name in state)
    plain.generation_config = model.generation_config
    plain.name_or_path = model.name_or_path
    return plain.eval()
