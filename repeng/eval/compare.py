"""A dial beside its baselines: persona prompts, the mean difference, a random direction; and the verdict."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from repeng.control.steer import steer
from repeng.data.pairs import ContrastPair
from repeng.data.questions import Question
from repeng.data.task import Task
from repeng.eval.eval_report import ARMS, EvalReport, bootstrap
from repeng.eval.evaluate import ADAPTER_COEFFICIENTS, Dial, evaluate, prompt_dial
from repeng.model.sites import RESIDUAL, decoder_layers
from repeng.model.types import CausalLM
from repeng.vectors.extract import extract
from repeng.vectors.vector import SteeringVector

VECTOR_COEFFICIENTS = tuple(sign * size for sign in (-1, 1) for size in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8))
MAX_VECTOR_LAYERS = 8
SAMPLES = 8
WRONG_WAY = 0.05  # share of items that may move against an arm
ADAPTER, PROMPTS, MEAN_DIFF, RANDOM = "this adapter", "persona prompts", "mean difference", "random direction"


def compare(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    dial: Dial | None = None,
    coefficients: Sequence[float] = ADAPTER_COEFFICIENTS,
    name: str = ADAPTER,
) -> dict[str, EvalReport]:
    """A dial and its baselines on the questions of a task: persona prompts, mean difference, random direction.

    The mean difference sees the pairs of the task only; its layer is the one with the largest range on the questions
    themselves, which favours this baseline.

    Args:
        model: the model; its adapters are off for the baselines.
        tokenizer: its tokenizer.
        task: the data.
        dial: what is compared; by default the adapters of the model.
        coefficients: where it is measured.
        name: what it is called in the reports.
    """
    adapted = isinstance(model, PeftModel)
    depth = len(decoder_layers(model))
    step = max(1, -(-depth // MAX_VECTOR_LAYERS))
    bar = tqdm(total=3 + len(range(0, depth, step)), desc="evaluation", leave=False)

    def measure(dial: Dial, coefficients: Sequence[float], samples: Sequence[Question] = ()) -> EvalReport:
        report = evaluate(
            model,
            tokenizer,
            task.questions,
            dial,
            coefficients,
            neutral_texts=task.unseen_neutral_texts,
            sample_prompts=samples,
            accepts=task.accepts,
        )
        bar.update()
        return report

    samples = _sample_questions(task.questions)
    reports = {name: measure(dial or (lambda c: steer(model, c)), coefficients, samples)}
    with steer(model, 0.0) if adapted else nullcontext():
        if task.personas:
            reports[PROMPTS] = measure(prompt_dial(*task.personas), (-1, 1), samples)
        vectors = mean_differences(model, tokenizer, task.pairs, range(0, depth, step))
        by_layer = {
            layer: measure(lambda c, v=vector: steer(model, c, vector=v), VECTOR_COEFFICIENTS)
            for layer, vector in vectors.items()
        }
        best = max(by_layer, key=lambda layer: by_layer[layer].range)
        reports[f"{MEAN_DIFF} (layer {best})"] = by_layer[best]
        noise = vectors[best].random_like(seed=0)
        reports[RANDOM] = measure(lambda c: steer(model, c, vector=noise), VECTOR_COEFFICIENTS)
    bar.close()
    return reports


def _sample_questions(questions: Sequence[Question]) -> list[Question]:
    """Some of the target questions, evenly spaced."""
    asked = [q for q in questions if q.kind == "target"]
    return asked[:: max(1, len(asked) // SAMPLES)][:SAMPLES]


def mean_differences(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[ContrastPair], layers: Sequence[int]
) -> dict[int, SteeringVector]:
    """One mean-difference vector on the residual stream for each layer."""
    together = extract(model, tokenizer, pairs, sites=[RESIDUAL], layers=list(layers))
    return {layer: together.select(layers=[layer]) for layer in together.layers}


def _report_named(reports: dict[str, EvalReport], name: str) -> EvalReport | None:
    """The report of the row whose name begins with `name`."""
    return next((report for key, report in reports.items() if key.startswith(name)), None)


def verdict(reports: dict[str, EvalReport], name: str = ADAPTER) -> str:
    """One sentence on how far a method moves the behaviour inside the budget, and against what."""
    own = reports[name]
    against = []
    for baseline in (MEAN_DIFF, PROMPTS, RANDOM):
        other = _report_named(reports, baseline)
        if other is not None and other.range > 0:
            times, (low, high) = ratio([own], [other])
            against.append(f"{times:.2f} x {baseline} ({other.range:.2f}; 95 % interval {low:.2f} to {high:.2f})")
    gains = ", ".join(f"{arm} {own.arm(sign).gain:.2f}" for arm, sign in ARMS)
    rest = "; ".join(against) or "no baseline moved anything"
    return f"range inside the budget: {own.range:.2f} nats ({gains}); {rest}"


def shortcomings(reports: dict[str, EvalReport], name: str = ADAPTER) -> list[str]:
    """Why a method cannot be said to steer; empty if it does.

    Each arm must gain more inside the budget than a random direction of the mean difference's length does, with the
    lower end of the paired 95 % interval above 0, and at most 5 % of the items may move against it.
    """
    own, noise = reports[name], reports[RANDOM]
    reasons = []
    for arm, sign in ARMS:
        low, _ = bootstrap([own, noise], lambda a, b, s=sign: a.arm(s).gain - b.arm(s).gain, n=300)
        if not low > 0:
            reasons.append(
                f"the {arm} arm gains {own.arm(sign).gain:.2f} nats and a random direction "
                f"{noise.arm(sign).gain:.2f}: the 95 % interval of the difference begins at {low:.2f}"
            )
        if own.against(sign) > WRONG_WAY:
            reasons.append(
                f"{own.against(sign):.1%} of the items move against the {arm} arm; at most {WRONG_WAY:.0%} may"
            )
    return reasons


def ratio(
    own: Sequence[EvalReport], other: Sequence[EvalReport], resamples: int = 300
) -> tuple[float, tuple[float, float]]:
    """How many times the mean range of `other` that of `own` is, with its paired 95 % interval over items."""

    def times(*reports: EvalReport) -> float:
        ranges = [report.range for report in reports]
        mine, theirs = ranges[: len(own)], ranges[len(own) :]
        if not sum(theirs):
            return math.inf if sum(mine) else math.nan
        return (sum(mine) / len(mine)) / (sum(theirs) / len(theirs))

    return times(*own, *other), bootstrap([*own, *other], times, n=resamples)
