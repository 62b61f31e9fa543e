"""Extract a steering vector."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from repeng.commands.base import load_task_model
from repeng.data.arguments import TaskArguments
from repeng.data.files import nearest
from repeng.data.folders import check_new, check_writable
from repeng.data.kinds import layer_request
from repeng.model.sites import decoder_layers
from repeng.vectors.directions import METHODS
from repeng.vectors.extract import extract

DEPTH = 2 / 3  # where a vector works on the models that were measured


def extract_vector(
    task_args: TaskArguments, *, method: str, layers: list[str] | None, output: str | None, seed: int, use_cpu: bool
) -> dict[str, Any]:
    """Extract a vector from the pairs of a task, and write it.

    Raises:
        ValueError: the method or a layer is unknown, or the pairs do not fit the model.
        FileExistsError: the file exists already.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{nearest(method, METHODS)}; choose one of {', '.join(METHODS)}")
    place = Path(output or f"{_name(task_args)}.safetensors")
    if place.suffix != ".safetensors":
        raise ValueError(f"--output should end in .safetensors; got {str(place)!r}")
    check_new(place)
    check_writable(place.parent, "the folder of --output")
    base = load_task_model(task_args, seed, use_cpu, bf16=False)
    where = [usual_layer(base.model)] if layers is None else layer_request(layers)
    vector = extract(base.model, base.tokenizer, base.pairs, layers=where, method=method, seed=seed)
    vector.save(place)
    print(vector.describe())
    print(f"written: {place}. c = 1 adds it once; repeng calibrate sets c = ±1 to a stated cost.")
    accuracy = vector.metadata.get("accuracy", {})
    return {"written": str(place), "method": method, "layers": vector.layers, "accuracy": accuracy}


def usual_layer(model: PreTrainedModel) -> int:
    """The layer for a vector if the user names none."""
    return round(DEPTH * len(decoder_layers(model)))


def _name(task_args: TaskArguments) -> str:
    if task_args.pairs_file is not None:
        return Path(task_args.pairs_file).stem
    return "-".join(f"{task_args.positive}-{task_args.negative}".split())
