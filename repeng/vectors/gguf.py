"""GGUF control vectors, in the layout of llama.cpp; needs the package gguf (`pip install 'repeng[gguf]'`)."""

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from repeng.data.files import written_whole
from repeng.vectors.easysteer import check_place

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
        ValueError: it is not a control vector.
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
    check_place(reader, path)
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
