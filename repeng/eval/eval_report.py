"""The measurements of an evaluation, and the figures that follow from them.

`y_i(c)` is the log-odds, in nats, of the target answers of item i at coefficient c.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

ARMS = (("plus", +1), ("minus", -1))
OFF_AXIS = 0.1  # weight of a change of the controls, relative to a change of the targets, in `selectivity_gated`
FEWEST = 6  # units that a 95 % interval needs: five units that all agree are still at 2 · 2⁻⁵ = 6 %
HARM = 2.0  # weight of a broken answer, relative to a repaired one, in surgical informedness


@dataclass(frozen=True)
class Budget:
    """The largest costs that steering may have, relative to c = 0.

    Attributes:
        answer_mass: loss of the probability of all choices together, as a share of that at c = 0.
        neutral_nll: rise of the negative log-likelihood of neutral texts, in nats per token.
        control_logp: loss of log-probability of the right answers of controls, in nats.
    """

    answer_mass: float = 0.05
    neutral_nll: float = 0.08
    control_logp: float = 0.1


@dataclass(frozen=True)
class Sample:
    """A generated continuation of `prompt`.

    Attributes:
        coefficient: coefficient of the dial.
        prompt: the text that is continued.
        text: the continuation.
        finished: whether the text ended by itself before the limit.
        repetition: share of the 3-grams of tokens that occurred earlier in the text.
        sentences: how many complete sentences a grammar accepts, and how many there are; None without a grammar.
        base_nll: negative log-likelihood of the tokens under the unsteered base model, in nats per token.
    """

    coefficient: float
    prompt: str
    text: str
    finished: bool
    repetition: float
    sentences: tuple[int, int] | None = None
    base_nll: float = math.nan


class Arm(NamedTuple):
    """Largest gain of one sign of the coefficient inside the budget, in nats, and its coefficient (None: no gain)."""

    gain: float
    coefficient: float | None


@dataclass
class EvalReport:
    """Measurements at each coefficient. Axis 0 of every tensor with `n_c` rows is in the order of `coefficients`.

    Attributes:
        coefficients: the measured coefficients, sorted; 0 is one of them.
        log_odds: `(n_c n)`, log-odds of the target answers of the target questions, in nats.
        answer_mass: `(n_c n)`, probability of all choices of a target question together.
        control_logp: `(n_c m)`, log-probability of the right answers of controls.
        control_log_odds: `(n_c m)`, log-odds of the right answers of controls against the other choices.
        neutral_logp: `(n_c q)`, log-probability of each neutral text.
        neutral_tokens: `(q)`, number of tokens of each neutral text.
        neutral_kl: `(n_c q)`, sum of `KL(steered ‖ base)` over the tokens of each neutral text, exact over the
            vocabulary, in nats.
        neutral_kl_squared: `(n_c q)`, sum of the squared KL divergence over the tokens of each neutral text.
        groups: the group of each of the `n` target questions.
        units: the unit of each of the `n` target questions. Questions of the same unit are resampled together. A
            question with an empty string is a unit by itself.
        thought: `(n_c n)`, whether the thinking before an answer ended by itself; None without thinking.
        dropped: for each question that could not be asked, the reason.
        samples: the generated continuations.
        budget: the largest costs that steering may have.
        discrete: the dial has no coefficients between the measured ones, as is true of prompts.
        operating: the coefficients of the − and of the + arm at which flips and similar figures are counted; None
            means the best coefficients inside the budget.
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
            ValueError: the coefficient was not evaluated.
        """
        if coefficient not in self.coefficients:
            raise ValueError(f"coefficient {coefficient} was not evaluated; choose one of {self.coefficients}")
        return self.coefficients.index(coefficient)

    def mean_log_odds(self, coefficient: float) -> float:
        return self.log_odds[self.at(coefficient)].mean().item()

    @property
    def neutral_nll(self) -> Tensor:
        """Negative log-likelihood of the neutral texts `(n_c)`, in nats per token; NaN without texts."""
        return -self.neutral_logp.sum(dim=1) / self.neutral_tokens.sum()

    @property
    def kl(self) -> Tensor:
        """Mean `KL(steered ‖ base)` over the tokens of neutral texts, `(n_c)`, nats per token; NaN without texts."""
        return self.neutral_kl.sum(dim=1) / self.neutral_tokens.sum()

    @property
    def kl_rmse(self) -> Tensor:
        """Root mean square of the same KL divergence, `(n_c)`. A few ruined tokens weigh more than in the mean."""
        return (self.neutral_kl_squared.sum(dim=1) / self.neutral_tokens.sum()).sqrt()

    @property
    def relative_mass(self) -> Tensor:
        """Mean probability of all choices together, divided by its value at c = 0, `(n_c)`."""
        mass = self.answer_mass.mean(dim=1)
        return mass / mass[self.at(0.0)]

    def costs(self) -> dict[str, Tensor]:
        """By how much each budgeted quantity is worse than at c = 0, `(n_c)`; positive is worse."""
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
        """The costs at one coefficient, see `costs`."""
        index = self.at(coefficient)
        return {name: values[index].item() for name, values in self.costs().items()}

    def spent(self) -> Tensor:
        """The largest cost as a share of its budget, `(n_c)`; 1 is the whole budget. NaN counts as infinite."""
        shares = torch.stack([values / getattr(self.budget, name) for name, values in self.costs().items()])
        return shares.nan_to_num(nan=math.inf).amax(dim=0)

    def inside_budget(self, coefficient: float) -> bool:
        """Whether every cost is within its budget; a NaN is not."""
        return self.spent()[self.at(coefficient)].item() <= 1

    # -- both arms -----------------------------------------------------------------------------------------------

    def arm(self, sign: int) -> Arm:
        """The largest gain in mean log-odds in the direction of `sign`, and its coefficient.

        Only coefficients of that sign inside the budget count. (0, None) if none of them gains.
        """
        means = self.log_odds.mean(dim=1)
        gains = sign * (means - means[self.at(0.0)])
        usable = (sign * torch.tensor(self.coefficients) > 0) & (self.spent() <= 1) & (gains > 0)
        if not usable.any():
            return Arm(0.0, None)
        best = int(torch.where(usable, gains, -math.inf).argmax())
        return Arm(gains[best].item(), self.coefficients[best])

    def band(self, n: int = 300, level: float = 0.95, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Percentile bootstrap interval of the mean log-odds over units: lower and upper bounds `(n_c)`.

        The bounds are NaN if there are fewer than `FEWEST` units.
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
        """Sum of the gains of both arms: how far the dial moves the behaviour inside the budget, in nats."""
        return self.arm(+1).gain + self.arm(-1).gain

    def endpoint(self, sign: int) -> float:
        """The coefficient at which an arm is judged.

        It is the operating coefficient if there is one, else the best coefficient inside the budget, else 0.
        """
        if self.operating is not None:
            return self.operating[sign > 0]
        return self.arm(sign).coefficient or 0.0

    def against(self, sign: int) -> float:
        """Share of target items that move against an arm at its endpoint; NaN if the endpoint is 0."""
        if not self.endpoint(sign):
            return math.nan
        moved = self.log_odds[self.at(self.endpoint(sign))] - self.log_odds[self.at(0.0)]
        return (sign * moved < 0).float().mean().item()

    @property
    def wrong_way(self) -> float:
        """Mean of `against` over the arms that have an endpoint other than 0; NaN if neither has."""
        shares = [self.against(sign) for _, sign in ARMS if self.endpoint(sign)]
        return _share(shares)

    # -- dose and response ---------------------------------------------------------------------------------------

    def inner(self) -> tuple[Tensor, Tensor]:
        """The coefficients within [−1, 1] `(k)`, and the log-odds at these coefficients `(k n)`."""
        inside = [index for index, c in enumerate(self.coefficients) if abs(c) <= 1]
        return torch.tensor([self.coefficients[index] for index in inside]), self.log_odds[inside]

    @property
    def slope(self) -> float:
        """Least-squares slope of `mean_i y_i(c) − y_i(0)` through the origin, nats per unit of c, within |c| ≤ 1."""
        c, y = self.inner()
        gain = y.mean(dim=1) - self.log_odds[self.at(0.0)].mean()
        return ((c * gain).sum() / c.square().sum()).item() if c.any() else 0.0

    @property
    def r_squared(self) -> float:
        """`1 − Σ (gain − slope · c)² / Σ gain²` of the line of `slope`; 0 if no gain differs from 0."""
        c, y = self.inner()
        gain = y.mean(dim=1) - self.log_odds[self.at(0.0)].mean()
        total = gain.square().sum()
        return (1 - (gain - self.slope * c).square().sum() / total).item() if total > 0 else 0.0

    @property
    def order(self) -> float:
        """How monotone the items are within |c| ≤ 1: rising steps minus falling steps, divided by all steps."""
        steps = self.inner()[1].diff(dim=0)
        return steps.sign().mean().item() if steps.numel() else 0.0

    # -- answers that change -------------------------------------------------------------------------------------

    def flips(self, sign: int) -> tuple[float, float]:
        """Shares of target items whose preferred answer changes at the arm's endpoint: along and against the arm."""
        before, after = (sign * self.log_odds[self.at(c)] for c in (0.0, self.endpoint(sign)))
        right, wrong = (before < 0) & (after > 0), (before > 0) & (after < 0)
        return right.float().mean().item(), wrong.float().mean().item()

    @property
    def arbitrary_flips(self) -> float:
        """Share of controls whose preferred answer changes at either endpoint; 0 without controls."""
        changed = self.control_changes()
        return changed.float().mean().item() if changed.numel() else 0.0

    def control_changes(self) -> Tensor:
        """Which controls `(m)` prefer a different answer at either endpoint than at 0."""
        before = self.control_log_odds[self.at(0.0)].sign()
        ends = [self.control_log_odds[self.at(self.endpoint(sign))].sign() for _, sign in ARMS]
        return (ends[0] != before) | (ends[1] != before)

    def mass_at_endpoints(self) -> Tensor:
        """Mean answer mass at 0 and at both endpoints, `(3)`."""
        return torch.stack([self.answer_mass[self.at(c)].mean() for c in (0.0, *(self.endpoint(s) for _, s in ARMS))])

    @property
    def steering_f1(self) -> float:
        """Steering F1 of AntiPaSTO (arXiv 2601.07473); 100 is perfect. The endpoints of this report stand for c = ±1.

        Items have the weights `|y_i(0)|`, normalised to sum 1 over targets and over controls.
        `net = max(0, fixed − broken)` counts target items at the + endpoint. `arb` counts controls that flip at either
        endpoint. precision = net / (net + arb), recall = net. F1 is multiplied by `(min(mass₊, mass₋) / mass₀)²`,
        which is above 1 if steering raises the answer mass. The result is NaN if the mass of an endpoint is below 0.5.
        The sign of c is not fitted here.
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

        Per arm, `fixed` is the share of the items that are answered against the arm at 0 and along it at its endpoint,
        out of all items answered against it at 0. `broken` is the share that changes the other way, out of all items
        answered along the arm at 0. An arm does not count if items of either kind are missing. NaN if no arm counts.
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

        `on` is half of the mean change of the log-odds from the − endpoint to the + endpoint: the centred log-ratio of
        two choices is half of their log-odds. `off` is half of the absolute mean change of the controls. `coherence`
        is the lower answer mass of the two endpoints, divided by the answer mass of the base, and at most 1.
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
        """`si_flips` of moral-maps: share of items with the target answer at the + endpoint, minus that at the −."""
        picked = [(self.log_odds[self.at(self.endpoint(sign))] > 0).float().mean() for _, sign in ARMS]
        return (picked[0] - picked[1]).item()

    # -- generated text ------------------------------------------------------------------------------------------

    def samples_at(self, coefficient: float) -> list[Sample]:
        return [sample for sample in self.samples if sample.coefficient == coefficient]

    def finish_rate(self, coefficient: float) -> float:
        """Share of samples that ended before the limit; NaN without samples."""
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
            ValueError: no target question has this group.
        """
        missing = set(names) - set(self.groups)
        if missing or not names:
            raise ValueError(f"no target question is in {sorted(missing)}; the groups are {sorted(set(self.groups))}")
        members = [index for index, group in enumerate(self.groups) if group in names]
        return self.taken(torch.tensor(members))

    def taken(
        self, targets: Tensor | None = None, controls: Tensor | None = None, texts: Tensor | None = None
    ) -> "EvalReport":
        """The report on the items at these indices, which may repeat; None keeps all items."""

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
        """The report on the dial with the opposite sign of c; without samples."""

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
        """Numbers of target questions, controls and neutral texts."""
        return self.log_odds.shape[1], self.control_logp.shape[1], self.neutral_logp.shape[1]

    def to_dict(self, resamples: int = 300) -> dict[str, Any]:
        """All figures, of the whole report and at every coefficient, JSON-serialisable; NaN becomes None.

        `resamples` is the number of bootstrap resamples for the 95 % interval of the range; 0 leaves the interval out.
        With fewer than `FEWEST` units, both ends of the interval are None.
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
        """The measurements at one coefficient."""
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

    Units of questions, controls and texts are resampled with replacement, in the same way for all reports. Differences
    and ratios of methods or training seeds are therefore paired. Values of NaN are left out; infinite values count.
    If there is only one unit of questions, both ends of the interval are NaN.

    Raises:
        ValueError: the reports are on different items.
    """
    sizes, units = {report.sizes for report in reports}, {tuple(report.units) for report in reports}
    if len(sizes) != 1 or len(units) != 1:
        raise ValueError(
            "only reports on the same items can be resampled together; the numbers of (target questions, controls, "
            f"neutral texts) in these are {sorted(sizes)}"
        )
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
    """The mean, or NaN if there are no values."""
    return sum(values) / len(values) if values else math.nan


def _rounded(value: float | Tensor) -> float | None:
    """A rounded number for JSON; None for NaN or infinity, which JSON does not have."""
    value = float(value)
    return round(value, 6) if math.isfinite(value) else None
