"""One training run, from the command line to the report."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel

from repeng import tiny
from repeng._command import FAILED, Stopped, end
from repeng.data.arguments import TaskArguments
from repeng.data.files import WriteError
from repeng.data.folders import claimed
from repeng.eval.comparison import Comparison
from repeng.eval.report.tables import print_table
from repeng.model.identity import model_key
from repeng.train.arguments import DEFAULT_CONFIG, SteeringArguments, parse_arguments
from repeng.train.build import Run, build
from repeng.train.callbacks import DivergedError, NonFiniteError
from repeng.train.checkpoints import CheckpointError
from repeng.train.reference_cache import reference_key
from repeng.train.resume import check_checkpoint, checkpoint_to_resume
from repeng.train.run_folder import as_config, check_older_run, finish
from repeng.train.trainer import StartError, SteeringTrainer
from repeng.tuner import SvdSteeringModel


def use_all_cores(args: SteeringArguments) -> None:
    """Let a single process on a CPU use every core. `accelerate launch` gives it one thread by default."""
    launched = any(name.startswith("ACCELERATE_") for name in os.environ)
    if launched and args.world_size == 1 and args.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))


def _describe(model: PeftModel) -> str:
    """A few lines that say what is adapted."""
    if isinstance(model.base_model, SvdSteeringModel):
        return model.base_model.describe()
    names, (trained, _) = cast(Any, model.base_model).targeted_module_names, model.get_nb_trainable_parameters()
    return f"LoRA on {len(names)} modules, {trained:,} parameters: {names[0]} … {names[-1]}"


def _checkpoint(args: SteeringArguments, identity: dict[str, Any], model: PeftModel) -> str | None:
    """The checkpoint that the run continues from, after checks; None to start from the beginning."""
    whole = not args.fsdp and args.deepspeed is None
    if args.resume:
        return checkpoint_to_resume(args.output_dir, identity, model, whole)
    if args.resume_from_checkpoint:
        check_checkpoint(args.resume_from_checkpoint, identity, model, whole)
    return args.resume_from_checkpoint


def main(argv: Sequence[str]) -> None:
    """Train an adapter, save it, and print what it does. On bad input, exit with a one-line message.

    Raises:
        Stopped: a signal ended the training, after a checkpoint.
    """
    with ExitStack() as held:
        try:
            task_args, args = parse_arguments(argv, DEFAULT_CONFIG)
            _claim(held, task_args, args)
            run, trainer, checkpoint = _prepare(task_args, args)
        except (ValueError, OSError, ImportError) as error:
            end(str(error))
        if args.process_index == 0:
            print(_describe(run.model))
            if args.world_size > 1:
                print(f"{args.world_size} processes, on {args.device.type}")
            if run.doubt:
                print(f"warning: {run.doubt}")
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            if trainer.stop.received:
                raise Stopped(trainer.stop.number, f" after step {trainer.state.global_step}")
            comparison = finish(task_args, args, run, trainer)
        except WriteError as error:
            end(f"{error}. Make room, then continue with --resume true")
        except (NonFiniteError, DivergedError, CheckpointError, StartError) as error:
            end(str(error))
    if comparison is not None:
        _tell(comparison, args)


def _claim(held: ExitStack, task_args: TaskArguments, args: SteeringArguments) -> None:
    """Hold the output folder until `held` closes; raises ValueError, in every process, if it cannot be used."""
    problem: str | None = None
    if args.process_index == 0:
        try:
            held.enter_context(claimed(args.output_dir, "output_dir"))
            check_older_run(args.output_dir, task_args, args)
        except (ValueError, OSError) as error:
            problem = str(error)
    if args.world_size > 1:  # else the other processes would wait for rank 0
        (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise ValueError(problem)


def _prepare(task_args: TaskArguments, args: SteeringArguments) -> tuple[Run, SteeringTrainer, str | None]:
    """The run, its trainer, and the checkpoint from which it continues."""
    use_all_cores(args)
    run = build(task_args, args, tiny.task(task_args, args.seed))
    identity = {
        **as_config(task_args, args, run),
        "weights_and_tokenizer": model_key(run.model, run.tokenizer),
        "pairs": reference_key(run.examples, run.model, run.tokenizer),
        "world_size": args.world_size,
    }
    checkpoint = _checkpoint(args, identity, run.model)
    try:
        trainer = SteeringTrainer(
            run.model,
            args,
            run.examples,
            run.tokenizer,
            eval_dataset=run.validation,
            neutral_texts=run.validation_texts,
        )
    except Exception as error:
        if not args.push_to_hub or isinstance(error, ValueError | OSError):
            raise
        raise ValueError(f"push_to_hub: the hub cannot be reached ({error}); leave it out") from None
    trainer.identity = identity
    return run, trainer, checkpoint


def _tell(comparison: Comparison, args: SteeringArguments) -> None:
    """Print the comparison. Exit with a message if the adapter does not steer and `require_steering` is set."""
    print_table(comparison)
    print(comparison.verdict)
    print(f"adapter and report: {args.output_dir} (open report.html)")
    failed = comparison.shortcomings()
    if failed and args.require_steering:
        end("this adapter does not steer: " + "; ".join(failed), FAILED)
