"""GGUF control vectors in the layout of llama.cpp; needs the extra `gguf`.

The layout has no fields for the operation, the place and the model of a direction. Keys under `repeng.` hold them, for
people and for `read_control_vector`; llama.cpp ignores these keys.
"""

import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repeng._extras import install_command
from repeng.data.files import written_whole
from repeng.model.gguf_header import check_gguf
from repeng.vectors.easysteer import check_place

ARCHITECTURE = "controlvector"
MODEL_HINT = f"{ARCHITECTURE}.model_hint"
# Every engine that reads this layout does exactly this, so no other values are accepted in a file.
MEANING = {"repeng.operation": "add", "repeng.hook_point": "residual stream after the decoder layer"}
LAYERS = "repeng.layers"
LAYER_COUNTING = "direction.N is added after decoder layer N; the first one is layer 0"
TEXTS = ("model", "model_type")  # keys of a vector's metadata
UNITS = ("plus", "minus")  # keys of a vector's calibration


def gguf_package() -> ModuleType:
    """Import the package gguf; if it is missing, raise an ImportError that says how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"reading and writing GGUF needs the package gguf: {install_command('gguf')}") from error
    return gguf


def write_control_vector(
    path: str | Path, directions: dict[int, Tensor], model_hint: str, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write tensors `direction.LAYER (d)`, float32; on an error, no file is written.

    From the metadata of a vector, `model`, `model_type` and the units of `calibration` are written.
    """
    metadata = metadata or {}
    gguf = gguf_package()
    with written_whole(path) as place:
        writer = gguf.GGUFWriter(str(place), ARCHITECTURE)
        writer.add_string(MODEL_HINT, model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        for key, value in MEANING.items():
            writer.add_string(key, value)
        writer.add_array(LAYERS, sorted(directions))
        writer.add_string("repeng.layer_counting", LAYER_COUNTING)
        writer.add_string("repeng.version", version("repeng"))
        for key in TEXTS:
            if metadata.get(key):
                writer.add_string(f"repeng.{key}", str(metadata[key]))
        for unit in UNITS if metadata.get("calibration") else ():
            writer.add_float64(f"repeng.calibration.{unit}", float(metadata["calibration"][unit]))
        for layer, direction in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", direction.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_control_vector(path: str | Path) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Read a control vector: directions by layer, and metadata (`model_hint` and those of `write_control_vector`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a control vector, its metadata contradict its tensors, or it needs an operation or
            place that is not supported.
    """
    gguf = gguf_package()
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    check_gguf(path)
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is not a complete GGUF file ({type(error).__name__}: {error})") from error
    architecture = reader.get_field("general.architecture")
    kind = architecture.contents() if architecture else "an unnamed architecture"
    hint = reader.get_field(MODEL_HINT)
    if kind != ARCHITECTURE or hint is None:
        raise ValueError(f"{path} is a GGUF file of {kind!r}, not a control vector with a {MODEL_HINT}")
    check_place(reader, path)
    read = [gguf.GGMLQuantizationType[name] for name in ("F16", "F32", "F64")]
    directions = {}
    for tensor in reader.tensors:
        name, _, layer = tensor.name.partition(".")
        if name != "direction" or not re.fullmatch("0|[1-9][0-9]{0,5}", layer, re.ASCII):
            raise ValueError(f"{path} holds {tensor.name!r}; a control vector holds only tensors direction.LAYER")
        if tensor.tensor_type not in read:
            raise ValueError(f"{path} holds {tensor.name!r} as {tensor.tensor_type.name}; F16, F32 and F64 are read")
        if tensor.data.ndim != 1:
            raise ValueError(f"{path} holds {tensor.name!r} with {tensor.data.ndim} dimensions; a direction has one")
        # A copy, since the reader maps the file into memory.
        with np.errstate(over="ignore"):  # `check_directions` refuses infinity later
            directions[int(layer)] = torch.tensor(tensor.data.astype("float32"))
    if not directions:
        raise ValueError(f"{path} holds no directions")
    return directions, {"model_hint": hint.contents(), **_told(reader, path, sorted(directions))}


def _told(reader: Any, path: str | Path, layers: list[int]) -> dict[str, Any]:
    """The checked metadata from the keys under `repeng.`; empty if there are no such keys. Other keys are ignored."""
    told = {key: field.contents() for key, field in reader.fields.items() if key.startswith("repeng.")}
    for key, value in MEANING.items():
        if told.get(key, value) != value:
            raise ValueError(f"{path} has {key} = {told[key]!r}; a control vector has {value!r}")
    if told.get(LAYERS, layers) != layers:
        raise ValueError(f"{path} names the layers {told[LAYERS]}, but holds directions for {layers}")
    metadata: dict[str, Any] = {key: told[f"repeng.{key}"] for key in TEXTS if f"repeng.{key}" in told}
    units = {unit: told[f"repeng.calibration.{unit}"] for unit in UNITS if f"repeng.calibration.{unit}" in told}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} names its model by {metadata}; the values must be texts")
    if units:
        if units.keys() != {*UNITS} or not all(isinstance(u, float) and 0 < u < math.inf for u in units.values()):
            raise ValueError(f"{path} has the calibration {units}; it must have positive numbers {UNITS}")
        metadata["calibration"] = units
    return metadata
