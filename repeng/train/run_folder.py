"""What a run leaves behind: the adapter, its configuration, the log, the report, a model card."""

import importlib.metadata
import json
import os
import platform
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import Trainer

from repeng.data.arguments import TaskArguments
from repeng.data.configuration import default_of
from repeng.data.files import cache_folder, staged, write_text, written_whole
from repeng.data.yaml_keys import read_keys
from repeng.eval.compare import compare
from repeng.eval.comparison import Comparison
from repeng.eval.report import figures
from repeng.eval.report.folder import EVALUATION, FILES, report_files, write_report
from repeng.model.sharded import is_sharded
from repeng.train.adapter_files import ADAPTER, CALIBRATION, adapter_state, save_adapter
from repeng.train.arguments import SteeringArguments
from repeng.train.build import Run
from repeng.train.learning_curve import learning_curve
from repeng.train.recipe import Recipe
from repeng.train.resume import RUN

CONFIG, LOG, CURVE, CARD = "config.yaml", "training_log.jsonl", "learning_curve.png", "README.md"
ABOUT = (LOG, CURVE, CARD, *FILES)  # what speaks of the adapter beside it
LATER = (CALIBRATION, *(f"{EVALUATION}/{name}" for name in FILES))  # what other commands write of it
AIM = ("model_name_or_path", "gguf_file", "pairs_file", "positive", "negative", "adapter")  # what a run is for
PACKAGES = ("repeng", "torch", "transformers", "peft", "accelerate")


def check_older_run(folder: str | Path, task_args: TaskArguments, args: SteeringArguments) -> None:
    """Raise ValueError, saying how to go on, if `folder` holds files that no run to the same aim has written."""
    place = Path(folder)
    there = [name for name in (CONFIG, *ADAPTER, *ABOUT) if os.path.lexists(place / name)]
    if not there:
        return
    advice = "Give another output_dir, or move them away"
    if CONFIG not in there and {*there} <= {*ADAPTER} and any(place.glob(f"checkpoint-*/{RUN}")):
        return  # what a push to the hub has copied out of a checkpoint, which knows whose it is
    if CONFIG not in there or not all((place / name).is_file() for name in there):
        raise ValueError(f"output_dir {folder} holds {', '.join(there)}, which no whole run has written. {advice}")
    try:
        older = {key.name: key.value for key in read_keys(place / CONFIG)}
        different = _differences(older, {**asdict(task_args), "adapter": args.adapter})
    except ValueError as error:
        raise ValueError(f"output_dir {folder}: {CONFIG} holds no keys and values of a run. {advice}") from error
    if different:
        raise ValueError(f"output_dir {folder} holds the files of another run: {'; '.join(different)}. {advice}")


def _differences(older: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what two runs do not have in common of their aims."""
    default = {one.name: default_of(one) for kind in (TaskArguments, Recipe) for one in fields(kind)}
    return [
        f"{name} {older.get(name, default[name])!r} there, {now[name]!r} here"
        for name in AIM
        if older.get(name, default[name]) != now[name]
    ]


def finish(task_args: TaskArguments, args: SteeringArguments, run: Run, trainer: Trainer) -> Comparison | None:
    """Save the adapter, compare it, write the report; all processes must call, the first one gets the comparison."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    first, sharded, state = trainer.is_world_process_zero(), is_sharded(model), adapter_state(model)
    if first:
        config = yaml.safe_dump(as_config(task_args, args, run), sort_keys=False)
        older = [Path(args.output_dir) / name for name in (*ABOUT, *LATER)]
        save_adapter(model, args.output_dir, state, more={CONFIG: config}, stale=older)
    comparison, start = None, time.perf_counter()
    if sharded:  # what the processes hold together they can only run together
        comparison = compare(run.model, run.tokenizer, run.task)
    # The others end here. One that left its group behind could crash in leaving, and take the first one along.
    trainer.accelerator.end_training()
    if not first:
        return None
    comparison = comparison or compare(run.model, run.tokenizer, run.task, cache=cache_folder())
    _write_folder(args, run, trainer, comparison, time.perf_counter() - start)
    return comparison


def _write_folder(args: SteeringArguments, run: Run, trainer: Trainer, comparison: Comparison, seconds: float) -> None:
    """The training log, the learning curve, the report as JSON, CSV, PNG and HTML, and README.md."""
    history, names = trainer.state.log_history, [LOG, CARD, *report_files()]
    curve = learning_curve(history) if figures.available() else None
    about = {
        "seed": args.seed,
        "optimizer_steps": trainer.state.global_step,
        "training_pairs": len(run.examples),
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
        write_text(folder / CARD, _model_card(run, args.output_dir, comparison.verdict, figures.available()))


def _training_seconds(history: list[dict[str, Any]]) -> float | None:
    """How long the training loop ran, without what was computed before it; None if it was not logged."""
    return next((row["train_runtime"] for row in reversed(history) if "train_runtime" in row), None)


def as_config(task_args: TaskArguments, args: SteeringArguments, run: Run) -> dict[str, Any]:
    """What `--config` takes to repeat the run: this package's keys, and others that were given."""
    names = [*(f.name for f in fields(Recipe)), *args.changed]
    training = {**args.to_dict(), **asdict(run.sites), **({"r": None} if args.adapter == "bias" else {})}
    chosen = {**asdict(task_args), "model_name_or_path": run.base, **{name: training[name] for name in names}}
    return {name: value for name, value in chosen.items() if value is not None and not name.endswith("_token")}


def _model_card(run: Run, folder: str, sentence: str, drawn: bool) -> str:
    """The README of the adapter: what it does, and how to load it."""
    tiny = run.base == "tiny"
    load = "base, tokenizer = tiny.load()" if tiny else f'base, tokenizer = load_model("{run.base}")'
    imports = "from repeng import steer, tiny" if tiny else "from repeng import load_model, steer"
    picture = "![effect and cost](report.png)\n" if drawn else ""
    return f"""---
library_name: peft
tags: [steering, repeng]
---
# Steering adapter: {run.task.behaviour}

Base model: `{run.base}`. {sentence}.

{picture}
```python
from peft import PeftModel
{imports}

{load}
model = PeftModel.from_pretrained(base, "{folder}")
prompt = tokenizer("the lime is", return_tensors="pt")
for coefficient in (-1.0, 0.0, 1.0):
    with steer(model, coefficient):
        print(coefficient, tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))
```

`report.html` shows what it does and what it costs. `config.yaml` repeats the run:
`repeng train --config {folder}/config.yaml`.
"""
