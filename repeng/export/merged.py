"""Merge an adapter into the weights of its base model."""

import copy
import os
import tempfile
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.control.lora import lora_names, scale_weights
from repeng.control.steer import steer
from repeng.data.files import give_usual_mode
from repeng.data.folders import check_new
from repeng.export.factors import adapter_to_export
from repeng.export.gguf import write_merged
from repeng.tuner.base import base_of, is_linear, is_quantised


def merged(model: PeftModel, coefficient: float) -> PreTrainedModel:
    """A copy of the base model with the adapter merged into its weights at a coefficient; `model` does not change.

    Raises:
        ValueError: the adapter acts on the residual stream, or the base is quantised.
    """
    name = adapter_to_export(model)
    if any(is_linear(module) and is_quantised(base_of(module)) for module in model.modules()):
        raise ValueError("a quantised base cannot hold the change exactly; load it without quantisation to merge")
    whole = copy.deepcopy(model)
    if name in lora_names(whole):
        scale_weights(whole, coefficient)
        return whole.merge_and_unload()
    with steer(whole, coefficient):
        return whole.merge_and_unload()


def export_merged(
    model: PeftModel,
    path: str | Path,
    coefficient: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_file: str | Path | None = None,
) -> list[Path]:
    """Write the base model with the adapter merged at a coefficient: a folder with safetensors, or a GGUF file.

    Args:
        model: the PEFT model.
        path: the folder, which must be new or empty, or a new file that ends in .gguf.
        coefficient: the coefficient at which the adapter is merged.
        tokenizer: the tokenizer to save with the safetensors.
        base_file: the GGUF file of the base; needed for a GGUF file, which is a copy of it with changed weights.

    Raises:
        ValueError: as `merged`; for a GGUF file also as `export_gguf`, or `base_file` is missing.
        FileExistsError: the file exists, or the folder is not empty.
    """
    path = Path(path)
    check_new(path)
    if path.suffix == ".gguf":
        if base_file is None:
            raise ValueError(
                "a merged GGUF file needs a base that is a GGUF file, and this base is not; write a merged folder, "
                "and convert it with llama.cpp's convert_hf_to_gguf.py"
            )
        write_merged(model, path, coefficient, base_file)
        return [path]
    plain = merged(model, coefficient)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as temporary:
        place = Path(temporary) / path.name
        plain.save_pretrained(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        give_usual_mode((file for file in place.rglob("*") if file.is_file()), Path(temporary))
        os.replace(place, path)  # this also replaces an empty folder
    return [path]
