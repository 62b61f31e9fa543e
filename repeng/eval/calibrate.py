"""Find the coefficients at which a dial spends a stated budget, so that c = ±1 means the same thing everywhere."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from repeng.data.questions import Question
from repeng.eval.eval_report import ARMS, Budget, EvalReport
from repeng.eval.evaluate import evaluate
from repeng.eval.measure import Dial, Rewrite
from repeng.model.generate import continuations
from repeng.model.logprob import kl_divergence
from repeng.model.sites import eval_mode
from repeng.model.tokens import encode, pad_rows
from repeng.model.types import CausalLM

SMALLEST = 1 / 64  # coefficient at which the search begins
FLOOR = SMALLEST / 256  # and below which it gives up


@dataclass(frozen=True)
class KLBudget:
    """`percentile` of `KL(steered ‖ base)` over the first `tokens` generated tokens may be `nats`.

    Continuations are drawn at temperature 1 from a fixed seed, at least `sequences` of them, each prompt equally
    often: a high percentile of few tokens is mostly chance.
    """

    nats: float = 1.0
    percentile: float = 95.0
    tokens: int = 16
    sequences: int = 512

    def __post_init__(self) -> None:
        if not (self.nats > 0 and 0 < self.percentile < 100 and self.tokens >= 1 and self.sequences >= 1):
            raise ValueError(
                "a KLBudget needs nats above 0, a percentile between 0 and 100, at least 1 token and 1 sequence; "
                f"got {self}"
            )


@dataclass(frozen=True)
class Calibration:
    """Sizes of the coefficients that spend the whole budget, each arm apart, in the dial's units.

    `spent` is the share of the budget that each arm spends there, on the prompts of the calibration. It is below 1
    where the largest coefficient that was allowed spends less, or where what is spent jumps over the whole.
    """

    plus: float
    minus: float
    spent: dict[str, float]
    budget: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dial: Dial,
    prompts: Sequence[str] = (),
    budget: KLBudget | Budget | None = None,
    *,
    questions: Sequence[Question] = (),
    neutral_texts: Sequence[str] = (),
    largest: float = 8.0,
    tolerance: float = 0.02,
    batch_size: int = 128,
) -> Calibration:
    """Bisect to the coefficient of each sign at which `dial` spends `budget`.

    Give training prompts: what is measured afterwards must not have chosen the scale.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        dial: what is calibrated.
        prompts: what is continued, for a `KLBudget`.
        budget: `KLBudget()`, or the costs of an evaluation.
        questions: for a `Budget`, as in `evaluate`.
        neutral_texts: for a `Budget`, as in `evaluate`.
        largest: no larger coefficient is tried.
        tolerance: how near to the whole budget is near enough, as a share of it.
        batch_size: prompts a forward.

    Raises:
        ValueError: what the budget is measured on was not given, or any coefficient exceeds the budget.
    """
    budget = budget or KLBudget()
    if isinstance(budget, KLBudget):
        if not prompts:
            raise ValueError("a KLBudget is measured on prompts; give some of the training prompts")
        spend = kl_spender(model, tokenizer, dial, prompts, budget, batch_size)
    else:
        if not questions:
            raise ValueError("a Budget is measured on questions and neutral texts; give those of the training data")
        measure = partial(
            evaluate,
            model,
            tokenizer,
            questions,
            dial,
            neutral_texts=neutral_texts,
            budget=budget,
            batch_size=batch_size,
        )
        spend = partial(_spent_at, measure)

    solutions = {name: solve(spend, sign, largest, tolerance) for name, sign in ARMS}
    return Calibration(
        solutions["plus"][0],
        solutions["minus"][0],
        {name: spent for name, (_, spent) in solutions.items()},
        {"kind": type(budget).__name__, **asdict(budget)},
    )


def _spent_at(measure: Callable[[Sequence[float]], EvalReport], coefficient: float) -> float:
    """The share of an evaluation's budget that a coefficient spends."""
    report = measure([coefficient])
    return report.spent()[report.at(coefficient)].item()


