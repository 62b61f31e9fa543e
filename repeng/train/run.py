"""One training run, from the command line to the report."""

import os
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import PeftModel

from repeng import tiny
from repeng.data.paths import check_output
from repeng.eval.report.tables import print_table
from repeng.model.identity import model_key
from repeng.train.arguments import DEFAULT_CONFIG, SteeringArguments, parse_arguments
from repeng.train.build import build
from repeng.train.callbacks import DivergedError, NonFiniteError
from repeng.train.checkpoints import CheckpointError
from repeng.train.reference_cache import reference_key
from repeng.train.resume import check_checkpoint, checkpoint_to_resume
from repeng.train.run_folder import as_config, finish
from repeng.train.trainer import StartError, SteeringTrainer
from repeng.tuner import SvdSteeringModel


def use_all_cores(args: SteeringArguments) -> None:
    """Let a single process on a CPU use every core: `accelerate launch` gives a process one thread unless told."""
    launched = any(name.startswith("ACCELERATE_") for name in os.environ)
    if launched and args.world_size == 1 and args.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))


def _describe(model: PeftModel) -> str:
    """What is adapted, in a few lines."""
    if isinstance(model.base_model, SvdSteeringModel):
        return model.base_model.describe()
    names, (trained, _) = cast(Any, model.base_model).targeted_module_names, model.get_nb_trainable_parameters()
    return f"LoRA on {len(names)} modules, {trained:,} parameters: {names[0]} … {names[-1]}"


def _checkpoint(args: SteeringArguments, identity: dict[str, Any], model: PeftModel) -> str | None:
    """The checkpoint that the run is to go on from, checked; None to begin anew."""
    whole = not args.fsdp and args.deepspeed is None
    if args.resume:
        return checkpoint_to_resume(args.output_dir, identity, model, whole)
    if args.resume_from_checkpoint:
        check_checkpoint(args.resume_from_checkpoint, identity, model, whole)
    return args.resume_from_checkpoint


def main(argv: Sequence[str]) -> None:
    """Train an adapter, save it, and print what it does; exits with a sentence on bad input."""
    try:
        task_args, args = parse_arguments(argv, DEFAULT_CONFIG)
        check_output(str(args.output_dir), "output_dir")
        use_all_cores(args)
        run = build(task_args, args, tiny.task(task_args, args.seed))
        identity = {
            **as_config(task_args, args, run),
            "weights_and_tokenizer": model_key(run.model, run.tokenizer),
            "pairs": reference_key(run.examples, run.model, run.tokenizer),
            "world_size": args.world_size,
        }
        checkpoint = _checkpoint(args, identity, run.model)
        if args.process_index == 0:
            print(_describe(run.model))
            if run.doubt:
                print(f"warning: {run.doubt}")
        trainer = SteeringTrainer(
            run.model,
            args,
            run.examples,
            run.tokenizer,
            eval_dataset=run.validation,
            neutral_texts=run.validation_texts,
        )
        trainer.identity = identity
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (NonFiniteError, DivergedError, CheckpointError, StartError) as error:
        sys.exit(f"error: {error}")
    if trainer.stop.received:
        sys.exit(f"stopped by SIGTERM after step {trainer.state.global_step}; continue with --resume true")
    comparison = finish(task_args, args, run, trainer)
    if comparison is not None:
        print_table(comparison)
        print(comparison.verdict)
        print(f"adapter and report: {args.output_dir} (open report.html)")
        failed = comparison.shortcomings()
        if failed and args.require_steering:
            sys.exit("error: this adapter does not steer: " + "; ".join(failed))
