"""Callbacks of the trainer: a stop that loses nothing, and no step on a gradient that is not finite."""

import signal
import threading
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from repeng.model.sharded import local


class NonFiniteError(FloatingPointError):
    """A loss term, gradient or parameter became NaN or infinite."""


class FiniteGradients(TrainerCallback):
    """Stops training before the optimizer spreads a NaN gradient."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all():
                raise NonFiniteError(f"the gradient of {name} is not finite at optimizer step {state.global_step + 1}")


class StopOnSignal(TrainerCallback):
    """On SIGTERM, in any process, all finish the step that runs and write a checkpoint before training ends."""

    def __init__(self) -> None:
        self.received: bool = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = signal.signal(signal.SIGTERM, self._remember)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if hasattr(self, "_before"):
            signal.signal(signal.SIGTERM, self._before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            flag = torch.tensor(float(self.received), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.received = bool(flag.item())
        if self.received:
            control.should_save = control.should_training_stop = True

    def _remember(self, *_: Any) -> None:
        self.received = True
