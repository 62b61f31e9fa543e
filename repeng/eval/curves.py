"""Effect and cost of a dial as curves that are read at equal cost, with intervals over items and seeds.

The effect of an arm is the change of the mean log-odds in its direction, in nats. Its cost is the KL divergence from
the base, in nats per token of neutral text. Between measured points the effect is interpolated linearly in √cost,
because for small c the log-odds change by O(c) and the KL divergence by O(c²).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from repeng.eval.eval_report import EvalReport

FIXED_COSTS = (0.05, 0.1, 0.3)
Cost = Literal["mean", "rmse"]
NEAR = 1e-6  # relative tolerance with which a cost counts as reached


class Curve(NamedTuple):
    """One arm of a dial from 0 outwards: cost `(b k)` and effect `(b k)` of `k` points in each of `b` bootstrap draws.

    `discrete`: the dial has no coefficients between these points, as is true of prompts.
    """

    cost: Tensor
    effect: Tensor
    discrete: bool = False

    def effect_at(self, cost: Tensor | float) -> Tensor:
        """Effect `(b)` where the curve first reaches a cost, or at the end of the curve if it never does.

        For a discrete dial, the effect of the outermost point whose cost is within `cost`; NaN if only 0 is.
        """
        target = torch.as_tensor(cost, dtype=self.cost.dtype).expand(len(self.cost))[:, None]
        if self.discrete:
            within = self.cost[:, 1:] <= target * (1 + NEAR)
            last = within.long().cumsum(dim=1).argmax(dim=1, keepdim=True)
            values = self.effect[:, 1:].gather(1, last)[:, 0]
            return torch.where(within.any(dim=1), values, math.nan)
        return _crossing(self.cost.nan_to_num(nan=math.inf).sqrt(), self.effect, target.sqrt())

    def cost_at(self, effect: Tensor | float) -> Tensor:
        """Cost `(b)` at which the curve first reaches an effect; infinite if it never reaches it."""
        target = torch.as_tensor(effect, dtype=self.cost.dtype).expand(len(self.cost))[:, None]
        reached = (self.effect >= target).any(dim=1)
        if self.discrete:
            first = (self.effect >= target).long().argmax(dim=1, keepdim=True)
            return torch.where(reached, self.cost.gather(1, first)[:, 0], math.inf)
        root = _crossing(self.effect, self.cost.nan_to_num(nan=math.inf).sqrt(), target)
        return torch.where(reached, root.square(), math.inf)


def _crossing(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """`y (b)` where x of the path `(x, y) (b k)` first reaches `target (b 1)`; the last y if x never reaches it."""
    reached = x >= target * (1 - NEAR)
    after = torch.where(reached.any(dim=1), reached.long().argmax(dim=1), x.shape[1] - 1)[:, None]
    before = (after - 1).clamp(min=0)
    (x0, y0), (x1, y1) = ((x.gather(1, i), y.gather(1, i)) for i in (before, after))
    share = ((target - x0) / (x1 - x0)).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).clamp(0, 1)
    share = torch.where(x1.isinf(), 0.0, torch.where(reached.any(dim=1, keepdim=True), share, 1.0))
    step = torch.where(share > 0, share * (y1 - y0), 0.0)
    return (y0 + step)[:, 0]


@dataclass(frozen=True)
class Draws:
    """Bootstrap draws: how often each draw holds each unit of questions `(b u)` and each text `(b q)`.

    `seed` determines the draws of training seeds. The first draw holds every item once: it is the measurement itself.
    """

    units: Tensor
    texts: Tensor
    seed: int

    @classmethod
    def of(cls, report: EvalReport, n: int = 1000, seed: int = 0) -> "Draws":
        generator = torch.Generator().manual_seed(seed)
        return cls(
            _counts(len(report.members()), n, generator), _counts(report.neutral_kl.shape[1], n, generator), seed
        )

    def seeds(self, n: int, one: bool = False) -> Tensor:
        """Weights `(b n)` of `n` training seeds in each draw; with `one`, every draw but the first has one seed.

        All methods with the same number of seeds get the same weights.
        """
        generator = torch.Generator().manual_seed(self.seed + n)
        if not one:
            return _counts(n, len(self.units) - 1, generator) / n
        drawn = torch.randint(n, (len(self.units) - 1,), generator=generator)
        single = torch.nn.functional.one_hot(drawn, n).double()
        return torch.cat([torch.full((1, n), 1 / n, dtype=torch.float64), single])


def _counts(size: int, n: int, generator: torch.Generator) -> Tensor:
    """How often each draw holds each of `size` items, `(1 + n, size)`; the first draw holds each item once."""
    if size == 0:
        return torch.zeros(1 + n, 0, dtype=torch.float64)
    drawn = torch.randint(size, (n, size), generator=generator)
    counts = torch.zeros(n, size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(n, size, dtype=torch.float64))
    return torch.cat([torch.ones(1, size, dtype=torch.float64), counts])


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Tensor, level: float = 0.95) -> "Estimate":
        """Make an estimate from the draws `(b)` of a figure; the first is the measured value. Ignores NaN draws."""
        values = draws[1:][~draws[1:].isnan()].sort().values
        if not len(values):
            return cls(draws[0].item(), math.nan, math.nan)
        tail = (1 - level) / 2 * (len(values) - 1)
        return cls(draws[0].item(), values[math.floor(tail)].item(), values[math.ceil(len(values) - 1 - tail)].item())


def curve(report: EvalReport, sign: int, draws: Draws, cost: Cost = "mean") -> Curve:
    """The curve of one arm of a report, in every draw."""
    members = report.members()
    odds = torch.stack([report.log_odds[:, index].sum(dim=1) for index in members], dim=1).double()
    sizes = torch.tensor([len(index) for index in members], dtype=torch.float64)
    means = (draws.units @ odds.T) / (draws.units @ sizes)[:, None]
    sums = (report.neutral_kl if cost == "mean" else report.neutral_kl_squared).double()
    costs = (draws.texts @ sums.T) / (draws.texts @ report.neutral_tokens.double())[:, None]
    if cost == "rmse":
        costs = costs.sqrt()
    order = sorted((c for c in report.coefficients if c * sign >= 0), key=abs)
    places = [report.at(c) for c in order]
    gains = sign * (means[:, places] - means[:, [report.at(0.0)]])
    return Curve(costs[:, places].clamp(min=0), gains, report.discrete)


class Method:
    """The reports of one method, one per training seed, and its figures in every draw.

    `chance`: the reports are random alternatives, such as random directions. Then each draw holds a single report, so
    that an interval shows where one random alternative may lie, not where their mean lies.
    """

    reports: list[EvalReport]
    draws: Draws
    shares: Tensor

    def __init__(self, reports: Sequence[EvalReport], draws: Draws, chance: bool = False) -> None:
        self.reports, self.draws = list(reports), draws
        self.shares = draws.seeds(len(self.reports), one=chance)
        self._curves: dict[tuple[int, Cost], list[Curve]] = {}

    def curves(self, sign: int, cost: Cost = "mean") -> list[Curve]:
        """The curves of one arm, by seed."""
        key = (sign, cost)
        if key not in self._curves:
            self._curves[key] = [curve(report, sign, self.draws, cost) for report in self.reports]
        return self._curves[key]

    def effect_at(self, sign: int, cost: Tensor | float, kind: Cost = "mean") -> Tensor:
        """Effect `(b)` of one arm at a cost, mean over seeds; see `Curve.effect_at`."""
        found = torch.stack([one.effect_at(cost) for one in self.curves(sign, kind)], dim=1)
        return torch.where(self.shares > 0, found * self.shares, 0.0).sum(dim=1)

    def largest_at(self, sign: int, cost: Tensor | float) -> Tensor:
        """The largest effect `(b)` of any report at a cost."""
        return torch.stack([one.effect_at(cost) for one in self.curves(sign)], dim=1).amax(dim=1)

    def cost_at(self, sign: int, effect: Tensor | float, kind: Cost = "mean") -> Tensor:
        """Cost `(b)` at which one arm reaches an effect, mean over seeds; see `Curve.cost_at`."""
        found = torch.stack([one.cost_at(effect) for one in self.curves(sign, kind)], dim=1)
        return torch.where(self.shares > 0, found * self.shares, 0.0).sum(dim=1)

    def end(self, sign: int, kind: Cost = "mean") -> tuple[Tensor, Tensor]:
        """Effect and cost `(b)` of the outermost point of one arm, mean over seeds."""
        effect = torch.stack([one.effect[:, -1] for one in self.curves(sign, kind)], dim=1)
        cost = torch.stack([one.cost[:, -1] for one in self.curves(sign, kind)], dim=1)
        return (effect * self.shares).sum(dim=1), (cost * self.shares).sum(dim=1)

    def both_at(self, cost: float | tuple[Tensor, Tensor], kind: Cost = "mean") -> Tensor:
        """Sum `(b)` of the effects of both arms. `cost` is one cost for both, or a pair for + and −."""
        plus, minus = cost if isinstance(cost, tuple) else (cost, cost)
        return self.effect_at(+1, plus, kind) + self.effect_at(-1, minus, kind)


def methods_of(
    reports: Mapping[str, Sequence[EvalReport]], n: int = 1000, chance: str | None = None
) -> dict[str, Method]:
    """All methods on the same draws, so that their differences and ratios are paired.

    `chance` is the name of the method whose reports are random alternatives, see `Method`.

    Raises:
        ValueError: the reports are on different items, or without neutral texts.
    """
    every = [report for group in reports.values() for report in group]
    sizes, units = {report.sizes for report in every}, {tuple(report.units) for report in every}
    if len(sizes) != 1 or len(units) != 1:
        raise ValueError(
            "only reports on the same items can be compared; the numbers of (target questions, controls, neutral "
            f"texts) in these are {sorted(sizes)}"
        )
    if not every[0].neutral_tokens.sum():
        raise ValueError("methods are compared at equal cost, which needs neutral texts; evaluate with neutral_texts")
    draws = Draws.of(every[0], n)
    return {name: Method(group, draws, name == chance) for name, group in reports.items()}


def nearest(report: EvalReport, sign: int, cost: float) -> float:
    """The measured coefficient of this sign whose cost is nearest to `cost` on a log scale; 0 if there is none."""
    order = [c for c in report.coefficients if c * sign > 0]
    costs = {c: report.kl[report.at(c)].item() for c in order}
    usable = [c for c in order if costs[c] > 0]
    return min(usable, key=lambda c: abs(math.log(costs[c] / cost)), default=0.0)
