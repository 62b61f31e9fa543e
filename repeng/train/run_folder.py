"""The files of a finished run: the adapter, its configuration, the log, the report, a model card."""

import importlib.metadata
import json
import os
import platform
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import yaml
from peft import LoraConfig
from transformers import Trainer

from repeng._file_names import CALIBRATION, CARD, CONFIG, EVALUATION, REPORT, REPORT_FILES
from repeng.data.arguments import TaskArguments
from repeng.data.configuration import default_of
from repeng.data.files import staged, write_text, written_whole
from repeng.data.yaml_keys import read_keys
from repeng.eval.compare import compare
from repeng.eval.comparison import Comparison
from repeng.eval.report import figures
from repeng.eval.report.folder import report_files, write_report
from repeng.hub.card import SHOWN_PAIRS, Adapter, adapter_card
from repeng.model.cache import cache_folder
from repeng.model.hub import hub_id_of
from repeng.model.sharded import is_sharded
from repeng.train.adapter_files import ADAPTER, adapter_state, save_adapter
from repeng.train.arguments import SteeringArguments
from repeng.train.build import Run
from repeng.train.learning_curve import learning_curve
from repeng.train.recipe import Recipe
from repeng.train.resume import RUN

LOG, CURVE = "training_log.jsonl", "learning_curve.png"
ABOUT = (LOG, CURVE, CARD, *REPORT_FILES)  # files that describe the adapter
LATER = (CALIBRATION, *(f"{EVALUATION}/{name}" for name in REPORT_FILES))  # files that other commands write about it
AIM = (
    "model_name_or_path",
    "gguf_file",
    "pairs_file",
    "positive",
    "negative",
    "adapter",
)  # keys that must agree between two runs in one folder
PACKAGES = ("repeng", "torch", "transformers", "peft", "accelerate")


def check_older_run(folder: str | Path, task_args: TaskArguments, args: SteeringArguments) -> None:
    """Raise ValueError if `folder` holds the files of a run with another aim (see `AIM`), or of no complete run."""
    place = Path(folder)
    there = [name for name in (CONFIG, *ADAPTER, *ABOUT) if os.path.lexists(place / name)]
    if not there:
        return
    advice = "Give another output_dir, or move them away"
    if CONFIG not in there and {*there} <= {*ADAPTER} and any(place.glob(f"checkpoint-*/{RUN}")):
        return  # a push to the hub copied the adapter from a checkpoint, which describes its run
    if CONFIG not in there or not all((place / name).is_file() for name in there):
        raise ValueError(
            f"output_dir {folder} holds {', '.join(there)}, which is not the output of a complete run. {advice}"
        )
    try:
        older = {key.name: key.value for key in read_keys(place / CONFIG)}
        different = _differences(older, {**asdict(task_args), "adapter": args.adapter})
    except ValueError as error:
        raise ValueError(f"output_dir {folder}: {CONFIG} does not hold the keys of a run. {advice}") from error
    if different:
        raise ValueError(f"output_dir {folder} holds the files of another run: {'; '.join(different)}. {advice}")


def _differences(older: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One text per key of `AIM` in which two runs differ."""
    default = {one.name: default_of(one) for kind in (TaskArguments, Recipe) for one in fields(kind)}
    return [
        f"{name} {older.get(name, default[name])!r} there, {now[name]!r} here"
        for name in AIM
        if older.get(name, default[name]) != now[name]
    ]


def finish(task_args: TaskArguments, args: SteeringArguments, run: Run, trainer: Trainer) -> Comparison | None:
    """Save the adapter, compare it, write the report. Every process must call this; rank 0 gets the comparison."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    first, sharded, state = trainer.is_world_process_zero(), is_sharded(model), adapter_state(model)
    if first:
        config = yaml.safe_dump(as_config(task_args, args, run), sort_keys=False)
        older = [Path(args.output_dir) / name for name in (*ABOUT, *LATER)]
        save_adapter(model, args.output_dir, state, more={CONFIG: config}, stale=older)
    comparison, start = None, time.perf_counter()
    if sharded:  # every process holds a part of the model, so all of them run it
        comparison = compare(run.model, run.tokenizer, run.task)
    # The other processes end here. A process that exits without leaving its group could crash and take rank 0 along.
    trainer.accelerator.end_training()
    if not first:
        return None
    comparison = comparison or compare(run.model, run.tokenizer, run.task, cache=cache_folder())
    _write_folder(task_args, args, run, trainer, comparison, time.perf_counter() - start)
    return comparison


def _write_folder(
    task_args: TaskArguments,
    args: SteeringArguments,
    run: Run,
    trainer: Trainer,
    comparison: Comparison,
    seconds: float,
) -> None:
    """Write the training log, the learning curve, the report as JSON, CSV, PNG and HTML, and README.md."""
    history, names = trainer.state.log_history, [LOG, CARD, *report_files()]
    curve = learning_curve(history) if figures.available() else None
    about = {
        "seed": args.seed,
        "optimizer_steps": trainer.state.global_step,
        "training_pairs": len(run.examples),
        "behaviour": run.task.behaviour,
        "words": run.task.words,
        "first_pairs": [asdict(pair) for pair in run.task.pairs[:SHOWN_PAIRS]],
        "warnings": [] if run.doubt is None else [run.doubt],
        "seconds": {"training": _training_seconds(history), "comparison": round(seconds, 1)},
        "adapted": sorted(cast(Any, run.model.base_model).targeted_module_names),
        "trainable_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
    }
    with staged(args.output_dir, names if curve is None else [*names, CURVE]) as folder:
        write_text(folder / LOG, "".join(json.dumps(row) + "\n" for row in history))
        if curve is not None:
            with written_whole(folder / CURVE) as place:
                curve.savefig(place, dpi=110)
        write_report(comparison, folder, title=f"Steering adapter: {run.task.behaviour}", about=about)
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        write_text(folder / CARD, _model_card(run, args.output_dir, task_args.gguf_file, report, figures.available()))


def _training_seconds(history: list[dict[str, Any]]) -> float | None:
    """Duration of the training loop, without the computations before it; None if it was not logged."""
    return next((row["train_runtime"] for row in reversed(history) if "train_runtime" in row), None)


def as_config(task_args: TaskArguments, args: SteeringArguments, run: Run) -> dict[str, Any]:
    """The configuration that repeats the run: the keys of this package, and other keys that were given."""
    names = [*(f.name for f in fields(Recipe)), *args.changed]
    training = {**args.to_dict(), **asdict(run.sites), **({"r": None} if args.adapter == "bias" else {})}
    chosen = {**asdict(task_args), "model_name_or_path": run.base, **{name: training[name] for name in names}}
    return {name: value for name, value in chosen.items() if value is not None and not name.endswith("_token")}


def _model_card(run: Run, folder: str, gguf_file: str | None, report: dict[str, Any], drawn: bool) -> str:
    """README of the adapter. A relative output folder is named in it as it was given."""
    on_hub, place = hub_id_of(run.base), Path(folder)
    config = run.model.peft_config[cast(str, run.model.active_adapter)]
    return adapter_card(
        Adapter(
            place="." if place.is_absolute() else place.as_posix(),
            base=Path(run.base).name if Path(run.base).is_absolute() else run.base,
            gguf_file=gguf_file,
            on_hub=on_hub,
            is_lora=isinstance(config, LoraConfig),
            has_template=bool(run.tokenizer.chat_template),
            behaviour=run.task.behaviour,
            words=run.task.words,
            pairs=run.task.pairs,
            report=report,
            has_picture=drawn,
            warnings=report["warnings"],
        )
    )
