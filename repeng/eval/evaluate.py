"""What a dial does: log-odds of target answers, what it generates, and what happens to everything else.

A dial is a function from a coefficient to a context manager. Adapters and vectors change the model inside the context;
a prompt changes no model but yields a function that rewrites the prompt of each question.
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

    Answers are read as log-probabilities of the exact token ids of the choices: of a choice of several tokens, the sum
    over all of them. A question of whose choices one begins with another is dropped, and the report says so.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        questions: at least one of the kind "target".
        dial: what is measured.
        coefficients: where; 0 is added.
        neutral_texts: texts that the behaviour should not touch.
        budget: what steering may cost.
        think_tokens: with a thinking template, how many tokens the steered model may think (greedily) before each
            answer; the thinking is closed for it where that is not enough. 0 asks for the answer at once.
        sample_prompts: prompts, or questions, that are continued (greedily) at c = −1, 0 and +1, where those are
            evaluated.
        sample_tokens: the longest continuation.
        accepts: says of a generated sentence whether it belongs to the language.
        batch_size: prompts a forward.

    Raises:
        ValueError: no target question can be asked, or the tokenizer has no thinking template.
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