def set_units(model: Any, calibration: Calibration, adapter_name: str = "default") -> None:
    """Write a calibration into an adapter: afterwards c = ±1 spends the budget, and `save_pretrained` saves that.

    A calibration that was found through `steer` on an adapter with one already is in units of that one.

    Args:
        model: a `PeftModel` with a steering adapter.
        calibration: what `calibrate` found.
        adapter_name: which adapter.

    Raises:
        ValueError: the adapter's coefficient is set at the moment, or it is of another kind.
    """
    if not hasattr(model.peft_config[adapter_name], "calibration"):
        kind = type(model.peft_config[adapter_name]).__name__
        raise ValueError(f"a {kind} holds no units; `repeng calibrate` multiplies the weights of a LoRA instead")
    before = model.peft_config[adapter_name].calibration or {"plus": 1.0, "minus": 1.0}
    units = calibration.to_dict()
    units |= {name: units[name] * before[name] for name in ("plus", "minus")}
    model.base_model.set_units(units, adapter_name)


def solve(spend: Callable[[float], float], sign: int, largest: float, tolerance: float) -> tuple[float, float]:
    """Size of the coefficient of this sign at which `spend`, a share of the budget, first reaches 1; what it spends.

    Doubles until the budget is exceeded and bisects from there; stays on the inner side of a jump.

    Raises:
        ValueError: any coefficient exceeds the budget.
    """
    bar = tqdm(desc=f"calibrating {'+' if sign > 0 else '−'}", leave=False)

    def at(size: float) -> float:
        bar.update()
        value = spend(sign * size)
        return math.inf if math.isnan(value) else value

    inside, outside = (0.0, 0.0), None
    size = min(SMALLEST, largest)
    while outside is None:
        value = at(size)
        if abs(value - 1) <= tolerance:
            return size, value
        if value > 1:
            outside = size
        elif size >= largest:
            return size, value
        else:
            inside, size = (size, value), min(2 * size, largest)
    while outside - inside[0] > 1e-3 * outside:
        if inside[0] == 0 and outside < FLOOR:
            raise ValueError(
                f"c = {sign * outside:.2g} already exceeds the budget: this dial jumps at 0, as prompts do, or the "
                "budget is too small"
            )
        size = (inside[0] + outside) / 2
        value = at(size)
        if abs(value - 1) <= tolerance:
            return size, value
        if value > 1:
            outside = size
        else:
            inside = (size, value)
    return inside


def kl_spender(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dial: Dial,
    prompts: Sequence[str],
    budget: KLBudget,
    batch_size: int = 128,
) -> Callable[[float], float]:
    """The share of a `KLBudget` that a coefficient spends."""

    def spend(c: float) -> float:
        kl = generated_kl(model, tokenizer, dial, prompts, c, budget, batch_size)
        return kl.quantile(budget.percentile / 100).item() / budget.nats

    return spend


@torch.no_grad()
def generated_kl(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dial: Dial,
    prompts: Sequence[str],
    coefficient: float,
    budget: KLBudget,
    batch_size: int = 128,
) -> Tensor:
    """`KL(steered ‖ base)` in nats at each token that the steered model draws; one dimension.

    The base is the dial at 0; it reads the same tokens.
    """
    prompts = list(prompts) * math.ceil(budget.sequences / len(prompts))
    parts = []
    with eval_mode(model):
        for start in range(0, len(prompts), batch_size):
            chunk = prompts[start : start + batch_size]
            with dial(coefficient) as rewrite:
                rows = _encoded(tokenizer, chunk, rewrite)
                drawn = continuations(model, tokenizer, rows, budget.tokens, batch_size, seed=start)
                # That the text ends is a token as well, and where a dial may differ from the base.
                written = [ids if end is None else [*ids, end] for ids, end in drawn]
                steered = _logits_of(model, tokenizer, rows, written)
            with dial(0.0) as rewrite:
                base = _logits_of(model, tokenizer, _encoded(tokenizer, chunk, rewrite), written)
            parts.append(kl_divergence(steered, base).cpu())
    return torch.cat(parts)


def _encoded(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], rewrite: Rewrite | None) -> list[list[int]]:
    return [encode(tokenizer, rewrite(prompt) if rewrite else prompt).ids for prompt in prompts]


def _logits_of(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]], written: Sequence[list[int]]
) -> Tensor:
    """Logits `(tokens v)`, float32, that predict what was written after each row."""
    whole = [row + ids for row, ids in zip(rows, written, strict=True)]
    batch = pad_rows(whole, tokenizer, model.device, side="left")
    logits = model(**batch, use_cache=False, logits_to_keep=max(map(len, written)) + 1).logits
    # On the left-padded rows the last prediction, of what follows the text, is not asked for.
    return torch.cat([row[-len(ids) - 1 : -1] for row, ids in zip(logits, written, strict=True)]).float()
