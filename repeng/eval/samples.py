"""What a dial writes, and what can be counted in it."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from repeng.data.questions import Question
from repeng.data.tokens import encode
from repeng.eval.eval_report import Sample
from repeng.model.generate import continuations
from repeng.model.types import CausalLM

NGRAM = 3


def draw_samples(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Question],
    rewrite: Callable[[str], str] | None,
    coefficient: float,
    max_new_tokens: int,
    accepts: Callable[[str], bool] | None,
    batch_size: int,
) -> list[Sample]:
    """One greedy continuation of each prompt, at the coefficient that is set."""
    if not prompts:
        return []
    rewrite = rewrite or (lambda prompt: prompt)
    asked = [(p.prompt, p.suffix) if isinstance(p, Question) else (p, "") for p in prompts]
    rows = [encode(tokenizer, rewrite(prompt), suffix).ids for prompt, suffix in asked]
    drawn = continuations(model, tokenizer, rows, max_new_tokens, batch_size)
    samples = []
    for parts, (ids, end) in zip(asked, drawn, strict=True):
        shown = " ".join(filter(None, parts))
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        counts = None
        if accepts is not None:
            # The sentence that the prompt begins counts, those that it holds whole do not.
            counts = count_accepted(f"{shown.rpartition(' .')[2]} {text}", accepts)
        samples.append(Sample(coefficient, shown, text, end is not None, repetition(ids), counts))
    return samples


def repetition(ids: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams of a text that had occurred in it before; 0 for a text without any."""
    grams = [tuple(ids[index : index + n]) for index in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def count_accepted(text: str, accepts: Callable[[str], bool]) -> tuple[int, int]:
    """How many whole sentences of a text, each up to its full stop, a grammar accepts, and how many there are."""
    sentences = [f"{part.strip()} ." for part in text.split(" .")[:-1]]
    return sum(map(accepts, sentences)), len(sentences)
