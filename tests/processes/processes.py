"""Train a few steps in as many processes as torchrun started, and save the adapter: what test_processes.py launches.

Plain SGD, so that the adapter is a smooth function of the gradients; a start away from zero.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState

from repeng import steer, tiny
from repeng.eval import compare
from repeng.model.sharded import is_sharded
from repeng.train import build as building
from repeng.train import trainer as training
from repeng.train.adapter_files import adapter_state, save_adapter
from repeng.train.arguments import parse_arguments
from repeng.train.build import build
from repeng.train.checkpoints import newest
from repeng.train.run_folder import finish
from repeng.train.trainer import SteeringTrainer


def shard_on_cpu() -> None:
    """Let accelerate use its FSDP plugin on the CPU as well, where it otherwise ignores it."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type  # as for a GPU

    AcceleratorState.__init__ = init


def disagree() -> None:
    """Let this process draw other data and other bases than the first one."""
    examples, differences = building.tokenize_examples, building.pair_differences
    building.tokenize_examples = lambda *args: examples(*args)[::-1]
    building.pair_differences = lambda *args: {name: rows.flip(1) for name, rows in differences(*args).items()}


def main(folder: str, *argv: str) -> None:
    torch.set_num_threads(1)
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    fixed = {
        "output_dir": folder,
        "use_cpu": "true",
        "num_pairs": 46,
        "r": 8,
        "adapter": "svd",
        "layers": "0.34-0.8",
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 4,
        "disable_tqdm": "true",
    }
    words = [word for key, value in fixed.items() for word in (f"--{key}", str(value))]
    task_args, args = parse_arguments([*words, *argv], "tiny")
    if sharded:
        shard_on_cpu()
    if os.environ.get("RANK", "0") != "0":
        disagree()
    run = build(task_args, args, tiny.task(task_args, args.seed))
    generator = torch.Generator().manual_seed(0)
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    trainer = SteeringTrainer(
        run.model, args, run.examples, run.tokenizer, eval_dataset=run.validation, neutral_texts=run.validation_texts
    )
    if sharded:
        assert trainer.is_fsdp_enabled
    measure = training.evaluate

    def declining(*args, **kwargs) -> SimpleNamespace:
        report = measure(*args, **kwargs)
        return SimpleNamespace(range=report.range - 100 * trainer.state.global_step, arm=report.arm)

    training.evaluate = declining  # so that the best checkpoint is the first one
    trainer.train(resume_from_checkpoint=newest(args.output_dir) if args.resume else None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = adapter_state(model)
    with torch.no_grad(), steer(model.eval(), 0.5):  # by all processes, as those of a sharded model must
        logits = model(torch.tensor([run.examples[0]["chosen_ids"]])).logits
    assert is_sharded(model) == sharded
    if args.require_steering:  # as train.py does it, on few questions
        run.task = replace(run.task, questions=run.task.questions[::16])
        compare.screened_layers = lambda depth: [2]
        finish(task_args, args, run, trainer)
    trainer.accelerator.end_training()
    if trainer.is_world_process_zero():
        save_adapter(model, args.output_dir, state)
        ranges = [row["eval_range"] for row in trainer.state.log_history if "eval_range" in row]
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        seen = {
            "world_size": args.world_size,
            "step": trainer.state.global_step,
            "stopped": trainer.stop.received,
            "losses": losses,
            "ranges": ranges,
            "logits": logits[0, -1].tolist(),
            "ids": run.examples[0]["chosen_ids"],
        }
        (Path(folder) / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
