"""What an evaluation measured, and the figures that follow from it.

`y_i(c)` is the log-odds, in nats, of the target answers of item i at coefficient c.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

ARMS = (("plus", +1), ("minus", -1))
OFF_AXIS = 0.1  # what a change off the axis counts against one on it, in selectivity
FEWEST = 6  # units that an interval needs: of fewer, not even all that agree reach 95 % (2 · 2⁻⁵ = 6 %)
HARM = 2.0  # what a broken answer costs in surgical informedness, in repaired ones


@dataclass(frozen=True)
class Budget:
    """What steering may cost against c = 0: the share of the answers' probability that is lost, and nats."""

    answer_mass: float = 0.05
    neutral_nll: float = 0.08
    control_logp: float = 0.1


@dataclass(frozen=True)
class Sample:
    """A generated continuation of `prompt`.

    `finished`: it ended by itself before the limit. `repetition`: the share of its 3-grams of tokens that had occurred
    in it before. `sentences`: how many of its whole sentences a grammar accepts, and how many there are. `base_nll`:
    negative log-likelihood of its tokens under the base, without what steers, in nats per token.
    """

    coefficient: float
    prompt: str
    text: str
    finished: bool
    repetition: float
    sentences: tuple[int, int] | None = None
    base_nll: float = math.nan


class Arm(NamedTuple):
    """What one sign of the coefficient gains inside the budget, in nats, and where; no coefficient for nothing."""

    gain: float
    coefficient: float | None


