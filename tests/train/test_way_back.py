"""A run that became worse than the base model goes back to its best parameters."""

from types import SimpleNamespace

import pytest
import torch
from support import arguments, prepare, randomise
from torch import nn

from repeng.train.callbacks import WINDOW, DivergedError, WayBack
from repeng.train.inner_contrastive_loss import as_reference
from repeng.train.trainer import SteeringTrainer

ARGS = SimpleNamespace(deepspeed_plugin=None)


class Loop:
    """What a training loop does around the callback: each step adds 1 to the only parameter."""

    def __init__(self, scheduler=None):
        self.callback, self.model = WayBack(), nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        make = scheduler or (lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))
        self.scheduler, self.state = make(self.optimizer), SimpleNamespace(global_step=0)

    def run(self, losses, of_base=10.0):
        given = {"model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}
        for loss in losses:
            self.callback.on_step_begin(ARGS, self.state, None, **given)
            for part in (loss - 0.5, loss + 0.5):  # two micro-batches
                self.callback.saw(part, of_base)
            self.optimizer.state[self.model.weight]["step"] = torch.tensor(1.0)
            self.model.weight.data += 1
            self.state.global_step += 1
            self.callback.on_step_end(ARGS, self.state, None, **given)
        return self.model.weight.item()


def test_worse_than_the_base_goes_back_to_the_best():
    loop = Loop()
    # The mean of four is lowest at the step that begins at 5.
    assert loop.run([10, 11, 9, 8, 5, 4, 20]) == 7
    assert loop.callback.times == 0
    assert loop.run([40]) == 5  # (5 + 4 + 20 + 40) / 4 is above 10
    assert loop.callback.times == 1 and loop.scheduler.base_lrs == [0.05] and not loop.optimizer.state
    assert loop.optimizer.param_groups[0]["lr"] == 0.05
    assert loop.run([30, 30, 30]) == 8  # the window begins anew
    assert loop.run([30]) == 5 and loop.scheduler.base_lrs == [0.025]


def test_a_run_that_goes_well_or_nowhere_is_left_alone():
    loop = Loop()
    assert loop.run([10, 8, 12, 6, 11, 5, 10, 4, 9, 3]) == 10
    assert loop.run([30, 31, 35], of_base=40.0) == 13
    assert Loop().run([10 + 1e-4] * 9) == 9
    assert loop.callback.times == 0 and loop.scheduler.base_lrs == [0.1]


def test_where_it_cannot_go_back_it_stops():
    loop = Loop(lambda optimizer: SimpleNamespace())
    with pytest.raises(DivergedError, match="lower learning_rate"):
        loop.run([1] * WINDOW + [99])


def test_what_the_base_has_on_a_batch_is_the_loss_at_the_start(tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=3)
    run = prepare(args)
    trainer = SteeringTrainer(run.model, args, run.examples, run.tokenizer)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    with trainer.both_sides(run.model, inputs):
        given = trainer.loss_inputs(run.model, inputs)
    start = trainer.loss_func(**given).loss
    assert trainer.loss_func(**as_reference(given)).loss.item() == pytest.approx(start.item(), rel=1e-5)
    randomise(run.model)
    with trainer.both_sides(run.model, inputs):
        given = trainer.loss_inputs(run.model, inputs)
    assert trainer.loss_func(**given).loss.item() != pytest.approx(start.item(), rel=1e-4)
    assert trainer.loss_func(**as_reference(given)).loss.item() == pytest.approx(start.item(), rel=1e-5)


def test_a_rate_that_is_far_too_high_ends_no_worse_than_the_base(tmp_path):
    args = arguments(tmp_path, learning_rate=0.3, max_steps=8, num_pairs=64, logging_steps=1, warmup_steps=0)
    run = prepare(args)
    trainer = SteeringTrainer(run.model, args, run.examples, run.tokenizer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert trainer.way_back.times >= 1 and max(losses) > 2 * losses[0] > 2 * losses[-1]
