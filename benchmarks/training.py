"""One training run of the embedded model, as the benchmarks repeat it."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from repeng import tiny
from repeng.train.arguments import SteeringArguments, parse_arguments
from repeng.train.build import Run, build
from repeng.train.trainer import SteeringTrainer

ROOT = Path(__file__).parent.parent
CONFIG = "tiny"


def train(
    seed: int,
    argv: Sequence[str] = (),
    *,
    prepare: Callable[[Run, SteeringArguments], None] = lambda run, args: None,
    trainer: Callable[..., SteeringTrainer] = SteeringTrainer,
    **options,
) -> Run:
    """Train by the configuration `tiny` and `argv`.

    `prepare` changes what was built before training; `options` go to `trainer`.
    """
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--output_dir", folder, "--save_strategy", "no", "--disable_tqdm", "true", "--seed", str(seed)]
        task_args, args = parse_arguments(["--config", CONFIG, *fixed, *argv])
        run = build(task_args, args, tiny.task(task_args, args.seed))
        prepare(run, args)
        trainer(run.model, args, run.examples, run.tokenizer, **options).train()
    return run
