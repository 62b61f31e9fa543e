"""A base model with an adapter written into its weights."""

import copy
import os
import tempfile
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.control.lora import lora_names, scale_weights
from repeng.control.steer import steer
from repeng.data.files import give_usual_mode
from repeng.export.factors import adapter_to_export, check_new
from repeng.export.gguf import write_merged
from repeng.tuner.base import base_of, is_linear, is_quantised


def merged(model: PeftModel, coefficient: float) -> PreTrainedModel:
    """A copy of the base model in whose weights the adapter stands at a coefficient; `model` stays as it is.

    Raises:
        ValueError: the adapter acts on the residual stream, or the base is quantised.
    """
    name = adapter_to_export(model)
    if any(is_linear(module) and is_quantised(base_of(module)) for module in model.modules()):
        raise ValueError("a quantised base cannot take up the change exactly; load it without quantisation to merge")
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
    """Write a whole model in whose weights the adapter stands at a coefficient: a folder of safetensors, or a GGUF.

    Args:
        model: the PEFT model.
        path: the folder, or a file that ends in .gguf; nothing may lie there.
        coefficient: the only one at which the written model stands.
        tokenizer: written beside safetensors.
        base_file: the GGUF file of the base, of which a GGUF file is a copy but for the weights that change.

    Raises:
        ValueError: as `merged`; for a GGUF file also as `export_gguf`, or there is no `base_file`.
        FileExistsError: something lies at `path`.
    """
    path = Path(path)
    check_new(path)
    if path.suffix == ".gguf":
        if base_file is None:
            raise ValueError(
                "the base is no GGUF file, of which a merged one could be a copy; write a merged folder, and let "
                "llama.cpp's convert_hf_to_gguf.py convert it"
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
        os.replace(place, path)  # an empty folder gives way
    return [path]
