"""A base model with an adapter written into its weights."""

import copy
import os
import tempfile
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.control.lora import lora_names, scale_weights
from repeng.control.steer import steer
from repeng.export.factors import adapter_to_export


def merged(model: PeftModel, coefficient: float) -> PreTrainedModel:
    """A copy of the base model in whose weights the adapter stands at a coefficient; `model` stays as it is.

    Raises:
        ValueError: the adapter acts on the residual stream, or the base is quantised.
    """
    name = adapter_to_export(model)
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
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is not empty; a whole model gets a folder of its own")
    plain = merged(model, coefficient)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as temporary:
        place = Path(temporary) / path.name
        plain.save_pretrained(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        os.replace(place, path)  # an empty folder gives way
    return [path]
