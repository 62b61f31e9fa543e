"""GGUF control vectors, in the layout of llama.cpp; needs the package gguf (`pip install 'repeng[gguf]'`)."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from repeng.data.files import written_whole

ARCHITECTURE = "controlvector"
MODEL_HINT = f"{ARCHITECTURE}.model_hint"


def _gguf_package() -> ModuleType:
    """The package, or an ImportError that says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading and writing GGUF needs the package gguf: pip install 'repeng[gguf]'") from error
    return gguf


def write_control_vector(path: str | Path, directions: dict[int, Tensor], model_hint: str) -> None:
    """Write tensors `direction.LAYER (d)`, float32; whole or not at all."""
    gguf = _gguf_package()
    with written_whole(path) as place:
        writer = gguf.GGUFWriter(str(place), ARCHITECTURE)
        writer.add_string(MODEL_HINT, model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        for layer, direction in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", direction.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_control_vector(path: str | Path) -> tuple[dict[int, Tensor], str]:
    """Directions by layer, and the model hint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a control vector, or one for another place than the residual stream.
    """
    gguf = _gguf_package()
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    reader = gguf.GGUFReader(str(path))
    architecture = reader.get_field("general.architecture")
    kind = architecture.contents() if architecture else "nothing that is named"
    hint = reader.get_field(MODEL_HINT)
    if kind != ARCHITECTURE or hint is None:
        raise ValueError(f"{path} is a GGUF file of {kind!r}, not a control vector with a {MODEL_HINT}")
    _check_place(reader, path)
    read = [gguf.GGMLQuantizationType[name] for name in ("F16", "F32", "F64")]
    directions = {}
    for tensor in reader.tensors:
        name, _, layer = tensor.name.partition(".")
        if name != "direction" or not layer.isdigit():
            raise ValueError(f"{path} holds {tensor.name!r}; a control vector holds direction.LAYER only")
        if tensor.tensor_type not in read:
            raise ValueError(f"{path} holds {tensor.name!r} as {tensor.tensor_type.name}; F16, F32 and F64 are read")
        if tensor.data.ndim != 1:
            raise ValueError(f"{path} holds {tensor.name!r} with {tensor.data.ndim} dimensions; a direction has one")
        # A copy, since the reader maps the file into memory.
        directions[int(layer)] = torch.tensor(tensor.data.astype("float32"))
    if not directions:
        raise ValueError(f"{path} holds no directions")
    return directions, hint.contents()


def _check_place(reader: Any, path: str | Path) -> None:
    """Raise ValueError if EasySteer says that its directions are for something else than the residual stream.

    ZJU-REAL/EasySteer writes the layout of llama.cpp (easysteer/extraction/result.py) and counts decoder layers from
    0; `direction.N` is added to the output of layer N. Since version 1 of its own key, JSON tells the component; its
    older files do not, but the method "iti" is for attention heads only.
    """
    own, method = (reader.get_field(f"{ARCHITECTURE}.{key}") for key in ("easysteer", "method"))
    try:
        told = json.loads(own.contents()) if own else {"version": 1}
    except json.JSONDecodeError:
        told = None
    if not isinstance(told, dict) or told.get("version") != 1:
        raise ValueError(f"{path} holds metadata of EasySteer in an unknown version; 1 is read: export it with that")
    component = told.get("component") or ("attention_heads" if method and method.contents() == "iti" else None)
    if component not in (None, "hidden_states"):
        raise ValueError(
            f"{path} is for the component {component!r} of EasySteer, and a control vector acts on the residual "
            "stream; extract one from 'hidden_states'"
        )
