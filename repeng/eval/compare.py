"""Measure a dial and its rivals at the same costs."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.control.steer import steer
from repeng.data.pairs import ContrastPair
from repeng.data.questions import Question
from repeng.data.task import Task
from repeng.data.word_questions import word_questions
from repeng.eval.comparison import PLAIN_COST, Comparison
from repeng.eval.curves import FIXED_COSTS, methods_of, nearest
from repeng.eval.eval_report import ARMS, EvalReport, Sample
from repeng.eval.measure import Answers, Dial, Meter, Point, askable, prompt_dial
from repeng.eval.samples import draw_samples
from repeng.eval.stored import load_reports, save_reports
from repeng.eval.trace import find_costs, find_edge
from repeng.model.identity import model_key
from repeng.model.sites import RESIDUAL, decoder_layers, eval_mode
from repeng.model.types import CausalLM
from repeng.vectors.extract import extract
from repeng.vectors.vector import SteeringVector

MAX_SCREENED = 12  # layers in the search for the best one; about half of them are measured
SCREEN_PAIRS, SCREEN_TEXTS = 12, 4
SCREENED_DEPTH = (0.2, 0.95)
SCREENED = 6  # approximate number of coefficients per layer
SAMPLES, SAMPLE_TOKENS = 6, 24
RANDOM_DIRECTIONS = 3
TRACED = 12  # approximate number of coefficients per dial
LARGEST = 64.0  # the largest coefficient to try
FARTHEST_START = 4.0
SAME = 2e-3  # nats by which two measurements of the same base may differ
CACHED = 3  # raise it when the measurements of a baseline change
ADAPTER, PROMPTS, MEAN_DIFF, RANDOM = "this adapter", "persona prompts", "mean difference", "random direction"


def compare(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    dial: Dial | None = None,
    name: str = ADAPTER,
    rivals: Mapping[str, Dial] | None = None,
    cache: Path | None = None,
) -> Comparison:
    """Compare a dial with persona prompts, a mean-difference vector and random directions on the questions of a task.

    Each method is measured at coefficients whose KL divergence from the base is near 0.05, 0.1 and 0.3 nats per token,
    and near the cost of the persona prompts. The mean difference and the choice of its layer use only the pairs and
    the training texts of the task.

    Args:
        model: the model; its adapters are switched off while the baselines are measured.
        tokenizer: its tokenizer.
        task: the data.
        dial: the dial to compare; by default the adapters of the model.
        name: the name of this dial in the reports.
        rivals: more dials by name. Each of them must switch the model's adapters on or off itself.
        cache: a folder that stores the measurements of the baselines. The key is a hash of model, data and version of
            the package.

    Raises:
        ValueError: the task has no target question that can be asked, or no unseen neutral texts.
    """
    if not task.unseen_neutral_texts:
        raise ValueError("the task has no unseen_neutral_texts: methods are compared at equal cost on such texts")
    adapted = isinstance(model, PeftModel)
    off = partial(steer, model, 0.0) if adapted else nullcontext
    with Progress(1 + len(rivals or {})) as progress:
        meter = Meter(model, tokenizer, task.questions, task.unseen_neutral_texts, base=off)
        tracer = Tracer(meter, progress, task)
        path = None if cache is None else cache / f"baselines-{_key(model, tokenizer, task)}.safetensors"
        known = _known(path, meter)
        if known is None:
            known = measure_baselines(model, tokenizer, task, tracer, off)
            if path is not None:
                _keep(path, known)
        progress.baselines_are_done()
        prompts = PROMPTS if task.personas else None
        if prompts is not None:
            tracer.set_yardstick(known.reports[PROMPTS][0])
        found, probes = {**known.reports}, {**known.probes}
        for which, other in {name: dial or partial(steer, model), **(rivals or {})}.items():
            report, probes[which] = tracer.look(other, tracer.trace(other))
            found[which] = [report]
    return Comparison(found, name, prompts=prompts, random=RANDOM, untrained=known.untrained, probes=probes)


class Baselines(NamedTuple):
    """Reports by method, the name of the strongest rival without training, and the results of the probes."""

    reports: dict[str, list[EvalReport]]
    untrained: str
    probes: dict[str, dict[str, tuple[float, float]]]


def _key(model: CausalLM, tokenizer: PreTrainedTokenizerBase, task: Task) -> str:
    """Hash of everything that the baselines depend on, except the properties that `_known` compares."""
    constants = CACHED, FIXED_COSTS, PLAIN_COST, RANDOM_DIRECTIONS, LARGEST
    return model_key(model, tokenizer, version("repeng"), constants, asdict(replace(task, accepts=None)))


def _keep(path: Path, known: Baselines) -> None:
    """Store the measurements; if the file cannot be written, warn and go on."""
    try:
        save_reports(path, known.reports, untrained=known.untrained, probes=known.probes)
    except OSError as error:
        warnings.warn(f"the measurements of the baselines are not stored for another run: {error}", stacklevel=2)


def _known(path: Path | None, meter: Meter) -> Baselines | None:
    """Stored baselines, if the base model gave the same answers then; else None.

    The answers of the base also depend on precision, quantisation and chat template, which the key does not hold.
    """
    if path is None or not path.is_file():
        return None
    try:
        reports, more = load_reports(path)
    except ValueError:
        return None
    for report in (report for group in reports.values() for report in group):
        pairs = (report.log_odds, meter.base.target.odds), (report.neutral_logp, meter.base.texts.logp)
        if any(a.shape[1:] != b.shape or not torch.allclose(a[report.at(0.0)], b, atol=SAME) for a, b in pairs):
            return None
    probes = {name: {key: (two[0], two[1]) for key, two in one.items()} for name, one in more["probes"].items()}
    return Baselines(reports, more["untrained"], probes)


def measure_baselines(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    tracer: "Tracer",
    off: Callable[[], AbstractContextManager[Any]],
) -> Baselines:
    """Measure persona prompts, mean difference and random directions; set the yardstick of `tracer`."""
    found: dict[str, list[EvalReport]] = {}
    probes: dict[str, dict[str, tuple[float, float]]] = {}
    if task.personas:
        prompts = without_adapters(off, prompt_dial(*task.personas))
        report = tracer.discrete(prompts)
        tracer.set_yardstick(report)
        report, probes[PROMPTS] = tracer.look(prompts, report)
        found[PROMPTS] = [report]
    with off():
        layers = screened_layers(len(decoder_layers(model)))
        vectors = mean_differences(model, tokenizer, task.pairs, layers)
        best = best_layer(model, tokenizer, task, vectors, tracer.progress.step)
    untrained, vector = f"{MEAN_DIFF} (layer {best})", vector_dial(model, vectors[best], off)
    report, probes[untrained] = tracer.look(vector, tracer.trace(vector))
    found[untrained] = [report]
    drawn: list[EvalReport] = []
    for seed in range(RANDOM_DIRECTIONS):
        noise = vector_dial(model, vectors[best].random_like(seed=seed), off)
        start = drawn[-1].endpoint(+1) if drawn else 0.0  # random directions have similar costs
        drawn.append(tracer.trace(noise, few=True, start=start or 1.0))
    # The sign of a random direction is arbitrary, so the mirrored report counts as well.
    found[RANDOM] = [report for one in drawn for report in (one, one.mirrored())]
    return Baselines(found, untrained, probes)


class Progress:
    """One progress bar for all measurements. Their number is an estimate at first."""

    left: int
    bar: Any

    def __init__(self, dials: int) -> None:
        self.left = TRACED * dials
        untrained = TRACED * (1 + RANDOM_DIRECTIONS) + SCREENED * (MAX_SCREENED // 2 + 2) + 2
        self.bar = tqdm(total=self.left + untrained, desc="evaluation", leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self) -> None:
        """Count one measurement. If it is not the last one although the estimate says so, the total grows."""
        self.bar.update()
        self.bar.total = max(self.bar.total, self.bar.n + 1)

    def baselines_are_done(self) -> None:
        """Correct the total: only the compared dials remain to be measured."""
        self.bar.total = self.bar.n + self.left
        self.bar.refresh()


def trace(
    meter: Meter, dial: Dial, targets: Mapping[int, Sequence[float]], step: Callable[[], object], start: float = 1.0
) -> dict[float, Point]:
    """Measure a dial at coefficients whose costs are near `targets`, which are given by sign; call `step` for each.

    The search of the first arm begins at `start`. The search of the second arm begins at the size of the coefficient
    whose cost on the first arm was nearest to the lowest target.
    """
    points: dict[float, Point] = {}
    tokens = meter.neutral_tokens.sum().item()

    def cost(c: float) -> float:
        step()
        points[c] = meter.at(dial, c)
        return points[c].texts.kl.sum().item() / tokens

    for sign, costs in targets.items():
        wanted = sorted(set(costs))
        known = find_costs(lambda c, s=sign: cost(s * c), wanted, start=start, largest=LARGEST)
        usable = [c for c, value in known.items() if 0 < value < math.inf]
        found = min(usable, key=lambda c: abs(math.log(known[c] / wanted[0])), default=start)
        start = min(found, FARTHEST_START)
    return points


class Tracer:
    """Measures several dials with one meter, all near the same costs."""

    meter: Meter
    progress: Progress
    task: Task
    costs: dict[int, float]
    probes: dict[str, tuple[list[Question], ...]]

    def __init__(self, meter: Meter, progress: Progress, task: Task) -> None:
        self.meter, self.progress, self.task = meter, progress, task
        self.costs: dict[int, float] = {+1: PLAIN_COST, -1: PLAIN_COST}
        self.probes = {
            name: tuple(askable(meter.tokenizer, side)[0] for side in probe) for name, probe in task.probes.items()
        }
        self.probes = {name: sides for name, sides in self.probes.items() if all(sides)}
        self._unsteered: list[dict[str, Answers]] | None = None
        self._unsteered_samples: list[Sample] = []

    def set_yardstick(self, prompts: EvalReport) -> None:
        """Use the cost of the prompts as the cost at which methods are compared."""
        for _, sign in ARMS:
            cost = prompts.kl[prompts.at(float(sign))].item()
            self.costs[sign] = cost if math.isfinite(cost) and cost > 0 else PLAIN_COST

    def discrete(self, dial: Dial) -> EvalReport:
        """Measure a dial that can only be −1, 0 or 1."""
        points = {float(sign): self._point(dial, float(sign)) for _, sign in ARMS}
        return replace(self.meter.report(points), discrete=True, operating=(-1.0, 1.0))

    def trace(self, dial: Dial, few: bool = False, start: float = 1.0) -> EvalReport:
        """Measure a dial near every cost and near the edge of the budget, or with `few` near two costs only.

        `start` is the first coefficient of the search, see the function `trace`.
        """
        fixed = (PLAIN_COST,) if few else FIXED_COSTS
        points = trace(
            self.meter, dial, {sign: [cost, *fixed] for sign, cost in self.costs.items()}, self.progress.step, start
        )

        def measure(c: float) -> None:
            points[c] = self._point(dial, c)

        for _, sign in () if few else ARMS:
            find_edge(lambda: self.meter.report(points), measure, sign)
        report = self.meter.report(points)
        ends = [nearest(report, sign, self.costs[sign]) for _, sign in ARMS]
        return replace(report, operating=(ends[1], ends[0]))

    def look(self, dial: Dial, report: EvalReport) -> tuple[EvalReport, dict[str, tuple[float, float]]]:
        """Add samples to a report and ask the probe questions, both at the coefficients that cost the yardstick.

        Returns the report, and by probe the effect of the + and of the − arm in nats.
        """
        if self._unsteered is None:
            self._unsteered = [self._probed(self.meter.base_context, side) for side in range(len(ARMS))]
            self._unsteered_samples = self._samples(lambda _: self.meter.base_context(), 0.0)
        effects: dict[str, list[float]] = {name: [] for name in self.probes}
        samples = [*self._unsteered_samples]
        for side, (_, sign) in enumerate(ARMS):
            c = report.endpoint(sign)
            before = self._unsteered[side]
            after = self._probed(partial(dial, c), side) if c else before
            for name, answers in after.items():
                effects[name].append(sign * (answers.odds - before[name].odds).mean().item())
            samples += self._samples(dial, c) if c else []
        return replace(report, samples=samples), {name: (two[0], two[1]) for name, two in effects.items()}

    def _point(self, dial: Dial, c: float) -> Point:
        self.progress.step()
        return self.meter.at(dial, c)

    def _probed(self, context: Callable[[], AbstractContextManager[Any]], side: int) -> dict[str, Answers]:
        asked = {name: sides[side] for name, sides in self.probes.items()}
        with eval_mode(self.meter.model), context() as rewrite:
            answers = self.meter.ask([question for some in asked.values() for question in some], rewrite)
        parts = zip(*(part.split([*map(len, asked.values())]) for part in answers), strict=True)
        return {name: Answers(*part) for name, part in zip(asked, parts, strict=True)}

    def _samples(self, dial: Dial, c: float) -> list[Sample]:
        """Continuations of some of the target questions, taken at equal distances."""
        targets = self.meter.targets
        return draw_samples(
            self.meter.model,
            self.meter.tokenizer,
            targets[:: max(1, len(targets) // SAMPLES)][:SAMPLES],
            dial,
            c,
            SAMPLE_TOKENS,
            self.task.accepts,
            base=self.meter.base_context,
        )


def without_adapters(off: Callable[[], AbstractContextManager], dial: Dial) -> Dial:
    """The same dial, with the model's adapters switched off."""

    @contextmanager
    def both(c: float) -> Iterator:
        with off(), dial(c) as rewrite:
            yield rewrite

    return both


