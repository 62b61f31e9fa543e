"""Train a steering adapter, save it, and print what it does.

accelerate launch train.py                                                    # the embedded model, offline
accelerate launch train.py --config configs/tiny.yaml --learning_rate 1e-3    # any key overrides the file
accelerate launch train.py --help
"""

import sys
from pathlib import Path

from repeng import tiny
from repeng.report.tables import print_table
from repeng.train.arguments import parse_arguments
from repeng.train.build import build
from repeng.train.checkpoints import CheckpointError, newest
from repeng.train.report import ADAPTER, check_writable, finish, shortcomings, verdict
from repeng.train.trainer import NonFiniteError, StartError, SteeringTrainer

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny.yaml"


def main(argv: list[str]) -> None:
    try:
        args = parse_arguments(argv, DEFAULT_CONFIG)
        check_writable(args.output_dir)
        run = build(args, tiny.task(args))
        if args.process_index == 0:
            print(run.model.base_model.describe())
        trainer = SteeringTrainer(
            run.model, args, run.examples, run.tokenizer, eval_dataset=run.validation,
            neutral_texts=run.validation_texts,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        trainer.train(resume_from_checkpoint=newest(args.output_dir) if args.resume else args.resume_from_checkpoint)
    except (NonFiniteError, CheckpointError, StartError) as error:
        sys.exit(f"error: {error}")
    if trainer.stop.received:
        sys.exit(f"stopped by SIGTERM after step {trainer.state.global_step}; continue with --resume true")
    reports = finish(args, run, trainer)
    if reports is not None:
        print_table(reports, ADAPTER)
        print(verdict(reports))
        print(f"adapter and report: {args.output_dir} (open report.html)")
        failed = shortcomings(reports)
        if failed and args.require_steering:
            sys.exit("error: this adapter does not steer: " + "; ".join(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
