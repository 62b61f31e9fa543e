"""The learning rate that is found: how far the parameters must go, in their own unit, shared out over the schedule."""

import json

import pytest
import torch
from support import arguments, prepare, randomise
from torch import nn
from transformers import get_scheduler

from repeng.train.learning_rate import TRAVEL, peak_learning_rate, way_to_target
from repeng.train.trainer import SteeringTrainer

WEIGHTS = torch.tensor([3.0, -1.0, 0.0, 0.5])


def linear(scale=1.0, start=0.0):
    """Parameters, and parts of a batch whose mean is 4.5 for every entry that goes 1 · scale the right way."""
    parameter = nn.Parameter(torch.full((4,), start))
    return [parameter], lambda: [2 * (WEIGHTS * parameter / scale).sum(), 0 * parameter.sum()]


def test_on_a_line_the_way_is_the_target_over_the_sum_of_the_slopes():
    for scale, start in ((1.0, 0.0), (100.0, 0.0), (1.0, 7.0)):
        parameters, shift = linear(scale, start)
        assert way_to_target(shift, parameters, 3.0) == pytest.approx(scale * 3.0 / 4.5, rel=1e-5)
        assert torch.equal(parameters[0].detach(), torch.full((4,), start))


def test_a_product_of_two_goes_the_faster_the_farther_it_is():
    """As in LoRA: the second factor starts at 0, and the first has no gradient until it has moved."""
    one, two = nn.Parameter(torch.full((3,), 0.1)), nn.Parameter(torch.zeros(3))
    way = way_to_target(lambda: [(one * two).sum()], [one, two], 3.0)
    assert 0.951 < way < 1.5  # both going alike, 3 (0.1 + way) way = 3; the second alone would have to go 10


def test_what_falls_behind_is_taken_to_go_on():
    parameter = nn.Parameter(torch.zeros(1))
    # Steps to 0.15, 0.6 and 1.5, where a third of the target is reached and nothing grows any more.
    assert way_to_target(lambda: [parameter.clamp(max=1.0).sum()], [parameter], 3.0) == pytest.approx(4.5)


def test_a_separation_that_is_not_finite_is_said_to_be_so():
    parameter = nn.Parameter(torch.full((2,), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        way_to_target(lambda: [parameter.sum()], [parameter], 3.0)


def test_parameters_that_move_nothing_are_refused():
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="no trained parameter moves the separation"):
        way_to_target(lambda: [0 * parameter.sum()], [parameter], 3.0)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup", "reduce_lr_on_plateau"])
def test_the_whole_schedule_goes_a_multiple_of_the_way(tmp_path, kind):
    more = {"eval_strategy": "steps", "eval_steps": 4} if kind == "reduce_lr_on_plateau" else {}
    warmup = {} if kind == "constant" else {"warmup_steps": 0.25}
    args = arguments(tmp_path, lr_scheduler_type=kind, max_steps=12, **warmup, **more)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak_learning_rate(0.7, args, 12))
    scheduler = get_scheduler(kind, optimizer, args.get_warmup_steps(12), 12)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if not more:
            scheduler.step()
    assert sum(rates) == pytest.approx(TRAVEL * 0.7, rel=1e-4)


def test_a_schedule_of_warm_up_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="all 1 steps are warm-up"):
        arguments(tmp_path, learning_rate=0, max_steps=1)
    assert arguments(tmp_path, learning_rate=0, max_steps=1, warmup_steps=0).max_steps == 1


@pytest.mark.parametrize("kind, options", [("polynomial", {}), ("cosine_with_min_lr", {"min_lr": 1e-6})])
def test_schedules_that_ask_the_optimizer_for_its_rate_get_the_one_that_was_found(tmp_path, kind, options):
    more = {"lr_scheduler_kwargs": json.dumps(options)} if options else {}
    args = arguments(tmp_path, learning_rate=0, max_steps=4, num_pairs=16, lr_scheduler_type=kind, **more)
    run = prepare(args)
    trainer = SteeringTrainer(run.model, args, run.examples, run.tokenizer)
    trainer.create_optimizer_and_scheduler(4)
    rates = []
    for _ in range(4):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert sum(rates) == pytest.approx(TRAVEL * trainer.way, rel=1e-2)


def test_a_run_begins_at_the_base_with_the_rate_that_was_found(tmp_path):
    args = arguments(tmp_path, learning_rate=0, max_steps=2, num_pairs=16, logging_steps=1)
    run = prepare(args)
    trainer = SteeringTrainer(run.model, args, run.examples, run.tokenizer)
    assert args.learning_rate == 0  # what was given stays
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["start_kl"] == 0 and first["peak_learning_rate"] == trainer.peak
    assert trainer.peak == peak_learning_rate(trainer.way, args, 2)
    assert trainer.lr_scheduler.base_lrs == [trainer.peak] * 2


def test_rank_and_scale_do_not_matter(tmp_path):
    """Twice as long a unit of the parameters, twice the rate."""
    ways = []
    for factor in (1.0, 0.5):
        args = arguments(
            tmp_path / str(factor), learning_rate=0, max_steps=4, adapter="lora", target_modules="up_proj"
        )
        run = prepare(args)
        for name, parameter in run.model.named_parameters():
            if "lora_A" in name:
                parameter.data *= factor
        ways.append(SteeringTrainer(run.model, args, run.examples, run.tokenizer).way)
    assert ways[1] > 1.3 * ways[0]


def test_an_optimizer_that_follows_the_size_of_gradients_needs_a_rate(tmp_path):
    with pytest.raises(ValueError, match="optim=sgd needs a learning_rate"):
        arguments(tmp_path, learning_rate=0, optim="sgd")
    args = arguments(tmp_path, optim="sgd")
    run = prepare(args)
    randomise(run.model)
    assert SteeringTrainer(run.model, args, run.examples, run.tokenizer).peak == 2e-3
