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
    model: PeftModel, path: str | Path, coefficient: float = 1.0, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Path]:
    """Write a whole model in whose weights the adapter stands at a coefficient, in safetensors.

    Args:
        model: the PEFT model.
        path: the folder; nothing may lie there.
        coefficient: the only one at which the written model stands.
        tokenizer: written beside it.

    Raises:
        ValueError: as `merged`; FileExistsError: something lies at `path`.
    """
    path = Path(path)
    check_new(path)
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
