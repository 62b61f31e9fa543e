"""Evaluate a dial: the log-odds of target answers, generated text, and side effects on controls and neutral texts.

A dial is a function from a coefficient to a context manager. An adapter or a vector changes the model inside the
context. A prompt does not change the model: its context yields a function that rewrites the prompt of each question.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from repeng.data.questions import Question
from repeng.eval.eval_report import Budget, EvalReport
from repeng.eval.measure import Dial, Meter
from repeng.eval.samples import draw_samples
from repeng.model.types import CausalLM

ADAPTER_COEFFICIENTS = tuple(sign * step / 4 for sign in (-1, 1) for step in range(1, 9))
VECTOR_COEFFICIENTS = tuple(sign * size for sign in (-1, 1) for size in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8))
SAMPLED = (-1.0, 0.0, 1.0)


@torch.no_grad()
def evaluate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    dial: Dial,
    coefficients: Sequence[float],
    *,
    neutral_texts: Sequence[str] = (),
    budget: Budget | None = None,
    think_tokens: int = 0,
    sample_prompts: Sequence[str | Question] = (),
    sample_tokens: int = 24,
    accepts: Callable[[str], bool] | None = None,
    batch_size: int = 128,
) -> EvalReport:
    """Measure `dial` at each coefficient, and at 0, in evaluation mode.

    An answer is read as the log-probability of the exact token ids of a choice, summed over all tokens of the choice.
    A question is dropped if one of its choices begins with another choice. The report lists the dropped questions.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        questions: the questions; at least one must be of the kind "target".
        dial: the dial to measure.
        coefficients: coefficients to measure at; 0 is added.
        neutral_texts: texts that have nothing to do with the behaviour; steering should not change them.
        budget: the largest costs that steering may have; `Budget()` by default.
        think_tokens: for a chat template with thinking, the largest number of tokens that the steered model may think
            (greedily) before each answer. Longer thinking is closed at this limit. With 0, the model answers at once.
        sample_prompts: prompts or questions to continue greedily at each of c = −1, 0 and +1 that is evaluated.
        sample_tokens: the largest number of tokens per continuation.
        accepts: function that tells whether a generated sentence belongs to the language.
        batch_size: prompts per forward pass.

    Raises:
        ValueError: no target question can be asked, or `think_tokens` is given and the chat template has no thinking.
    """
    meter = Meter(
        model,
        tokenizer,
        questions,
        neutral_texts,
        base=lambda: dial(0.0),
        think_tokens=think_tokens,
        batch_size=batch_size,
    )
    wanted = sorted({0.0, *map(float, coefficients)})
    points = {c: meter.at(dial, c) for c in wanted}
    samples = [
        sample
        for c in SAMPLED
        if c in wanted
        for sample in draw_samples(
            model, tokenizer, sample_prompts, dial, c, sample_tokens, accepts, batch_size=batch_size
        )
    ]
    return meter.report(points, budget=budget, samples=samples)
