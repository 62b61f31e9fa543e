"""The commands on the folder of an adapter or the file of a vector: evaluate, calibrate, export and serve."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng import tiny
from repeng.control.adapter_folder import CONFIG, AdapterFolder, read_config
from repeng.control.lora import lora_names, scale_weights
from repeng.control.steer import steer
from repeng.data.arguments import TaskArguments
from repeng.data.files import cache_folder
from repeng.data.folders import check_writable, claimed
from repeng.data.pairs import ContrastPair
from repeng.data.schema import checked
from repeng.data.task import Task, make_task, read_pairs, split_pairs
from repeng.data.trust import own_config, say_model
from repeng.data.yaml_keys import read_keys
from repeng.eval.calibrate import Calibration, KLBudget, kl_spender, set_units
from repeng.eval.calibrate import calibrate as find_calibration
from repeng.eval.compare import compare
from repeng.eval.eval_report import ARMS
from repeng.eval.measure import Dial
from repeng.eval.report.folder import EVALUATION, write_report
from repeng.eval.report.tables import print_doses, print_table
from repeng.export import export_dial, export_gguf, export_gguf_dial, export_lora, export_merged, vector_of
from repeng.export.factors import check_new
from repeng.export.lora import serving_commands
from repeng.export.vectors import control_vector_name, is_vector
from repeng.model.loading import load_base, load_tokenizer
from repeng.model.sources import find_source, gguf_path, name_of_folder
from repeng.model.types import CausalLM
from repeng.model.whole import check_vocabulary
from repeng.serve.limits import Limits
from repeng.train.adapter_files import CALIBRATION, save_adapter
from repeng.vectors.vector import SteeringVector, read_vector

OWN = "this dial"
LARGEST = 4.0  # largest coefficient of an adapter, trained at 1; far beyond, effects shrink but costs may not
TOLERANCE = 0.1


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


def evaluate(
    path: Path,
    task_args: TaskArguments,
    *,
    output: str | None,
    require_steering: bool,
    seed: int,
    use_cpu: bool,
    bf16: bool,
) -> None:
    """Evaluate an adapter or a vector: print the table and the verdict, and write the report.

    Raises:
        SystemExit: `require_steering` is set, and the adapter or vector does not steer.
    """
    steering = _read(path)
    beside = path / EVALUATION if path.is_dir() else path.with_name(f"{path.stem}-report")
    with claimed(output or beside, "--output") as folder:
        base = _load_task_model(task_args, seed, use_cpu, bf16)
        steering.check(base.model)
        task = make_task(task_args, base.model, base.tokenizer, base.pairs, seed=seed, own=base.own)
        loaded = _put_on(steering, base.model)
        comparison = compare(loaded.model, base.tokenizer, task, loaded.dial, OWN, cache=cache_folder())
        write_report(comparison, folder, title=f"{path.name}: {task.behaviour}")
    print_doses(comparison.reports[OWN][0], f"{path}: {task.behaviour}")
    print_table(comparison)
    print(comparison.verdict)
    print(f"report: {folder / 'report.html'}")
    failed = comparison.shortcomings()
    if failed and require_steering:
        sys.exit("error: this does not steer: " + "; ".join(failed))


def calibrate(
    path: Path,
    task_args: TaskArguments,
    *,
    nats: float,
    sequences: int,
    percentile: float,
    seed: int,
    use_cpu: bool,
    bf16: bool,
) -> None:
    """Find and store the calibration, and check it on other prompts of the training set.

    Raises:
        ValueError: there are too few prompts, or the file for the result exists already.
    """
    target = path if path.suffix != ".gguf" else path.with_suffix(".safetensors")
    if target != path and target.exists():
        raise ValueError(
            f"the calibrated vector of a GGUF file is stored as {target}, which exists already: move it, or calibrate "
            "that file"
        )
    budget = KLBudget(nats, percentile, sequences=sequences)
    steering = _read(path)
    with claimed(path, "PATH") if path.is_dir() else nullcontext():
        base = _load_task_model(task_args, seed, use_cpu, bf16)
        steering.check(base.model)
        pairs, _ = split_pairs(task_args, base.pairs, base.own)
        prompts = _training_prompts(pairs, has_template=bool(base.tokenizer.chat_template))
        if len(prompts) < 2:
            raise ValueError(
                f"the pairs have {len(prompts)} prompt to continue; the calibration and its check need two or more"
            )
        loaded = _put_on(steering, base.model)
        largest = LARGEST if loaded.vector is None else 8.0
        calibration = find_calibration(
            loaded.model, base.tokenizer, loaded.dial, prompts[::2], budget, largest=largest
        )
        dial, at = _store(loaded, calibration, target, nats)
    spend = kl_spender(loaded.model, base.tokenizer, dial, prompts[1::2], budget)
    for arm, sign in ARMS:
        spent = budget.nats * spend(at[sign])
        if abs(at[sign]) == 1:
            before = sign * getattr(calibration, arm)
            print(f"c = {at[sign]:+g} is as strong as c = {before:+.3g} was before the calibration.")
        print(
            f"At c = {at[sign]:+.3g}, percentile {budget.percentile:g} of the KL per token is {spent:.3g} nats on "
            f"{len(prompts[1::2])} other prompts. The budget is {budget.nats:g} nats."
        )
        if calibration.spent[arm] < 1 - TOLERANCE:
            print(
                f"  This arm spends {calibration.spent[arm]:.0%} of the budget: no coefficient that was tried spends "
                "all of it."
            )
    print(f"stored: {target}")


def _store(loaded: Loaded, calibration: Calibration, target: Path, nats: float) -> tuple[Dial, dict[int, float]]:
    """Store the calibrated adapter or vector.

    Returns:
        Its dial, and for each sign the coefficient that spends the budget.

    Raises:
        ValueError: the adapter is a LoRA, and neither arm spends the budget at any coefficient that was tried.
    """
    model, vector, at = loaded.model, loaded.vector, {sign: float(sign) for _, sign in ARMS}
    if vector is not None:
        vector = vector.calibrated(calibration.to_dict())
        vector.save(target)
        return partial(steer, model, vector=vector), at
    if not lora_names(cast(nn.Module, model)):
        set_units(model, calibration)
        save_adapter(cast(PeftModel, model), target)
        return loaded.dial, at
    if max(calibration.spent.values()) < 1 - TOLERANCE:
        raise ValueError(
            f"no coefficient up to {LARGEST:g} spends {nats:g} nats: the adapter is left as it is; give fewer --nats"
        )
    factor = min(calibration.plus, calibration.minus)
    scale_weights(cast(nn.Module, model), factor)
    told = json.dumps({"weights_times": factor, **calibration.to_dict()}, indent=1) + "\n"
    save_adapter(cast(PeftModel, model), target, more={CALIBRATION: told})
    print(f"A LoRA has one scale for both arms. Its weights were multiplied by {factor:.3g}.")
    return loaded.dial, {sign: sign * getattr(calibration, arm) / factor for arm, sign in ARMS}


def export(
    path: Path,
    to: str,
    coefficients: list[float] | None,
    output: Path | None,
    model_name_or_path: str | None,
    gguf_file: str | None,
) -> None:
    """Write an adapter or a vector in a format for other software, and print the paths of the files.

    Raises:
        ValueError: the base model is unknown, or the adapter cannot be written in this format.
        FileExistsError: the destination exists already.
    """
    beside = path.resolve()
    check_writable(output.parent if output else beside.parent, "the folder of --output")
    if path.is_file():
        _export_vector(SteeringVector.load(path), output, beside)
        return
    adapter = AdapterFolder.read(path)
    name, gguf_file = (model_name_or_path, gguf_file) if model_name_or_path else _base_of(path)
    model = adapter.load(load_base(name, gguf_file=gguf_file))
    # A single coefficient is written to `place` itself, several coefficients to paths in the folder `place`.
    wanted = [1.0] if coefficients is None else coefficients
    one_or_all = wanted if len(wanted) > 1 else wanted[0]
    if to == "gguf" and is_vector(model):
        if coefficients is not None:
            raise ValueError("--coefficients are for changed weights; a control vector serves all of them")
        _export_vector(vector_of(model), output, beside)
        return
    place = output or beside.with_name(f"{beside.name}-{to}")
    if to == "gguf" and coefficients is None:
        written = export_gguf_dial(model, place)
        print(f"how to serve it: {place / 'README.md'}")
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
    if to == "lora":
        config = cast(LoraConfig, LoraConfig.from_pretrained(str(written[0])))
        commands = serving_commands(written, config.base_model_name_or_path, config.r, path)
        print(f"vLLM serves each of them as a separate model:\n{commands}")


def serve(
    paths: Mapping[str, Path],
    model_name_or_path: str | None,
    gguf_file: str | None,
    *,
    host: str,
    port: int,
    api_key: str | None,
    use_cpu: bool,
    limits: Limits,
) -> None:
    """Serve until a signal ends the server. Running requests then have 30 seconds to finish.

    Raises:
        ValueError: the base model is unknown, the adapters have different bases, or one does not fit the model.
    """
    import uvicorn

    from repeng.serve import Batching, load_dials, make_app

    if model_name_or_path is None:
        bases = {name: _base_of(path) for name, path in paths.items() if path.is_dir()}
        if not bases:
            raise ValueError("a vector does not name its base model; give --model_name_or_path")
        if len(set(bases.values())) > 1:
            told = ", ".join(f"{name}: {base}" for name, (base, _) in bases.items())
            raise ValueError(f"the adapters name different base models ({told}); give --model_name_or_path")
        model_name_or_path, gguf_file = next(iter(bases.values()))
    tokenizer = load_tokenizer(model_name_or_path, gguf_file)
    base = load_base(model_name_or_path, _device(use_cpu), gguf_file=gguf_file)
    check_vocabulary(base, tokenizer)
    dials = load_dials(base, paths)
    allowed = ("*",) if api_key else ("127.0.0.1", "localhost", "[::1]")
    served = Path(model_name_or_path)
    name = served.name if served.exists() else model_name_or_path
    batching = Batching(dials, limits)
    app = make_app(batching, tokenizer, name, api_key, allowed)
    batching.start()  # before the server starts, so a model that cannot be served ends in an error message
    try:
        print(f"model: {name!r}, adapters and vectors: {', '.join(dials.names)}")
        uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=30)
    finally:
        batching.stop()


def _export_vector(vector: SteeringVector, output: Path | None, beside: Path) -> None:
    """Write a control vector. Print its calibration, which llama.cpp does not read."""
    place = _with_ending(output) if output else beside.with_name(control_vector_name(beside.stem, vector))
    check_new(place)
    vector.save_gguf(place)
    print(f"written: {place}")
    units = vector.metadata.get("calibration")
    if units:
        print(f"in llama.cpp, c = 1 is the scale {units['plus']:.4g}, and c = -1 the scale {-units['minus']:.4g}")


def _with_ending(path: Path) -> Path:
    return path if path.suffix == ".gguf" else path.with_name(f"{path.name}.gguf")


def _base_of(folder: Path) -> tuple[str, str | None]:
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


def _device(use_cpu: bool) -> torch.device:
    return torch.device("cpu") if use_cpu else cast(torch.device, PartialState().device)


def _load_task_model(task_args: TaskArguments, seed: int, use_cpu: bool, bf16: bool) -> Base:
    """Check the pairs of a task, then load its base model."""
    own = tiny.task(task_args, seed)
    tokenizer = load_tokenizer(task_args.model_name_or_path, task_args.gguf_file)
    pairs = read_pairs(task_args, tokenizer, seed=seed, own=own)
    model = load_base(
        task_args.model_name_or_path,
        _device(use_cpu),
        gguf_file=task_args.gguf_file,
        load_in_4bit=task_args.load_in_4bit,
        compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    check_vocabulary(model, tokenizer)
    return Base(model, tokenizer, pairs, own)


def _read(path: Path) -> AdapterFolder | SteeringVector:
    """The adapter or vector at `path`, checked before any model is loaded."""
    if path.is_dir():
        return AdapterFolder.read(path)
    return read_vector(path)


def _put_on(steering: AdapterFolder | SteeringVector, model: PreTrainedModel) -> Loaded:
    """Put an adapter or a vector on a model."""
    if isinstance(steering, AdapterFolder):
        adapted = steering.load(model)
        return Loaded(adapted, partial(steer, adapted), None)
    steering.check(model)
    return Loaded(model, partial(steer, model, vector=steering), steering)


def _training_prompts(pairs: Sequence[ContrastPair], *, has_template: bool) -> list[str]:
    """The prompts that the calibration continues: the suffixes of the pairs, which hold no persona.

    With a chat template, or if a pair has no suffix, they are both sides of each pair.
    """
    if has_template or not all(pair.suffix for pair in pairs):
        texts = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    else:
        texts = [pair.suffix for pair in pairs]
    return list(dict.fromkeys(texts))


COMMANDS: dict[str, Callable[..., None]] = {"evaluate": evaluate, "calibrate": calibrate}
