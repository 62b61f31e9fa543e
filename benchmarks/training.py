"""A training run for the benchmarks, by default of the embedded model."""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from repeng import EvalReport, evaluate, steer, tiny
from repeng.data.task import Task
from repeng.eval.evaluate import ADAPTER_COEFFICIENTS
from repeng.train.arguments import SteeringArguments, parse_arguments
from repeng.train.build import Run, build
from repeng.train.trainer import SteeringTrainer

ROOT = Path(__file__).parent.parent
CONFIG = "tiny"


def train(
    seed: int,
    argv: Sequence[str] = (),
    *,
    config: Sequence[str] = (CONFIG,),
    task: Task | None = None,
    keep: Path | None = None,
    prepare: Callable[[Run, SteeringArguments], None] = lambda run, args: None,
    trainer: Callable[..., SteeringTrainer] = SteeringTrainer,
    **options,
) -> Run:
    """Train with the settings of configurations, by default `tiny`, and of `argv`.

    Args:
        seed: seed of the run. With `task`, it determines only the order of the batches and the initial adapter.
        argv: more command-line arguments of the training.
        config: names of configurations.
        task: the data; None makes them from the arguments.
        keep: output folder that is kept, so that later runs reuse the results in it; a temporary folder by default.
        prepare: function that changes the run between its construction and the training.
        trainer: class of the trainer.
        **options: more arguments of `trainer`.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = str(keep or folder)
        fixed = ["--output_dir", folder, "--save_strategy", "no", "--disable_tqdm", "true", "--seed", str(seed)]
        task_args, args = parse_arguments(["--config", *config, *fixed, *argv])
        run = build(task_args, args, None if task else tiny.task(task_args, args.seed), task=task)
        prepare(run, args)
        trainer(run.model, args, run.examples, run.tokenizer, **options).train()
    return run


def trained_report(seed: int, argv: Sequence[str] = (), **options) -> EvalReport:
    """Train once (see `train`) and evaluate the adapter on the held-out questions."""
    run = train(seed, argv, **options)
    return evaluate(
        run.model,
        run.tokenizer,
        run.task.questions,
        partial(steer, run.model),
        ADAPTER_COEFFICIENTS,
        neutral_texts=run.task.unseen_neutral_texts,
    )


def ranges_row(reports: Sequence[EvalReport]) -> dict[str, str]:
    """A table row with the mean range, the range of each seed, and the mean gains of both arms."""
    ranges = [report.range for report in reports]
    shown = ", ".join(f"{value:.2f}" for value in ranges)
    return {
        "range (seeds)": f"{mean(ranges):.2f} ({shown})",
        "+ arm": f"{mean(report.arm(+1).gain for report in reports):.2f}",
        "− arm": f"{mean(report.arm(-1).gain for report in reports):.2f}",
    }
