"""A comparison that was not measured."""

import torch

from repeng import EvalReport
from repeng.eval.comparison import Comparison


def report():
    return EvalReport(
        [-1.0, 0.0, 1.0],
        torch.tensor([[-1.0], [0.0], [1.0]]),
        torch.ones(3, 1),
        torch.zeros(3, 1),
        torch.zeros(3, 1),
        torch.zeros(3, 1),
        torch.ones(1),
        torch.tensor([[0.1], [0.0], [0.1]]),
        torch.tensor([[0.1], [0.0], [0.1]]),
    )


def comparison():
    return Comparison({name: [report()] for name in ("this adapter", "random direction")}, "this adapter")
