"""Result of a comparison of methods at equal cost: figures with paired intervals, and a verdict."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from repeng.eval.curves import FIXED_COSTS, Cost, Estimate, Method, methods_of
from repeng.eval.eval_report import ARMS, FEWEST, EvalReport

PLAIN_COST = 0.1  # nats per token: methods are compared at this cost if there are no persona prompts
WRONG_WAY = 0.05  # share of items that may move against an arm
RESAMPLES = 1000
LEAST_MASS = 1e-3  # total probability of the answers; below it they say little about the text that the model writes
FEW = 8  # units of questions; with fewer, a bootstrap interval is too narrow to be trusted


@dataclass
class Comparison:
    """Reports of methods on the same items, one report for each training seed.

    Attributes:
        reports: lists of reports, by the name of the method.
        own: name of the method that the comparison is about.
        prompts: name of the persona prompts, whose cost is the yardstick; None if they were not measured.
        random: name of the random directions, with a report per direction and sign; None if they were not measured.
        untrained: name of the strongest rival without training; None if there is none.
        probes: by method and probe, the effects of the + arm and of the − arm at the cost of the yardstick, in nats in
            the direction of the arm.
    """

    reports: dict[str, list[EvalReport]]
    own: str
    prompts: str | None = None
    random: str | None = None
    untrained: str | None = None
    probes: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    @cached_property
    def methods(self) -> dict[str, Method]:
        """All methods on the same bootstrap draws."""
        return methods_of(self.reports, RESAMPLES, self.random)

    def yardstick(self, kind: Cost = "mean") -> tuple[Tensor, Tensor]:
        """The costs `(b)` of the + and of the − persona prompt in every draw; 0.1 nats where a cost is not above 0."""
        plain = torch.full((1 + RESAMPLES,), PLAIN_COST, dtype=torch.float64)
        if self.prompts is None:
            return plain, plain
        plus, minus = (self.methods[self.prompts].end(sign, kind)[1] for _, sign in ARMS)
        return torch.where(plus > 0, plus, plain), torch.where(minus > 0, minus, plain)

    @property
    def where(self) -> str:
        """The cost at which methods are compared, in words."""
        return f"{PLAIN_COST:g} nat" if self.prompts is None else "prompts' cost"

    def at_yardstick(self, name: str, kind: Cost = "mean") -> Tensor:
        """Sum `(b)` of the effects of both arms of a method at the cost of the persona prompts."""
        return self.methods[name].both_at(self.yardstick(kind), kind)

    def _estimate(self, draws: Tensor) -> Estimate:
        """A figure from its draws `(b)`. It has no interval if there are fewer than `FEWEST` units of questions."""
        found = Estimate.of(draws)
        return found if self._units() >= FEWEST else found._replace(low=math.nan, high=math.nan)

    def times(self, name: str, other: str) -> Estimate:
        """Ratio of the effects at the cost of the persona prompts, `name` over `other`."""
        mine, theirs = self.at_yardstick(name), self.at_yardstick(other)
        return self._estimate(torch.where(theirs > 0, mine / theirs, math.inf * mine.sign()))

    def lead(self, name: str, other: str, sign: int) -> Estimate:
        """Effect of an arm of `name` minus the largest effect in reports of `other`, at the prompts' cost, nats."""
        cost = self.yardstick()[0 if sign > 0 else 1]
        return self._estimate(self.methods[name].effect_at(sign, cost) - self.methods[other].largest_at(sign, cost))

    def figures(self, name: str) -> dict[str, Any]:
        """The figures of one method by name, each an `Estimate`; "effect" is read at the cost of the yardstick."""
        method, plus_minus = self.methods[name], self.yardstick()
        found: dict[str, Any] = {
            "effect": self._estimate(self.at_yardstick(name)),
            "effect_at_equal_rmse": self._estimate(self.at_yardstick(name, "rmse")),
        }
        for (arm, sign), cost in zip(ARMS, plus_minus, strict=True):
            found[f"effect_{arm}"] = self._estimate(method.effect_at(sign, cost))
        for cost in FIXED_COSTS:
            found[f"effect_at_{cost:g}"] = self._estimate(method.both_at(cost))
        if self.prompts is not None:
            for arm, sign in ARMS:
                wanted = self.methods[self.prompts].end(sign)[0]
                spent = method.cost_at(sign, wanted)
                found[f"cost_at_prompt_effect_{arm}"] = self._estimate(torch.where(wanted > 0, spent, math.nan))
        return found

    @property
    def verdict(self) -> str:
        """One sentence: how far the own method moves the behaviour at the prompts' cost, compared with its rivals."""
        plus, minus = (cost[0].item() for cost in self.yardstick())
        own = self._estimate(self.at_yardstick(self.own))
        whose = "the persona prompts' cost" if self.prompts is not None else "a cost"
        against = []
        for other in (self.prompts, self.untrained):
            if other is not None and other != self.own:
                times, theirs = self.times(self.own, other), self.at_yardstick(other)[0].item()
                ratio = f" (ratio {times.value:.2f}{_interval(times)})" if theirs > 0 else ""
                against.append(f"the effect of {other} is {theirs:.2f} nats{ratio}")
        return (
            f"at {whose} (+ {plus:.3f}, − {minus:.3f} nat per token) {self.own} moves the log-odds by {own.value:.2f} "
            f"nats{_interval(own)}; {'; '.join(against) or 'there is no other method to compare it with'}"
            + (f"; there are only {units} units of questions" if (units := self._units()) < FEW else "")
            + (f"; the answers have a probability of only {mass:.2g}" if (mass := self._mass()) < LEAST_MASS else "")
        )

    def _units(self) -> int:
        """Number of units of questions."""
        return len(self.reports[self.own][0].members())

    def _mass(self) -> float:
        """Mean total probability of the answers without steering."""
        return min(report.answer_mass[report.at(0.0)].mean().item() for report in self.reports[self.own])

    def shortcomings(self) -> list[str]:
        """The reasons why the method cannot be said to steer; empty if it steers.

        At the cost of the persona prompts, each arm must have a larger effect than every random direction: the lower
        end of the paired 95 % interval of the difference must be above 0. At most 5 % of the items may move against
        the arm. There must be enough questions for an interval, and the model must give their answers some
        probability.
        """
        reasons = []
        if (units := self._units()) < FEWEST:
            reasons.append(f"there are only {units} units of questions; a 95 % interval needs {FEWEST} or more")
        if not (mass := self._mass()) >= LEAST_MASS:
            reasons.append(
                f"without steering, the model gives the answers a total probability of only {mass:.2g}; ask for "
                f"answers with a probability of {LEAST_MASS:g} or more"
            )
        costs = self.yardstick()
        for (arm, sign), cost in zip(ARMS, costs, strict=True):
            value = self.methods[self.own].effect_at(sign, cost)[0].item()
            if self.random is not None:
                lead = self.lead(self.own, self.random, sign)
                if units >= FEWEST and not lead.low > 0:
                    reasons.append(
                        f"at equal cost the {arm} arm moves the log-odds by {value:.2f} nats and a random direction "
                        f"by up to {value - lead.value:.2f}: the 95 % interval of the difference begins at "
                        f"{lead.low:.2f}, not above 0"
                    )
            shares = [report.against(sign) for report in self.reports[self.own]]
            if any(math.isnan(share) for share in shares):
                reasons.append(f"no coefficient of the {arm} arm can be compared at that cost")
                continue
            against = max(shares)
            if against > WRONG_WAY:
                reasons.append(f"{against:.1%} of the items move against the {arm} arm; the limit is {WRONG_WAY:.0%}")
        return reasons

    def to_dict(self, resamples: int = 300) -> dict[str, Any]:
        """Verdict, figures and measurements of every method, JSON-serialisable.

        `resamples` is the number of bootstrap resamples for the interval of the own method's range.
        """
        rows = {}
        for name, group in self.reports.items():
            figures = {key: [_finite(v) for v in estimate] for key, estimate in self.figures(name).items()}
            seeds = [report.to_dict(resamples if name == self.own else 0) for report in group]
            probes = {key: [_finite(v) for v in two] for key, two in self.probes.get(name, {}).items()}
            rows[name] = {"figures": figures, "probes": probes, **seeds[0]}
            if len(seeds) > 1:
                rows[name]["seeds"] = seeds
        return {
            "verdict": self.verdict,
            "shortcomings": self.shortcomings(),
            "own": self.own,
            "where": self.where,
            "yardstick": [_finite(cost[0].item()) for cost in self.yardstick()],
            "rows": rows,
        }


def _interval(figure: Estimate) -> str:
    """The interval of a figure as text; empty if the figure has none."""
    return "" if math.isnan(figure.low) else f" [{figure.low:.2f}, {figure.high:.2f}]"


def _finite(value: float) -> float | str | None:
    """A number for JSON, which has neither NaN nor infinity: NaN becomes None, infinity becomes "inf"."""
    if math.isnan(value):
        return None
    return round(value, 6) if math.isfinite(value) else ("inf" if value > 0 else "-inf")
