"""Find a learning rate that suits the model and the adapter.

An optimizer like Adam moves every entry by about the learning rate at each step, whatever the size of its gradient.
The effect on the activations depends on rank, sites, layers and the sizes of the weights. So the distance to the
target is measured: how far the entries have to move, along the signs of their gradients, until the separation reaches
its target. The peak learning rate is chosen so that the whole schedule covers `TRAVEL` times that distance.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, TrainingArguments, get_scheduler

TRAVEL = 5.0  # from research_notes.md, like the next two lines
FIRST, SHARE = 0.05, 0.3  # share of the target by which the first step, and later steps, should move the separation
GROWTH = 3.0  # largest ratio of a step to the one before: a product of factors starts with a slope far too small
STEPS = 16  # largest number of steps
MEASURED = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # schedules that follow an evaluation
SIGN_LIKE = ("adam", "lion", "rmsprop")  # optimizers whose steps do not depend on the size of the gradients


def way_to_target(shift: Callable[[], Iterable[Tensor]], parameters: Sequence[nn.Parameter], target: float) -> float:
    """How far every entry of the parameters has to move, by sign steps, until the mean of `shift()` grows by `target`.

    The parameters are restored at the end.

    Args:
        shift: yields one scalar with its graph for each part of a batch.
        parameters: the trained parameters.
        target: growth to reach, above 0.

    Raises:
        ValueError: no parameter moves the shift, or it is not finite.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    path = []  # (distance, growth) after each step
    gone = step = 0.0
    start = None
    try:
        while len(path) < STEPS:
            reached, gradients = _mean_and_gradients(shift(), parameters)
            start = reached if start is None else start
            length = sum(gradient.abs().sum().item() for gradient in gradients)
            path.append((gone, reached - start))
            if not path[-1][1] < target or not 0 < length < float("inf"):
                break
            step = min(GROWTH * step, SHARE * target / length) if step else FIRST * target / length
            gone += step
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.add_(gradient.sign(), alpha=step)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
    (*_, (near, low), (far, high)) = [(0.0, 0.0), *path]
    if high >= target:
        return near + (far - near) * (target - low) / (high - low)
    if not math.isfinite(high):
        raise ValueError("the separation is not finite near the base model, so that no learning rate can be found")
    if not high > 0:
        raise ValueError(
            "no trained parameter moves the separation at the site of the loss: adapt layers at or before loss_layer, "
            "or give learning_rate"
        )
    return far * target / high  # the target was not reached: extrapolate with the mean slope


def _mean_and_gradients(parts: Iterable[Tensor], parameters: Sequence[nn.Parameter]) -> tuple[float, list[Tensor]]:
    """The mean of scalars, and the gradients of the mean."""
    values, sums = [], [torch.zeros_like(parameter) for parameter in parameters]
    for part in parts:
        found = torch.autograd.grad(part, parameters, allow_unused=True)
        values.append(part.item())
        for total, gradient in zip(sums, found, strict=True):
            if gradient is not None:
                total += gradient
    return sum(values) / len(values), [total / len(values) for total in sums]


def peak_learning_rate(way: float, args: TrainingArguments, steps: int) -> float:
    """The peak learning rate with which `steps` optimizer steps cover `TRAVEL` times the distance `way`.

    A schedule that follows an evaluation counts as constant.

    Raises:
        ValueError: the rate is 0 at every step.
    """
    if args.lr_scheduler_type in MEASURED:
        return TRAVEL * way / steps
    optimizer, scheduler = schedule(args, steps)
    shares = 0.0
    for _ in range(steps):
        shares += optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    if not shares:
        raise ValueError(
            f"all {steps} steps are warm-up that starts at a learning rate of 0; set warmup_steps: 0, or more steps"
        )
    return TRAVEL * way / shares


def schedule(
    args: TrainingArguments, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """An optimizer with one parameter and a learning rate of 1, and its schedule over `steps` optimizer steps.

    Raises:
        ValueError: the options do not fit the schedule.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    options = cast(dict[str, Any] | None, args.lr_scheduler_kwargs)
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, scheduler_specific_kwargs=options
        )
        if isinstance(scheduler, LambdaLR):
            for step in {0, 1, steps // 2, steps - 1, steps}:
                if not all(math.isfinite(share(step)) for share in scheduler.lr_lambdas):
                    raise ValueError(f"the learning rate is not finite at step {step}")
        return optimizer, scheduler
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"lr_scheduler_kwargs={options} do not go with lr_scheduler_type={kind}: {error}") from None
