"""Export adapters as plain LoRA files, which PEFT, vLLM and other software read without this package."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from repeng._file_names import CARD
from repeng.data.files import staged, write_json
from repeng.data.folders import check_new
from repeng.export.factors import (
    Factors,
    adapter_to_export,
    factors_at,
    new_places,
    of_one_rank,
    parts_of,
)
from repeng.model.sources import name_of_folder
from repeng.tuner.base import base_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # allowed values of max_lora_rank (vLLM 0.32)


def export_lora(
    model: nn.Module, path: str | Path, coefficient: float | Sequence[float] = 1.0, adapter_name: str | None = None
) -> list[Path]:
    """Write an adapter at a fixed coefficient as a plain LoRA; the LoRA is exact at this coefficient.

    Args:
        model: a model with a steering or LoRA adapter.
        path: the folder of the LoRA; for several coefficients, the folder in which each LoRA gets its own folder.
        coefficient: one coefficient, or several.
        adapter_name: the adapter; by default the only active one.

    Returns:
        The written folders.

    Raises:
        ValueError: there is no such adapter, or it acts on the residual stream.
        OSError: a folder cannot be written, or it is not empty.
    """
    name = adapter_to_export(model, adapter_name)
    places = new_places(path, coefficient)
    for c, folder in places:
        card = f"A plain LoRA with exactly the effect of a `repeng` steering adapter at coefficient {c:g}."
        _write(model, folder, factors_at(model, c, name), name, card)
    return [folder for _, folder in places]


def export_dial(model: nn.Module, path: str | Path, adapter_name: str | None = None) -> list[Path]:
    """Write an adapter as LoRAs whose scales are functions of one coefficient c, for engines that take scales.

    `odd` is half the difference between the adapter's changes at +1 and at −1 and is scaled by c. `even` is half their
    sum and is scaled by c². Together they are exact at −1, 0 and 1, and approximate in between. If the adapter is
    itself a LoRA, there is no even part, and the odd part is exact at every c. A calibrated adapter is written in its
    own units: `dial.json` holds the numbers by which a positive and a negative c is multiplied first.

    Args:
        model: a model with a steering or LoRA adapter.
        path: the folder for `dial.json` and for the folder of each LoRA.
        adapter_name: the adapter; by default the only active one.

    Returns:
        The written folders of the LoRAs.

    Raises:
        ValueError, OSError: as `export_lora`.
    """
    name = adapter_to_export(model, adapter_name)
    check_new(path)
    parts = parts_of(model, name)
    for part, factors in parts.factors.items():
        card = f"The {part} part of a `repeng` steering adapter. At coefficient c its scale is {parts.scales[part]}."
        _write(model, Path(path) / part, factors, name, card)
    write_json(Path(path) / "dial.json", {"scales": parts.scales, "units": parts.units})
    return [Path(path) / part for part in parts.factors]


def _write(model: nn.Module, folder: Path, factors: Mapping[str, Factors], adapter_name: str, sentence: str) -> None:
    """Write a LoRA with one rank on the modules of `factors`; on an error, write no file."""
    factors = of_one_rank(factors, adapter_name)
    r = next(iter(factors.values())).a.shape[0]
    tensors: dict[str, Tensor] = {}
    for module, one in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = one.a
        tensors[f"base_model.model.{module}.lora_B.weight"] = one.b
    config = _config(model, adapter_name, sorted(factors), r)
    with staged(folder, (WEIGHTS, CONFIG, CARD)) as place:
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(place))
        (place / CARD).write_text(_card(config, folder, sentence), encoding="utf-8")


def _config(model: nn.Module, adapter_name: str, modules: list[str], r: int) -> LoraConfig:
    own: Any = getattr(model, "peft_config", {}).get(adapter_name)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=modules,
        task_type=getattr(own, "task_type", None),
        base_model_name_or_path=getattr(own, "base_model_name_or_path", None),
        fan_in_fan_out=any(isinstance(base_of(base.get_submodule(name)), Conv1D) for name in modules),
        inference_mode=True,
    )


def serving_commands(folders: Sequence[Path], base: str | None, r: int, adapter: str | Path = "PATH") -> str:
    """The shell commands that serve LoRAs with vLLM, each LoRA as its own model; or a comment why vLLM cannot.

    Args:
        folders: the folders that `export_lora` wrote.
        base: the base model, as the adapter's configuration names it.
        r: the rank of the LoRAs.
        adapter: the folder of the exported adapter.
    """
    packaged = name_of_folder(base or "")
    rank = next((rank for rank in VLLM_RANKS if rank >= r), None)
    if rank is None:
        return f"# vLLM supports ranks up to {VLLM_RANKS[-1]}, but this LoRA has rank {r}: merge it to serve it there"
    written = f"repeng export {shlex.quote(str(adapter))} --to merged --coefficients 0 --output {packaged}\n"
    names = (f"{folder.name.replace('+', 'plus')}={shlex.quote(str(folder))}" for folder in folders)
    return (
        f"{written if packaged else ''}vllm serve {shlex.quote(packaged or base or 'BASE')} --enable-lora "
        f"--max-loras {len(folders)} --max-lora-rank {rank} --lora-modules {' '.join(names)}"
    )


def _card(config: LoraConfig, folder: Path, sentence: str) -> str:
    """The README of an exported LoRA: how to load it and how to serve it."""
    path = config.base_model_name_or_path or "BASE"
    packaged = name_of_folder(path)
    base = packaged or path
    loaded = f'load_model("{base}")[0]' if packaged else f'AutoModelForCausalLM.from_pretrained("{base}")'
    source = "repeng import load_model" if packaged else "transformers import AutoModelForCausalLM"
    return f"""---
library_name: peft
base_model: {base}
tags: [steering, repeng, lora]
---
{sentence}

```python
from peft import PeftModel
from {source}

model = PeftModel.from_pretrained({loaded}, "{folder}")
```

```bash
{serving_commands([folder], config.base_model_name_or_path, config.r)}
```
"""
