"""Adapters, vectors and base models, as the commands load them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng import tiny
from repeng.control.adapter_folder import CONFIG, AdapterFolder, read_config
from repeng.control.dials import Dials, load_dials
from repeng.control.steer import steer
from repeng.data.arguments import TaskArguments
from repeng.data.pairs import ContrastPair
from repeng.data.schema import checked
from repeng.data.task import Task, draft_pairs, read_pairs
from repeng.data.trust import own_config, say_model
from repeng.data.yaml_keys import read_keys
from repeng.eval.measure import Dial
from repeng.model.loading import load_base, load_tokenizer
from repeng.model.sources import name_of_folder
from repeng.model.types import CausalLM
from repeng.model.whole import check_vocabulary
from repeng.vectors.vector import SteeringVector, read_vector


class Base(NamedTuple):
    """A base model, its tokenizer, the pairs of the task, and the model's own task, if it has one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: list[ContrastPair]
    own: Task | None


class Loaded(NamedTuple):
    """The steered model, its dial, and the vector; the vector is None for an adapter."""

    model: CausalLM
    dial: Dial
    vector: SteeringVector | None


class Steerable(NamedTuple):
    """A model with the adapters and vectors that can steer it, its tokenizer, and the name of the base model."""

    dials: Dials
    tokenizer: PreTrainedTokenizerBase
    name: str


def device_for(use_cpu: bool) -> torch.device:
    """The CPU, or the device that accelerate chooses."""
    return torch.device("cpu") if use_cpu else cast(torch.device, PartialState().device)


def load_task_pairs(
    task_args: TaskArguments, seed: int
) -> tuple[PreTrainedTokenizerBase, list[ContrastPair], Task | None]:
    """The tokenizer of a task's model, the pairs, checked with it, and the model's own task, if it has one."""
    own = tiny.task(task_args, seed)
    tokenizer = load_tokenizer(task_args.model_name_or_path, task_args.gguf_file)
    return tokenizer, read_pairs(task_args, tokenizer, seed=seed, own=own), own


def load_drafted_pairs(task_args: TaskArguments, seed: int) -> tuple[PreTrainedTokenizerBase, list[ContrastPair]]:
    """The tokenizer of a task's model and the pairs, which are not checked with it."""
    pairs = draft_pairs(task_args, seed=seed, own=tiny.task(task_args, seed))
    return load_tokenizer(task_args.model_name_or_path, task_args.gguf_file), pairs


def load_task_model(task_args: TaskArguments, seed: int, use_cpu: bool, bf16: bool) -> Base:
    """Check the pairs of a task, then load its base model."""
    tokenizer, pairs, own = load_task_pairs(task_args, seed)
    model = load_base(
        task_args.model_name_or_path,
        device_for(use_cpu),
        gguf_file=task_args.gguf_file,
        load_in_4bit=task_args.load_in_4bit,
        compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    check_vocabulary(model, tokenizer)
    return Base(model, tokenizer, pairs, own)


def read_steering(path: Path) -> AdapterFolder | SteeringVector:
    """The adapter or vector at `path`, checked before any model is loaded."""
    if path.is_dir():
        return AdapterFolder.read(path)
    return read_vector(path)


def put_on(steering: AdapterFolder | SteeringVector, model: PreTrainedModel) -> Loaded:
    """Put an adapter or a vector on a model."""
    if isinstance(steering, AdapterFolder):
        adapted = steering.load(model)
        return Loaded(adapted, partial(steer, adapted), None)
    steering.check(model)
    return Loaded(model, partial(steer, model, vector=steering), steering)


def base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """Name and GGUF file of the base model, from the run's configuration or the adapter's. Prints the name."""
    keys: dict[str, Any] = {}
    found = own_config(folder)
    if found is not None:
        keys = {key.name: key.value for key in read_keys(found)}
    for name in ("model_name_or_path", "gguf_file"):
        checked(str | None, keys.get(name), f"{found}: {name}")
    if not keys.get("model_name_or_path"):
        found = folder / CONFIG
        keys = {"model_name_or_path": read_config(folder).base_model_name_or_path}
    if not keys["model_name_or_path"]:
        raise ValueError(f"{folder} does not name its base model; give --model_name_or_path")
    say_model(keys, cast(Path, found))
    name = keys["model_name_or_path"]
    return name_of_folder(name) or name, keys.get("gguf_file")


def open_dials(
    paths: Mapping[str, Path], model_name_or_path: str | None, gguf_file: str | None, use_cpu: bool
) -> Steerable:
    """Load the base model with adapters and vectors.

    Without `model_name_or_path`, the base model is the one that the adapters name, else the one that the vectors name.

    Raises:
        ValueError: the base model is unknown, the adapters have different bases, or one does not fit the model.
    """
    if model_name_or_path is None:
        model_name_or_path, gguf_file = shared_base(paths)
    tokenizer = load_tokenizer(model_name_or_path, gguf_file)
    model = load_base(model_name_or_path, device_for(use_cpu), gguf_file=gguf_file)
    check_vocabulary(model, tokenizer)
    folder = Path(model_name_or_path)
    name = folder.name if folder.exists() else model_name_or_path
    return Steerable(load_dials(model, paths), tokenizer, name)


def shared_base(paths: Mapping[str, Path]) -> tuple[str, str | None]:
    """Name and GGUF file of the base model that all adapters, or else all vectors, name."""
    bases = {name: base_of_adapter(path) for name, path in paths.items() if path.is_dir()}
    if not bases:
        bases = {name: (base_of_vector(path), None) for name, path in paths.items()}
    if len(set(bases.values())) > 1:
        told = ", ".join(f"{name}: {base}" for name, (base, _) in bases.items())
        raise ValueError(f"the adapters and vectors name different base models ({told}); give --model_name_or_path")
    return next(iter(bases.values()))


def base_of_vector(path: Path) -> str:
    """The base model that the file of a vector names. Prints the name.

    Raises:
        ValueError: it names none.
    """
    named = read_vector(path).metadata.get("model")
    if not named:
        raise ValueError(f"{path} does not name its base model; give --model_name_or_path")
    name = name_of_folder(named) or named
    if Path(name).is_absolute() and not Path(name).exists():
        raise ValueError(f"{path} names the base model {name}, which is not here; give --model_name_or_path")
    say_model({"model_name_or_path": name}, path)
    return name
