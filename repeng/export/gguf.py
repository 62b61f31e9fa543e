"""Adapters for llama.cpp in GGUF: LoRAs at one coefficient, a dial of two LoRAs, and a whole model.

Needs the package gguf (`pip install 'repeng[gguf]'`).
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from repeng.data.files import write_json, write_text, written_whole
from repeng.export.factors import (
    Factors,
    Parts,
    adapter_to_export,
    check_new,
    factors_at,
    new_places,
    of_one_rank,
    parts_of,
)
from repeng.model.loading import model_name
from repeng.tuner.base import base_of
from repeng.vectors.gguf import gguf_package

CARD = "README.md"
DIFFERS = 0.01  # share of a weight by which the base may differ from its file: what rounding to bfloat16 may do
LOST = 0.01  # share of an adapter's change that may be lost in float16


class Layout(NamedTuple):
    """How llama.cpp keeps an architecture: its name in GGUF, and whether rows of q and k are in another order."""

    architecture: str
    reordered: bool = False


# By transformers' model_type: those whose linear weights llama.cpp's converter keeps but for the order of rows.
LAYOUTS = {
    "gemma": Layout("gemma"),
    "gemma2": Layout("gemma2"),
    "gemma3_text": Layout("gemma3"),
    "gpt2": Layout("gpt2"),
    "llama": Layout("llama", reordered=True),
    "mistral": Layout("llama", reordered=True),
    "mixtral": Layout("llama", reordered=True),
    "olmo2": Layout("olmo2"),
    "phi3": Layout("phi3"),
    "qwen2": Layout("qwen2"),
    "qwen3": Layout("qwen3"),
    "qwen3_moe": Layout("qwen3moe"),
    "smollm3": Layout("smollm3", reordered=True),
}


class Names:
    """Names and order of rows of a model's weights in GGUF.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: the architecture has no GGUF form, or not one that is known here.
    """

    def __init__(self, model: nn.Module) -> None:
        gguf = gguf_package()
        self.base: PreTrainedModel = cast(
            PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model
        )
        self.config: Any = self.base.config.get_text_config(decoder=True)
        layout = LAYOUTS.get(self.config.model_type)
        if layout is None:
            raise ValueError(
                f"how llama.cpp keeps the weights of a {self.config.model_type} model is not known here; known are "
                f"{', '.join(LAYOUTS)}. Write plain LoRAs or a merged model in safetensors, and let llama.cpp's "
                "convert_lora_to_gguf.py or convert_hf_to_gguf.py convert them"
            )
        self.architecture: str = layout.architecture
        self.reordered: bool = layout.reordered
        found = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture]
        if not found:
            raise ValueError(f"the installed package gguf knows no {self.architecture!r}; install a newer one")
        self._table = gguf.get_tensor_name_map(found[0], self.config.num_hidden_layers)

    def of(self, module: str) -> str:
        """The tensor of a linear layer, by the layer's name in the base model.

        Raises:
            ValueError: it has none.
        """
        # The text model of one that sees is a file of its own for llama.cpp.
        name = self._table.get_name(module.replace("language_model.", ""))
        if name is None:
            raise ValueError(f"{module} has no name in a GGUF file of the architecture {self.architecture!r}")
        if name == "output" and self.config.tie_word_embeddings:
            raise ValueError(f"{module} is tied to the embeddings, so that llama.cpp has no weight of its own for it")
        return f"{name}.weight"

    def rows(self, name: str, weight: Tensor) -> Tensor:
        """A matrix `(d_out, …)` with its rows as in the tensor `name`.

        Where transformers keeps the halves of a head one after the other, some architectures of llama.cpp have the
        two that rotate together side by side.
        """
        part = name.split(".")[-2]
        if not self.reordered or part not in ("attn_q", "attn_k"):
            return weight
        heads = self.config.num_attention_heads if part == "attn_q" else self.config.num_key_value_heads
        return rearrange(weight, "(head half pair) d -> (head pair half) d", head=heads, half=2)

    def factors(self, factors: Mapping[str, Factors]) -> dict[str, Factors]:
        """The same changes by the names, and in the order, of GGUF."""
        named = {self.of(module): one for module, one in factors.items()}
        return {name: Factors(one.a, self.rows(name, one.b)) for name, one in named.items()}


def export_gguf(
    model: nn.Module, path: str | Path, coefficient: float | Sequence[float] = 1.0, adapter_name: str | None = None
) -> list[Path]:
    """Write what an adapter does at a coefficient as a LoRA for llama.cpp: exact, and fixed there.

    Args:
        model: a model with a steering or LoRA adapter.
        path: the file; of several coefficients, the folder of their files.
        coefficient: one, or several.
        adapter_name: which adapter; by default the only active one.

    Returns:
        The files that were written.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: the adapter acts on the residual stream or on a layer that llama.cpp has no name for, the
            architecture is not known here, or there is no such adapter.
        OSError: a file cannot be written, or something lies there.
    """
    name, names = adapter_to_export(model, adapter_name), Names(model)
    places = new_places(path, coefficient, ".gguf")
    for c, place in places:
        _write_lora(place, names, factors_at(model, c, name), name, {"repeng.coefficient": f"{c:g}"})
    return [place for _, place in places]


def export_gguf_dial(model: nn.Module, path: str | Path, adapter_name: str | None = None) -> list[Path]:
    """Write an adapter as one or two LoRAs for llama.cpp, whose scales are functions of one coefficient.

    `llama-server` takes scales in each request, so that every request has a coefficient of its own. The parts, their
    scales and `dial.json` are those of `export_dial`; a README says how to serve them.

    Args:
        model: a model with a steering or LoRA adapter.
        path: the folder of the files.
        adapter_name: which adapter; by default the only active one.

    Returns:
        The files of the LoRAs.

    Raises:
        ImportError, ValueError, OSError: as `export_gguf`.
    """
    name, names, folder = adapter_to_export(model, adapter_name), Names(model), Path(path)
    check_new(folder)
    parts = parts_of(model, name)
    for part, factors in parts.factors.items():
        _write_lora(folder / f"{part}.gguf", names, factors, name, {"repeng.scale": parts.scales[part]})
    write_json(folder / "dial.json", {"scales": parts.scales, "units": parts.units})
    write_text(folder / CARD, _card(model_name(names.base), names.architecture, folder, parts))
    return [folder / f"{part}.gguf" for part in parts.factors]


def _write_lora(
    path: Path, names: Names, factors: Mapping[str, Factors], adapter_name: str, notes: Mapping[str, str]
) -> None:
    """A LoRA of one rank r and alpha = r, which llama.cpp scales by alpha / r = 1; whole or not at all."""
    gguf = gguf_package()
    named = names.factors(of_one_rank(factors, adapter_name))
    with written_whole(path) as place:
        writer = gguf.GGUFWriter(str(place), names.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(next(iter(named.values())).a.shape[0]))
        for key, value in {**notes, "repeng.version": version("repeng")}.items():
            writer.add_string(key, value)
        for name, one in named.items():
            writer.add_tensor(f"{name}.lora_a", one.a.numpy())
            writer.add_tensor(f"{name}.lora_b", one.b.contiguous().numpy())
        _close(writer)


def write_merged(model: nn.Module, path: str | Path, coefficient: float, base_file: str | Path) -> None:
    """Copy the GGUF file of a base and write an adapter at a coefficient into the weights that it changes.

    All else stays as it is in the file. Changed weights are float16, which every engine takes and which keeps the
    size down: they differ by rounding alone, far less than the quantisation that made the file. Where the change is so
    small that more than a hundredth of it would be rounded away, they are float32.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: as `export_gguf`, or the file is not the base of this model.
    """
    gguf = gguf_package()
    adapter_name, names = adapter_to_export(model), Names(model)
    factors = of_one_rank(factors_at(model, coefficient, adapter_name), adapter_name)
    modules = {names.of(module): module for module in factors}
    reader = gguf.GGUFReader(str(base_file))
    there = {tensor.name for tensor in reader.tensors}
    kind = reader.fields["general.architecture"].contents()
    if kind != names.architecture or not modules.keys() <= there:
        lacking = ", ".join(sorted(modules.keys() - there)[:3]) or f"the architecture {names.architecture!r}"
        raise ValueError(f"{base_file} is not the base of this model: it is {kind!r} and lacks {lacking}")
    with written_whole(path) as place:
        writer = gguf.GGUFWriter(str(place), names.architecture)
        for field in reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
        writer.data_alignment = reader.alignment
        writer.add_string("repeng.coefficient", f"{coefficient:g}")
        writer.add_string("repeng.version", version("repeng"))
        for tensor in reader.tensors:
            if tensor.name not in modules:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
                continue
            module = modules[tensor.name]
            before = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
            if not _is_near(names.rows(tensor.name, _weight(names.base.get_submodule(module))), before):
                raise ValueError(f"{base_file} is not the base of this model: {tensor.name} is another weight")
            change = names.rows(tensor.name, factors[module].b @ factors[module].a)
            writer.add_tensor(tensor.name, _rounded(before + change, change).numpy())
        _close(writer)


def _weight(module: nn.Module) -> Tensor:
    """The weight `(d_out d_in)` under an adapter's layer."""
    layer = base_of(module)
    weight = cast(Tensor, layer.weight).detach().float().cpu()
    return weight.mT if isinstance(layer, Conv1D) else weight