@dataclass
class EvalReport:
    """Measurements at each coefficient; index 0 of every tensor with `n_c` rows goes with `coefficients`.

    Attributes:
        coefficients: sorted, 0 among them.
        log_odds: `(n_c n)`, nats, of the target questions.
        answer_mass: `(n_c n)`, probability of all choices together.
        control_logp: `(n_c m)`, log-probability of the right answers of controls.
        control_log_odds: `(n_c m)`, of the right answers against the other choices.
        neutral_logp: `(n_c q)`, log-probability of each neutral text.
        neutral_tokens: `(q)`, their tokens.
        neutral_kl: `(n_c q)`, sum over the tokens of each neutral text of `KL(steered ‖ base)`, exact over the
            vocabulary, in nats.
        neutral_kl_squared: `(n_c q)`, sum over the tokens of its square.
        groups: the `n` groups of the target questions.
        units: their `n` units; those of one unit are resampled together, "" is one of its own.
        thought: `(n_c n)`, whether the thinking before an answer ended by itself; None without thinking.
        dropped: questions that could not be asked, and why.
        samples: what was generated.
        budget: what steering may cost.
        discrete: the dial has nothing between its points, as prompts have not.
        operating: coefficients of − and +, at which flips and the like are counted; None for the best ones inside the
            budget.
    """

    coefficients: list[float]
    log_odds: Tensor
    answer_mass: Tensor
    control_logp: Tensor
    control_log_odds: Tensor
    neutral_logp: Tensor
    neutral_tokens: Tensor
    neutral_kl: Tensor
    neutral_kl_squared: Tensor
    groups: list[str] = field(default_factory=list)
    units: list[str] = field(default_factory=list)
    thought: Tensor | None = None
    dropped: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    budget: Budget = field(default_factory=Budget)
    discrete: bool = False
    operating: tuple[float, float] | None = None

    # -- one coefficient -----------------------------------------------------------------------------------------

    def at(self, coefficient: float) -> int:
        """Index of a coefficient.

        Raises:
            ValueError: it was not evaluated.
        """
        if coefficient not in self.coefficients:
            raise ValueError(f"coefficient {coefficient} was not evaluated; {self.coefficients} were")
        return self.coefficients.index(coefficient)

    def mean_log_odds(self, coefficient: float) -> float:
        return self.log_odds[self.at(coefficient)].mean().item()

    @property
    def neutral_nll(self) -> Tensor:
        """Negative log-likelihood of the neutral texts `(n_c)`, nats a token; NaN without texts."""
        return -self.neutral_logp.sum(dim=1) / self.neutral_tokens.sum()

    @property
    def kl(self) -> Tensor:
        """Mean of `KL(steered ‖ base)` over the tokens of neutral texts, `(n_c)`, nats per token; NaN without."""
        return self.neutral_kl.sum(dim=1) / self.neutral_tokens.sum()

    @property
    def kl_rmse(self) -> Tensor:
        """Root of the mean square of the same: a few ruined tokens, as in a loop, weigh more than in the mean."""
        return (self.neutral_kl_squared.sum(dim=1) / self.neutral_tokens.sum()).sqrt()

    @property
    def relative_mass(self) -> Tensor:
        """Mean probability of all choices together, as a share of that at c = 0, `(n_c)`."""
        mass = self.answer_mass.mean(dim=1)
        return mass / mass[self.at(0.0)]

    def costs(self) -> dict[str, Tensor]:
        """How much worse each budgeted quantity is than at c = 0, `(n_c)`; positive is worse."""
        base = self.at(0.0)
        costs = {"answer_mass": 1 - self.relative_mass}
        if self.control_logp.shape[1]:
            logp = self.control_logp.mean(dim=1)
            costs["control_logp"] = logp[base] - logp
        if self.neutral_logp.shape[1]:
            nll = self.neutral_nll
            costs["neutral_nll"] = nll - nll[base]
        return costs

    def cost(self, coefficient: float) -> dict[str, float]:
        """`costs` at one coefficient."""
        index = self.at(coefficient)
        return {name: values[index].item() for name, values in self.costs().items()}

    def spent(self) -> Tensor:
        """The largest cost as a share of its budget, `(n_c)`; 1 is the whole budget, a NaN is infinite."""
        shares = torch.stack([values / getattr(self.budget, name) for name, values in self.costs().items()])
        return shares.nan_to_num(nan=math.inf).amax(dim=0)

    def inside_budget(self, coefficient: float) -> bool:
        """Whether every cost is at most its budget; a NaN is outside."""
        return self.spent()[self.at(coefficient)].item() <= 1

    # -- both arms -----------------------------------------------------------------------------------------------

    def arm(self, sign: int) -> Arm:
        """Largest gain in mean log-odds, in the direction of `sign`, at a coefficient of that sign inside the budget,
        and that coefficient; (0, None) if no coefficient gains."""
        means = self.log_odds.mean(dim=1)
        gains = sign * (means - means[self.at(0.0)])
        usable = (sign * torch.tensor(self.coefficients) > 0) & (self.spent() <= 1) & (gains > 0)
        if not usable.any():
            return Arm(0.0, None)
        best = int(torch.where(usable, gains, -math.inf).argmax())
        return Arm(gains[best].item(), self.coefficients[best])

    def band(self, n: int = 300, level: float = 0.95, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Percentile bootstrap interval over units of the mean log-odds: lower and upper bounds `(n_c)`.

        NaN over fewer than `FEWEST` units.
        """
        members, generator = self.members(), torch.Generator().manual_seed(seed)
        if len(members) < FEWEST:
            unknown = torch.full((len(self.coefficients),), math.nan)
            return unknown, unknown
        sums = torch.stack([self.log_odds[:, index].sum(dim=1) for index in members], dim=1)
        counts = torch.tensor([len(index) for index in members])
        drawn = torch.randint(len(members), (n, len(members)), generator=generator)
        means = sums[:, drawn].sum(dim=-1) / counts[drawn].sum(dim=-1)
        tail = (1 - level) / 2
        return means.quantile(tail, dim=1), means.quantile(1 - tail, dim=1)

    @property
    def range(self) -> float:
        """Sum of both arms: how far the dial moves the behaviour inside the budget, in nats."""
        return self.arm(+1).gain + self.arm(-1).gain

    def endpoint(self, sign: int) -> float:
        """The coefficient at which an arm is judged: the operating one, or the best one inside the budget, or 0."""
        if self.operating is not None:
            return self.operating[sign > 0]
        return self.arm(sign).coefficient or 0.0

    def against(self, sign: int) -> float:
        """Share of target items that move against an arm, at its endpoint; NaN if no coefficient gains."""
        if not self.endpoint(sign):
            return math.nan
        moved = self.log_odds[self.at(self.endpoint(sign))] - self.log_odds[self.at(0.0)]
        return (sign * moved < 0).float().mean().item()

    @property
    def wrong_way(self) -> float:
        """`against`, mean over the arms that gain; NaN if none does."""
        shares = [self.against(sign) for _, sign in ARMS if self.endpoint(sign)]
        return _share(shares)

    # -- dose and response ---------------------------------------------------------------------------------------

    def inner(self) -> tuple[Tensor, Tensor]:
        """Coefficients within [−1, 1] `(k)`, and the log-odds at them `(k n)`."""
        inside = [index for index, c in enumerate(self.coefficients) if abs(c) <= 1]
        return torch.tensor([self.coefficients[index] for index in inside]), self.log_odds[inside]

    @property
    def slope(self) -> float:
        """Least-squares slope, nats a unit of c, of `mean_i y_i(c) − y_i(0)` through the origin, within |c| ≤ 1."""
        c, y = self.inner()
        gain = y.mean(dim=1) - self.log_odds[self.at(0.0)].mean()
        return ((c * gain).sum() / c.square().sum()).item() if c.any() else 0.0

    @property
    def r_squared(self) -> float:
        """`1 − Σ (gain − slope · c)² / Σ gain²` of the same line; 0 where nothing moves."""
        c, y = self.inner()
        gain = y.mean(dim=1) - self.log_odds[self.at(0.0)].mean()
        total = gain.square().sum()
        return (1 - (gain - self.slope * c).square().sum() / total).item() if total > 0 else 0.0

    @property
    def order(self) -> float:
        """How monotone items are within |c| ≤ 1: rising steps minus falling ones, as a share of all; from −1 to 1."""
        steps = self.inner()[1].diff(dim=0)
        return steps.sign().mean().item() if steps.numel() else 0.0

    # -- answers that change -------------------------------------------------------------------------------------

    def flips(self, sign: int) -> tuple[float, float]:
        """Shares of target items whose preferred answer changes at the arm's endpoint, the right way and the wrong."""
        before, after = (sign * self.log_odds[self.at(c)] for c in (0.0, self.endpoint(sign)))
        right, wrong = (before < 0) & (after > 0), (before > 0) & (after < 0)
        return right.float().mean().item(), wrong.float().mean().item()

    @property
    def arbitrary_flips(self) -> float:
        """Share of controls whose preferred answer changes at either endpoint; 0 without controls."""
        changed = self.control_changes()
        return changed.float().mean().item() if changed.numel() else 0.0

    def control_changes(self) -> Tensor:
        """Which controls `(m)` prefer another answer at either endpoint than at 0."""
        before = self.control_log_odds[self.at(0.0)].sign()
        ends = [self.control_log_odds[self.at(self.endpoint(sign))].sign() for _, sign in ARMS]
        return (ends[0] != before) | (ends[1] != before)

    def mass_at_endpoints(self) -> Tensor:
        """Mean answer mass at 0 and at both endpoints, `(3)`."""
        return torch.stack([self.answer_mass[self.at(c)].mean() for c in (0.0, *(self.endpoint(s) for _, s in ARMS))])

    @property
    def steering_f1(self) -> float:
        """Steering F1 of AntiPaSTO (arXiv 2601.07473), with this report's endpoints for c = ±1; 100 is perfect.

        With weights `|y_i(0)|` that sum to 1 on each side: `net = max(0, fixed − broken)` over target items at the +
        endpoint, `arb` over controls that flip at either; precision = net / (net + arb), recall = net, and F1 is
        multiplied by `(min(mass₊, mass₋) / mass₀)²`, which is above 1 where steering raises the answer mass. NaN where
        an endpoint's mass is below 0.5. The sign of c is never fitted here.
        """
        mass = self.mass_at_endpoints()
        if not mass[1:].min() >= 0.5:
            return math.nan
        before, after = (self.log_odds[self.at(c)] for c in (0.0, self.endpoint(+1)))
        weight = before.abs() / before.abs().sum().clamp_min(1e-30)
        fixed = weight[(before < 0) & (after > 0)].sum()
        broken = weight[(before > 0) & (after < 0)].sum()
        control = self.control_log_odds[self.at(0.0)].abs()
        arbitrary = (control / control.sum().clamp_min(1e-30))[self.control_changes()].sum()
        net = (fixed - broken).clamp_min(0)
        if net == 0:
            return 0.0
        precision, recall = net / (net + arbitrary), net
        f1 = 2 * precision * recall / (precision + recall)
        return (100 * f1 * (mass[1:].min() / mass[0]).square()).item()

    @property
    def surgical_informedness(self) -> float:
        """Surgical informedness of AntiPaSTO's code, at most 100: `mean_arms(fixed − 2 · broken) · min(mass)² · 100`.

        For an arm: fixed is the share of the items answered against it at 0 that its endpoint turns, broken the share
        of those answered with it that its endpoint turns away. An arm without items of both kinds does not count; NaN
        if neither does.
        """
        terms = []
        for _, sign in ARMS:
            before, after = (sign * self.log_odds[self.at(c)] for c in (0.0, self.endpoint(sign)))
            against, along = before < 0, before > 0
            if against.any() and along.any():
                fixed, broken = (after[against] > 0).float().mean(), (after[along] < 0).float().mean()
                terms.append((fixed - HARM * broken).item())
        return 100 * _share(terms) * self.mass_at_endpoints()[1:].min().square().item()

    @property
    def selectivity_gated(self) -> float:
        """`sel_gated` of moral-maps (github.com/wassname/moral-maps): `(on − 0.1 off) · coherence²`.

        Of two choices the centred log-ratio is half of their log-odds: on is half of the mean change of log-odds from
        the − to the + endpoint, off half of the absolute mean change of the controls, coherence the lower answer mass
        of both endpoints as a share of the base's, at most 1.
        """
        plus, minus = self.at(self.endpoint(+1)), self.at(self.endpoint(-1))
        on = (self.log_odds[plus] - self.log_odds[minus]).mean() / 2
        off = (self.control_log_odds[plus] - self.control_log_odds[minus]).mean().abs() / 2
        off = torch.zeros(()) if not self.control_log_odds.shape[1] else off
        mass = self.mass_at_endpoints()
        coherence = (mass[1:].min() / mass[0]).clamp(max=1)
        return ((on - OFF_AXIS * off) * coherence.square()).item()

    @property
    def si_flips(self) -> float:
        """`si_flips` of moral-maps: how much more often the target is picked at the + than at the − endpoint."""
        picked = [(self.log_odds[self.at(self.endpoint(sign))] > 0).float().mean() for _, sign in ARMS]
        return (picked[0] - picked[1]).item()

    # -- generated text ------------------------------------------------------------------------------------------

    def samples_at(self, coefficient: float) -> list[Sample]:
        return [sample for sample in self.samples if sample.coefficient == coefficient]

    def finish_rate(self, coefficient: float) -> float:
        """Share of samples that ended by themselves; NaN without samples."""
        return _share([sample.finished for sample in self.samples_at(coefficient)])

    def repetition(self, coefficient: float) -> float:
        """Mean repetition of the samples; NaN without samples."""
        return _share([sample.repetition for sample in self.samples_at(coefficient)])

    def base_nll(self, coefficient: float) -> float:
        """Mean negative log-likelihood of the samples under the base, nats per token; NaN without samples."""
        return _share([sample.base_nll for sample in self.samples_at(coefficient) if not math.isnan(sample.base_nll)])

    def parse_rate(self, coefficient: float) -> float:
        """Share of generated sentences that the grammar accepts; NaN without a grammar or sentences."""
        counts = [sample.sentences for sample in self.samples_at(coefficient) if sample.sentences]
        total = sum(n for _, n in counts)
        return sum(ok for ok, _ in counts) / total if total else math.nan

    # -- parts and resamples -------------------------------------------------------------------------------------

    def group(self, *names: str) -> "EvalReport":
        """The report on the target questions of these groups only.

        Raises:
            ValueError: there is no such group.
        """
        missing = set(names) - set(self.groups)
        if missing or not names:
            raise ValueError(f"no target question is of {sorted(missing)}; the groups are {sorted(set(self.groups))}")
        members = [index for index, group in enumerate(self.groups) if group in names]
        return self.taken(torch.tensor(members))

    def taken(
        self, targets: Tensor | None = None, controls: Tensor | None = None, texts: Tensor | None = None
    ) -> "EvalReport":
        """The report on the items at these indices, repeated ones included; None keeps all."""

        def pick(tensor: Tensor | None, index: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or index is None else tensor[..., index]

        def named(names: list[str]) -> list[str]:
            return names if targets is None or not names else [names[i] for i in targets.tolist()]

        return replace(
            self,
            log_odds=pick(self.log_odds, targets),
            answer_mass=pick(self.answer_mass, targets),
            groups=named(self.groups),
            units=named(self.units),
            thought=pick(self.thought, targets),
            control_logp=pick(self.control_logp, controls),
            control_log_odds=pick(self.control_log_odds, controls),
            neutral_logp=pick(self.neutral_logp, texts),
            neutral_tokens=pick(self.neutral_tokens, texts),
            neutral_kl=pick(self.neutral_kl, texts),
            neutral_kl_squared=pick(self.neutral_kl_squared, texts),
        )

    def mirrored(self) -> "EvalReport":
        """The report on the dial that does at c what this one does at −c; without samples."""

        def flipped(tensor: Tensor) -> Tensor:
            return tensor.flip(0)

        measured = ("log_odds", "answer_mass", "control_logp", "control_log_odds", "neutral_logp", "neutral_kl")
        return replace(
            self,
            coefficients=[-c if c else 0.0 for c in reversed(self.coefficients)],
            **{name: flipped(getattr(self, name)) for name in (*measured, "neutral_kl_squared")},
            thought=None if self.thought is None else flipped(self.thought),
            operating=None if self.operating is None else (-self.operating[1], -self.operating[0]),
            samples=[],
        )

    def members(self) -> list[Tensor]:
        """Indices of the target questions of each unit."""
        by_unit: dict[str | int, list[int]] = {}
        for index in range(self.log_odds.shape[1]):
            by_unit.setdefault((self.units[index] if self.units else "") or index, []).append(index)
        return [torch.tensor(indices) for indices in by_unit.values()]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many target questions, controls and neutral texts there are."""
        return self.log_odds.shape[1], self.control_logp.shape[1], self.neutral_logp.shape[1]

    def to_dict(self, resamples: int = 300) -> dict[str, Any]:
        """Every figure at every coefficient and of the whole, JSON-serialisable; a NaN becomes None.

        `resamples` of the bootstrap make the 95 % interval of the range, of `FEWEST` units or more; 0 for none.
        """
        parts = {name: self.group(name) for name in sorted(set(self.groups) - {""})}
        figures: dict[str, Any] = {
            "range": _rounded(self.range),
            "arms": {
                name: {"gain": _rounded(self.arm(sign).gain), "coefficient": self.arm(sign).coefficient}
                for name, sign in ARMS
            },
            "wrong_way": _rounded(self.wrong_way),
            "slope": _rounded(self.slope),
            "r_squared": _rounded(self.r_squared),
            "order": _rounded(self.order),
            "flips": {name: dict(zip(("right", "wrong"), self.flips(sign), strict=True)) for name, sign in ARMS},
            "arbitrary_flips": _rounded(self.arbitrary_flips),
            "steering_f1": _rounded(self.steering_f1),
            "surgical_informedness": _rounded(self.surgical_informedness),
            "sel_gated": _rounded(self.selectivity_gated),
            "si_flips": _rounded(self.si_flips),
            "groups": {
                name: {"range": _rounded(part.range), "wrong_way": _rounded(part.wrong_way)}
                for name, part in parts.items()
            },
            "items": dict(zip(("target", "control", "neutral_texts"), self.sizes, strict=True)),
            "dropped": self.dropped,
            "at": [self.row(c) for c in self.coefficients],
        }
        if resamples:
            enough = len(self.members()) >= FEWEST
            ends = bootstrap([self], lambda report: report.range, n=resamples) if enough else (math.nan, math.nan)
            figures["range_interval"] = [_rounded(end) for end in ends]
        return figures

    def row(self, coefficient: float) -> dict[str, float | bool | None]:
        """What was measured at one coefficient."""
        index = self.at(coefficient)
        measured = {
            "coefficient": coefficient,
            "log_odds": self.log_odds[index].mean(),
            "answer_mass": self.answer_mass[index].mean(),
            "relative_mass": self.relative_mass[index],
        }
        if self.control_logp.shape[1]:
            measured["control_logp"] = self.control_logp[index].mean()
        if self.neutral_logp.shape[1]:
            measured["neutral_nll"] = self.neutral_nll[index]
            measured["kl"] = self.kl[index]
            measured["kl_rmse"] = self.kl_rmse[index]
        if self.thought is not None:
            measured["thinking_finished"] = self.thought[index].float().mean()
        if self.samples_at(coefficient):
            measured["finish_rate"] = self.finish_rate(coefficient)
            measured["repetition"] = self.repetition(coefficient)
            measured["base_nll"] = self.base_nll(coefficient)
            measured["parse_rate"] = self.parse_rate(coefficient)
        values = {name: _rounded(value) for name, value in measured.items()}
        return {**values, "inside_budget": self.inside_budget(coefficient)}


def bootstrap(
    reports: Sequence[EvalReport],
    statistic: Callable[..., float],
    *,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic(*reports)` (Efron 1979).

    Units of questions, controls and texts are drawn again with replacement, the same ones in all reports: differences
    and ratios of methods are paired, and so are several training seeds. A NaN is left out; an infinite value counts.
    Over a single unit of questions there is no interval: both ends are NaN.

    Raises:
        ValueError: the reports are of different items.
    """
    sizes, units = {report.sizes for report in reports}, {tuple(report.units) for report in reports}
    if len(sizes) != 1 or len(units) != 1:
        raise ValueError(f"only reports on the same items can be resampled together; these have {sorted(sizes)} items")
    members = reports[0].members()
    if len(members) < 2:
        return math.nan, math.nan
    _, controls, texts = reports[0].sizes
    generator = torch.Generator().manual_seed(seed)

    def drawn(size: int) -> Tensor:
        return torch.randint(size, (size,), generator=generator)

    def drawn_if_any(size: int) -> Tensor | None:
        return drawn(size) if size else None

    values = []
    for _ in range(n):
        targets = torch.cat([members[index] for index in drawn(len(members)).tolist()])
        index = (targets, drawn_if_any(controls), drawn_if_any(texts))
        value = statistic(*(report.taken(*index) for report in reports))
        if not math.isnan(value):
            values.append(value)
    if not values:
        return math.nan, math.nan
    values.sort()
    tail = (1 - level) / 2
    return values[math.floor(tail * (len(values) - 1))], values[math.ceil((1 - tail) * (len(values) - 1))]


def _share(values: Sequence[float]) -> float:
    """The mean, or NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def _rounded(value: float | Tensor) -> float | None:
    """A rounded number for JSON, which knows no NaN and no infinity."""
    value = float(value)
    return round(value, 6) if math.isfinite(value) else None
