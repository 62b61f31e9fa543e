"""Coefficients are found from few measurements, whatever the shape of the cost."""

import math
from itertools import pairwise

import pytest
import torch
from test_eval_report import report

from repeng.eval.trace import REACHED, find_costs, find_edge

TARGETS = (0.05, 0.1, 0.3)


def near(known, target):
    return any(abs(math.log(cost / target)) < REACHED for cost in known.values() if 0 < cost < math.inf)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0, 30.0])
def test_a_square_is_found_in_one_step_for_each_target(scale):
    known = find_costs(lambda c: 0.1 * (c / scale) ** 2, TARGETS, start=1.0, largest=1e4)
    assert all(near(known, target) for target in TARGETS)
    assert len(known) <= 4 + abs(math.log(scale, 4))  # from far away it goes in strides of 4


@pytest.mark.parametrize(
    "cost",
    [
        lambda c: 0.001 * c**6,
        lambda c: 0.041 * c**11,
        lambda c: 0.2 * c,
        lambda c: 0.01 * c**2 + math.exp(4 * (c - 3)),
        lambda c: math.nan if c > 8 else 0.01 * c**2,
    ],
)
def test_other_shapes_are_found_as_well(cost):
    known = find_costs(cost, TARGETS, start=1.0, largest=64.0)
    assert all(near(known, target) for target in TARGETS) and len(known) <= 10


def test_strides_are_of_four_at_most():
    seen = []
    find_costs(lambda c: seen.append(c) or 1e-9 * c**2, TARGETS, start=1.0, largest=1e6)
    assert max(b / a for a, b in pairwise(seen)) <= 4.0 + 1e-9 and len(seen) >= 6


def test_what_cannot_be_reached_ends():
    idle = find_costs(lambda c: 0.0, TARGETS, start=1.0, largest=64.0)
    assert max(idle) == 64.0 and len(idle) <= 9
    limited = find_costs(lambda c: 0.01 * c**2, (0.05, 5.0), start=1.0, largest=4.0)
    assert near(limited, 0.05) and max(limited) == 4.0
    jump = find_costs(lambda c: 0.0 if c < 1.3 else 9.0, TARGETS, start=1.0, largest=64.0)
    assert len(jump) <= 10
    assert len(find_costs(lambda c: math.nan, TARGETS, start=1.0, largest=64.0)) <= 10


def test_a_guess_outside_of_what_is_known_is_put_inside():
    """A jump: the slope between two coefficients behind it says nothing of where it is."""
    seen = []
    find_costs(lambda c: seen.append(c) or (0.01 if c < 1.5 else 5.0), (0.3,), start=1.0, largest=64.0)
    assert seen[:2] == [1.0, 4.0] and len(seen) == 4
    for index in (2, 3):
        below = max(c for c in seen[:index] if c < 1.5)
        above = min(c for c in seen[:index] if c >= 1.5)
        assert below < seen[index] < above


def test_the_edge_of_the_budget_is_bracketed():
    nll = {-1.0: 1.5, 0.0: 1.0, 1.0: 1.0 + 0.16}  # twice the budget of 0.08 at c = 1, linear

    def so_far():
        order = sorted(nll)
        return report([[c] for c in order], nll=[nll[c] for c in order], coefficients=order)

    def measure(c):
        nll[c] = 1.0 + 0.16 * c

    find_edge(so_far, measure, +1)
    inside = max(c for c in nll if so_far().inside_budget(c))
    assert 0.45 <= inside <= 0.5 and len(nll) <= 6
    assert torch.tensor(sorted(nll)).min() == -1.0  # the other arm is left alone
