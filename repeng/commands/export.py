"""Write an adapter or a vector in a format for other software."""

from pathlib import Path
from typing import Any, cast

from peft import LoraConfig

from repeng._file_names import CARD
from repeng.commands.base import base_of_adapter
from repeng.control.adapter_folder import AdapterFolder
from repeng.data.folders import check_new, check_writable
from repeng.export import export_dial, export_gguf, export_gguf_dial, export_lora, export_merged, vector_of
from repeng.export.lora import serving_commands
from repeng.export.vectors import control_vector_name, is_vector
from repeng.model.loading import load_base, load_tokenizer
from repeng.model.sources import find_source, gguf_path
from repeng.vectors.vector import SteeringVector, read_vector


def export(
    path: Path,
    beside: Path,
    to: str,
    coefficients: list[float] | None,
    output: Path | None,
    model_name_or_path: str | None,
    gguf_file: str | None,
) -> dict[str, Any]:
    """Write an adapter or a vector in a format for other software, and print the paths of the files.

    Without `output`, the path of the result is that of `beside` with an ending.

    Raises:
        ValueError: the base model is unknown, or the adapter cannot be written in this format.
        FileExistsError: the destination exists already.
    """
    beside = beside.resolve()
    check_writable(output.parent if output else beside.parent, "the folder of --output")
    if path.is_file():
        return _export_vector(read_vector(path), output, beside)
    adapter = AdapterFolder.read(path)
    name, gguf_file = (model_name_or_path, gguf_file) if model_name_or_path else base_of_adapter(path)
    model = adapter.load(load_base(name, gguf_file=gguf_file))
    # A single coefficient is written to `place` itself, several coefficients to paths in the folder `place`.
    wanted = [1.0] if coefficients is None else coefficients
    one_or_all = wanted if len(wanted) > 1 else wanted[0]
    if to == "gguf" and is_vector(model):
        if coefficients is not None:
            raise ValueError("--coefficients are for changed weights; a control vector serves all of them")
        return _export_vector(vector_of(model), output, beside)
    place = output or beside.with_name(f"{beside.name}-{to}")
    if to == "gguf" and coefficients is None:
        written = export_gguf_dial(model, place)
        print(f"how to serve it: {place / CARD}")
    elif to == "gguf":
        if len(wanted) == 1:
            place = _with_ending(output or beside.with_name(f"{beside.name}-c{wanted[0]:+g}.gguf"))
        written = export_gguf(model, place, one_or_all)
    elif to == "merged":
        tokenizer = None if place.suffix == ".gguf" else load_tokenizer(name, gguf_file)
        written = export_merged(model, place, wanted[0], tokenizer, gguf_path(find_source(name, gguf_file)))
    elif to == "dial":
        written = export_dial(model, place)
    else:
        written = export_lora(model, place, one_or_all)
    for file in written:
        print(f"written: {file}")
    commands = None
    if to == "lora":
        config = cast(LoraConfig, LoraConfig.from_pretrained(str(written[0])))
        commands = serving_commands(written, config.base_model_name_or_path, config.r, path)
        print(f"vLLM serves each of them as a separate model:\n{commands}")
    return {"to": to, "written": [str(file) for file in written], "serve": commands}


def _export_vector(vector: SteeringVector, output: Path | None, beside: Path) -> dict[str, Any]:
    """Write a control vector. Print its calibration, which llama.cpp does not read."""
    place = _with_ending(output) if output else beside.with_name(control_vector_name(beside.stem, vector))
    check_new(place)
    vector.save_gguf(place)
    print(f"written: {place}")
    units = vector.metadata.get("calibration")
    if units:
        print(f"in llama.cpp, c = 1 is the scale {units['plus']:.4g}, and c = -1 the scale {-units['minus']:.4g}")
    return {"to": "gguf", "written": [str(place)], "units": units}


def _with_ending(path: Path) -> Path:
    return path if path.suffix == ".gguf" else path.with_name(f"{path.name}.gguf")
