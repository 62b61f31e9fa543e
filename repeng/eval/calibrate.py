"""Find the coefficients at which a dial spends a stated budget, so that c = ±1 has the same cost for every dial."""

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
FLOOR = SMALLEST / 256  # coefficient below which the search gives up


@dataclass(frozen=True)
class KLBudget:
    """A limit on the KL divergence of generated tokens.

    `KL(steered ‖ base)` is measured at the first `tokens` tokens of each continuation. Its `percentile` may be at most
    `nats`. Continuations are drawn at temperature 1 with a fixed seed. There are at least `sequences` of them, the
    same number for each prompt, because a high percentile of few tokens is mostly noise.
    """

    nats: float = 1.0
    percentile: float = 95.0
    tokens: int = 16
    sequences: int = 512

    def __post_init__(self) -> None:
        if not (self.nats > 0 and 0 < self.percentile < 100 and self.tokens >= 1 and self.sequences >= 1):
            raise ValueError(
                "a KLBudget needs nats above 0, a percentile between 0 and 100, at least 1 token and at least "
                f"1 sequence; got {self}"
            )


@dataclass(frozen=True)
class Calibration:
    """The size of the coefficient at which each arm spends the whole budget, in the dial's units.

    `spent` is the share of the budget that each arm spends at this size, measured on the calibration prompts. It is
    below 1 if the largest allowed coefficient spends less, or if the cost jumps from below the budget to above it.
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
    """Find, by bisection, the coefficient of each sign at which `dial` spends `budget`.

    Give training prompts: data that a later evaluation uses must not choose the scale.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        dial: the dial to calibrate.
        prompts: prompts to continue; a `KLBudget` needs them.
        budget: a `KLBudget`, or a `Budget` on the costs of an evaluation; `KLBudget()` by default.
        questions: as in `evaluate`; a `Budget` needs them.
        neutral_texts: as in `evaluate`, for a `Budget`.
        largest: the largest coefficient to try.
        tolerance: accepted distance from the whole budget, as a share of the budget.
        batch_size: prompts per forward pass.

    Raises:
        ValueError: the data that the budget is measured on are missing, or even the smallest coefficient exceeds the
            budget.
    """
    budget = budget or KLBudget()
    if isinstance(budget, KLBudget):
        if not prompts:
            raise ValueError("a KLBudget is measured on prompts; give some of the training prompts as `prompts`")
        spend = kl_spender(model, tokenizer, dial, prompts, budget, batch_size)
    else:
        if not questions:
            raise ValueError(
                "a Budget is measured on questions and neutral texts; give `questions` and `neutral_texts` from the "
                "training data"
            )
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
    """Share of the budget of an evaluation that a coefficient spends."""
    report = measure([coefficient])
    return report.spent()[report.at(coefficient)].item()


def set_units(model: Any, calibration: Calibration, adapter_name: str = "default") -> None:
    """Write a calibration into an adapter: afterwards c = ±1 spends the budget. `save_pretrained` saves the units.

    If the adapter is calibrated already, the new calibration is taken to be in units of the old one, because `steer`
    applies the old one. The two are multiplied.

    Args:
        model: a `PeftModel` with a steering adapter.
        calibration: the result of `calibrate`.
        adapter_name: name of the adapter in the model.

    Raises:
        ValueError: a coefficient of the adapter is set at the moment, or adapters of this kind hold no units.
    """
    if not hasattr(model.peft_config[adapter_name], "calibration"):
        kind = type(model.peft_config[adapter_name]).__name__
        raise ValueError(f"a {kind} holds no units; `repeng calibrate` multiplies the weights of a LoRA instead")
    before = model.peft_config[adapter_name].calibration or {"plus": 1.0, "minus": 1.0}
    units = calibration.to_dict()
    units |= {name: units[name] * before[name] for name in ("plus", "minus")}
    model.base_model.set_units(units, adapter_name)


def solve(spend: Callable[[float], float], sign: int, largest: float, tolerance: float) -> tuple[float, float]:
    """Find the smallest coefficient of this sign that spends the whole budget. Returns its size and the share spent.

    `spend` gives the share of the budget that a coefficient spends. The search doubles the coefficient until it
    exceeds the budget, and then bisects. If the share jumps over 1, the result is the coefficient just below the jump.

    Raises:
        ValueError: even the smallest coefficient exceeds the budget.
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
                f"c = {sign * outside:.2g} already exceeds the budget: either this dial jumps at 0, as prompts do, or "
                "the budget is too small"
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
    """Return a function from a coefficient to the share of the `KLBudget` that it spends."""

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
    """`KL(steered ‖ base)` in nats at each token that the steered model draws, in one dimension.

    The base is the model with the dial at 0. It reads the same tokens.
    """
    prompts = list(prompts) * math.ceil(budget.sequences / len(prompts))
    parts = []
    with eval_mode(model):
        for start in range(0, len(prompts), batch_size):
            chunk = prompts[start : start + batch_size]
            with dial(coefficient) as rewrite:
                rows = _encoded(tokenizer, chunk, rewrite)
                drawn = continuations(model, tokenizer, rows, budget.tokens, batch_size, seed=start)
                # The end-of-text token counts too: there as well, a dial may differ from the base.
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
    """Logits `(tokens v)`, float32, that predict the tokens in `written`, each list of which follows its row."""
    whole = [row + ids for row, ids in zip(rows, written, strict=True)]
    batch = pad_rows(whole, tokenizer, model.device, side="left")
    logits = model(**batch, use_cache=False, logits_to_keep=max(map(len, written)) + 1).logits
    # Rows are left-padded. The last position predicts the token after the text, which is not needed.
    return torch.cat([row[-len(ids) - 1 : -1] for row, ids in zip(logits, written, strict=True)]).float()