def vector_dial(model: CausalLM, vector: SteeringVector, off: Callable[[], AbstractContextManager]) -> Dial:
    return without_adapters(off, lambda c: steer(model, c, vector=vector))


def mean_differences(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[ContrastPair], layers: Sequence[int]
) -> dict[int, SteeringVector]:
    """One mean-difference vector on the residual stream for each layer."""
    together = extract(model, tokenizer, pairs, sites=[RESIDUAL], layers=list(layers), held_out=0)
    return {layer: together.select(layers=[layer]) for layer in together.layers}


def screened_layers(depth: int) -> list[int]:
    """Candidate layers for a vector: at most 12, evenly spaced, without the first and last layers of a deep model."""
    first, last = (round(share * (depth - 1)) for share in SCREENED_DEPTH)
    if depth <= MAX_SCREENED // 2:
        first, last = 0, depth - 1
    step = max(1, -(-(last - first + 1) // MAX_SCREENED))
    return list(range(first, last + 1, step))


def best_layer(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    vectors: Mapping[int, SteeringVector],
    step: Callable[[], object] = lambda: None,
) -> int:
    """The layer whose vector has the largest effect at equal cost, on questions made from some training pairs.

    The effect of a layer is read at a cost of 0.1 nats per token. Every second layer is measured first, then the
    neighbours of the best of them. The result is the middle layer if no questions can be made from the pairs.
    """
    pairs = task.pairs[:: max(1, len(task.pairs) // SCREEN_PAIRS)][:SCREEN_PAIRS]
    with eval_mode(model):
        questions = word_questions(cast(PreTrainedModel, model), tokenizer, pairs).questions
    if not questions:
        return list(vectors)[len(vectors) // 2]
    meter = Meter(model, tokenizer, questions, task.neutral_texts[:SCREEN_TEXTS], base=nullcontext)

    @cache
    def merit(layer: int) -> float:
        dial = partial(steer, model, vector=vectors[layer])
        points = trace(meter, dial, {+1: [PLAIN_COST], -1: [PLAIN_COST]}, step)
        return methods_of({"": [meter.report(points)]}, 0)[""].both_at(PLAIN_COST)[0].item()

    layers = sorted(vectors)
    best = layers.index(max(layers[::2], key=merit))
    return max(layers[max(0, best - 1) : best + 2], key=merit)