def _is_near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= DIFFERS * other.norm())


def _rounded(weight: Tensor, change: Tensor) -> Tensor:
    """In float16, or in float32 if that loses too much of the change."""
    half = weight.half()
    return half if (half.float() - weight).norm() <= LOST * change.norm() else weight


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _card(base: str, architecture: str, folder: Path, parts: Parts) -> str:
    """The README of a dial: how to serve it, and what a request says."""
    files = " ".join(f"--lora {shlex.quote(str(folder / f'{part}.gguf'))}" for part in parts.factors)
    steered = 0.5 * parts.units["plus"]
    scales = [steered if scale == "c" else steered * steered for scale in parts.scales.values()]
    body = {"prompt": "Once upon a time", "lora": [{"id": i, "scale": scale} for i, scale in enumerate(scales)]}
    listed = ", ".join(f"`{part}.gguf` (id {i}) takes {scale}" for i, (part, scale) in enumerate(parts.scales.items()))
    units = (
        "One more step, since the adapter is calibrated: multiply a positive coefficient by "
        f"{parts.units['plus']:g} first, and a negative one by {parts.units['minus']:g}.\n"
    )
    return f"""---
base_model: {base}
tags: [steering, repeng, lora, gguf]
---
A steering adapter of `repeng` for llama.cpp, on the base {base} (architecture `{architecture}`), in any quantisation.

```bash
llama-server -m MODEL.gguf --lora-init-without-apply {files}
```

Every request says how far to steer. At the coefficient 0.5:

```json
{json.dumps(body)}
```

For a coefficient c, {listed}. That is exact at −1, 0 and 1, and near to it in between.
Give `lora` with a scale for every id in every request, at c = 0 with zeros: llama-server answers a request without it
at c = 1, or with what it remembers of the request before.
{units if set(parts.units.values()) != {1.0} else ""}"""
