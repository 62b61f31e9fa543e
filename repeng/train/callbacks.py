"""Callbacks of the trainer: stop on a signal after a checkpoint, return from divergence, stop on a NaN gradient."""

import logging
import signal
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from repeng._command import handle, restore
from repeng.model.sharded import local

WINDOW = 4  # steps over which losses are compared
WORSE = 1e-3  # tolerance for rounding, as a share of the base model's loss

_logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """A loss term, gradient or parameter became NaN or infinite."""


class DivergedError(ValueError):
    """The loss rose above that of the base model, and the parameters could not be restored."""


class FiniteGradients(TrainerCallback):
    """Stops training before the optimizer uses a gradient that is not finite."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all():
                raise NonFiniteError(f"the gradient of {name} is not finite at optimizer step {state.global_step + 1}")


class WayBack(TrainerCallback):
    """Restores the best parameters and halves the learning rate if the loss rises above that of the base model.

    The criterion is the mean over the last steps of the loss minus the base model's loss on the same batches.
    """

    def __init__(self) -> None:
        self.times: int = 0
        self._parts: list[float] = []  # one value per micro-batch of the step
        self._last: list[float] = []  # one value per step
        self._best = float("inf")
        self._kept: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def saw(self, loss: float, of_base: float) -> None:
        """Record the losses of the policy and of the base model on one micro-batch, averaged over all processes."""
        self._parts.append(loss - of_base * (1 + WORSE))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._parts = []
        self._before = {name: local(p).detach().clone() for name, p in _trained(kwargs["model"])}

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._parts:
            return  # a trainer with another loss, which does not call `saw`
        self._last = [*self._last, mean(self._parts)][-WINDOW:]
        now = mean(self._last)
        if now < self._best:
            self._best, self._kept = now, self._before
        if len(self._last) < WINDOW or now <= 0:
            return
        optimizer, scheduler = kwargs["optimizer"], kwargs["lr_scheduler"]
        scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
        worse = f"step {state.global_step}: the loss is above that of the base model by {now:.3g}"
        if not hasattr(scheduler, "base_lrs") or args.deepspeed_plugin is not None:
            raise DivergedError(f"{worse}; lower learning_rate. Checkpoints written before are intact")
        for name, parameter in _trained(kwargs["model"]):
            local(parameter).copy_(self._kept[name])
        getattr(optimizer, "optimizer", optimizer).state.clear()
        scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]
        for group in optimizer.param_groups:  # the scheduler has already set the rate of the next step
            group["lr"] /= 2
        self.times, self._last = self.times + 1, []
        _logger.warning("%s: back to the best parameters so far, with half the learning rate", worse)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGINT in any process, all processes finish the current step, write a checkpoint and stop.

    A second SIGINT goes to the handler that was installed before.
    """

    def __init__(self) -> None:
        self.received: bool = False
        self.number: int = signal.SIGTERM
        self._before: dict[int, Any] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._before = handle(self._remember)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        restore(self._before)
        self._before = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            number = torch.tensor(float(self.number if self.received else 0), device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            if number.item() > 0:
                self.received, self.number = True, int(number.item())
        if self.received:
            control.should_save = control.should_training_stop = True

    def _remember(self, number: int, _: Any) -> None:
        if self.received and number == signal.SIGINT:
            restore(self._before)
            signal.raise_signal(number)
        elif not self.received:
            self.received, self.number = True, number
