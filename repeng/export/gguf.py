"""Export adapters for llama.cpp as GGUF: LoRAs at a fixed coefficient, a dial of two LoRAs, and a merged model.

It needs the extra `gguf`.
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

from repeng._file_names import CARD
from repeng.data.files import write_json, write_text, written_whole
from repeng.data.folders import check_new
from repeng.export.factors import (
    Factors,
    Parts,
    adapter_to_export,
    factors_at,
    new_places,
    of_one_rank,
    parts_of,
)
from repeng.model.loading import model_name
from repeng.tuner.base import base_of
from repeng.vectors.gguf import gguf_package

DIFFERS = 0.01  # relative difference allowed between base and file; rounding to bfloat16 stays below it
LOST = 0.01  # share of an adapter's change that rounding to float16 may lose


class Layout(NamedTuple):
    """How llama.cpp stores an architecture: its name in GGUF, and whether the rows of q and k are reordered."""

    architecture: str
    reordered: bool = False


# By transformers' model_type: architectures whose linear weights llama.cpp's converter changes at most in row order.
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
    """Names and row order of a model's weights in GGUF.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: this module does not know how GGUF stores the architecture, or the package gguf does not know it.
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
                f"repeng does not know how llama.cpp stores the weights of a {self.config.model_type} model; it knows "
                f"{', '.join(LAYOUTS)}. Write plain LoRAs or a merged model in safetensors, and convert them with "
                "llama.cpp's convert_lora_to_gguf.py or convert_hf_to_gguf.py"
            )
        self.architecture: str = layout.architecture
        self.reordered: bool = layout.reordered
        found = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture]
        if not found:
            raise ValueError(f"the installed package gguf knows no {self.architecture!r}; install a newer one")
        self._table = gguf.get_tensor_name_map(found[0], self.config.num_hidden_layers)

    def of(self, module: str) -> str:
        """The name of a linear layer's tensor in GGUF, from the layer's name in the base model.

        Raises:
            ValueError: GGUF has no tensor for this layer.
        """
        # llama.cpp stores the text model of a vision-language model in a separate file.
        name = self._table.get_name(module.replace("language_model.", ""))
        if name is None:
            raise ValueError(f"{module} has no name in a GGUF file of the architecture {self.architecture!r}")
        if name == "output" and self.config.tie_word_embeddings:
            raise ValueError(f"{module} is tied to the embeddings, so llama.cpp has no separate weight for it")
        return f"{name}.weight"

    def rows(self, name: str, weight: Tensor) -> Tensor:
        """A matrix `(d_out, …)` with its rows in the order of the tensor `name`.

        Rotary embeddings rotate pairs of rows in a head. transformers stores the first rows of all pairs and then the
        second rows; llama.cpp stores the two rows of a pair next to each other in some architectures.
        """
        part = name.split(".")[-2]
        if not self.reordered or part not in ("attn_q", "attn_k"):
            return weight
        heads = self.config.num_attention_heads if part == "attn_q" else self.config.num_key_value_heads
        return rearrange(weight, "(head half pair) d -> (head pair half) d", head=heads, half=2)

    def factors(self, factors: Mapping[str, Factors]) -> dict[str, Factors]:
        """The same changes with the tensor names and the row order of GGUF."""
        named = {self.of(module): one for module, one in factors.items()}
        return {name: Factors(one.a, self.rows(name, one.b)) for name, one in named.items()}


def export_gguf(
    model: nn.Module, path: str | Path, coefficient: float | Sequence[float] = 1.0, adapter_name: str | None = None
) -> list[Path]:
    """Write an adapter at a fixed coefficient as a LoRA for llama.cpp; the LoRA is exact at this coefficient.

    Args:
        model: a model with a steering or LoRA adapter.
        path: the file; for several coefficients, the folder for their files.
        coefficient: one coefficient, or several.
        adapter_name: the adapter; by default the only active one.

    Returns:
        The written files.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: there is no such adapter, the adapter acts on the residual stream or on a layer that llama.cpp
            has no name for, or the architecture is unknown.
        OSError: a file cannot be written, or it already exists.
    """
    name, names = adapter_to_export(model, adapter_name), Names(model)
    places = new_places(path, coefficient, ".gguf")
    for c, place in places:
        _write_lora(place, names, factors_at(model, c, name), name, {"repeng.coefficient": f"{c:g}"})
    return [place for _, place in places]


def export_gguf_dial(model: nn.Module, path: str | Path, adapter_name: str | None = None) -> list[Path]:
    """Write an adapter as one or two LoRAs for llama.cpp, whose scales are functions of one coefficient.

    `llama-server` takes scales in each request, so every request can have its own coefficient. The parts, their scales
    and `dial.json` are those of `export_dial`; a README says how to serve them.

    Args:
        model: a model with a steering or LoRA adapter.
        path: the folder for the files.
        adapter_name: the adapter; by default the only active one.

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
    """Write a LoRA of rank r with alpha = r, which llama.cpp scales by alpha / r = 1; on an error, write no file."""
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
    """Copy the GGUF file of a base model and merge an adapter at a coefficient into the copy.

    Only the weights that the adapter changes are rewritten. They are written in float16, which every engine reads and
    which needs little space. Their rounding error is far below that of the file's quantisation. If rounding to float16
    would lose more than a hundredth of the change of a weight, the weight is written in float32.

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
    """The base weight `(d_out d_in)` under an adapter's layer."""
    layer = base_of(module)
    weight = cast(Tensor, layer.weight).detach().float().cpu()
    return weight.mT if isinstance(layer, Conv1D) else weight


def _is_near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= DIFFERS * other.norm())


def _rounded(weight: Tensor, change: Tensor) -> Tensor:
    """The weight in float16, or in float32 if float16 would lose too much of the change."""
    half = weight.half()
    return half if (half.float() - weight).norm() <= LOST * change.norm() else weight


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _card(base: str, architecture: str, folder: Path, parts: Parts) -> str:
    """The README of a dial: how to serve it and how to set the coefficient in a request."""
    files = " ".join(f"--lora {shlex.quote(str(folder / f'{part}.gguf'))}" for part in parts.factors)
    steered = 0.5 * parts.units["plus"]
    scales = [steered if scale == "c" else steered * steered for scale in parts.scales.values()]
    body = {"prompt": "Once upon a time", "lora": [{"id": i, "scale": scale} for i, scale in enumerate(scales)]}
    listed = ", ".join(f"`{part}.gguf` (id {i}) takes {scale}" for i, (part, scale) in enumerate(parts.scales.items()))
    units = (
        "The adapter is calibrated, so first multiply a positive coefficient by "
        f"{parts.units['plus']:g} and a negative one by {parts.units['minus']:g}.\n"
    )
    return f"""---
base_model: {base}
tags: [steering, repeng, lora, gguf]
---
A steering adapter of `repeng` for llama.cpp. Its base model is {base} (architecture `{architecture}`), in any
quantisation.

```bash
llama-server -m MODEL.gguf --lora-init-without-apply {files}
```

Every request sets its own coefficient. For the coefficient 0.5, send:

```json
{json.dumps(body)}
```

For a coefficient c, {listed}. This is exact at −1, 0 and 1, and approximate in between.
Every request must have `lora` with a scale for every id; at c = 0, all scales are 0. llama-server answers a request
without `lora` at c = 1, or with the scales of an earlier request.
{units if set(parts.units.values()) != {1.0} else ""}"""
