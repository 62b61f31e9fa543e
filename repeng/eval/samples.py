"""Generate text with a dial, and compute statistics of the text."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from repeng.data.questions import Question
from repeng.eval.eval_report import Sample
from repeng.eval.measure import Dial, Rewrite
from repeng.model.generate import continuations
from repeng.model.logprob import has_plain_head, head_logp
from repeng.model.rows import read_rows
from repeng.model.script import joined
from repeng.model.sites import eval_mode
from repeng.model.tokens import encode
from repeng.model.types import CausalLM

NGRAM = 3


@torch.no_grad()
def draw_samples(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Question],
    dial: Dial,
    coefficient: float,
    max_new_tokens: int,
    accepts: Callable[[str], bool] | None = None,
    *,
    base: Callable[[], AbstractContextManager[Any]] | None = None,
    batch_size: int = 128,
) -> list[Sample]:
    """One greedy continuation per prompt at a coefficient, with its negative log-likelihood under the base.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        prompts: prompts or questions.
        dial: the dial that steers the model.
        coefficient: its coefficient.
        max_new_tokens: the largest number of tokens per continuation.
        accepts: function that tells whether a sentence belongs to the language.
        base: function that opens a context in which the model is the base; by default the dial at 0.
        batch_size: prompts per forward pass.
    """
    if not prompts:
        return []
    asked = [p if isinstance(p, Question) else Question(p, ("a", "b"), ("a",)) for p in prompts]
    with eval_mode(model):
        with dial(coefficient) as rewrite:
            rows = _encoded(tokenizer, asked, rewrite)
            drawn = continuations(model, tokenizer, rows, max_new_tokens, batch_size)
        with dial(0.0) if base is None else base() as rewrite:
            bare = _encoded(tokenizer, asked, rewrite)
            surprise = _nll(model, tokenizer, bare, [ids for ids, _ in drawn], batch_size)
    samples = []
    for question, (ids, end), nll in zip(asked, drawn, surprise, strict=True):
        shown = joined(*question.history, question.prompt, question.suffix)
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        counts = None
        if accepts is not None:
            # The unfinished sentence at the end of the prompt counts; complete sentences of the prompt do not.
            counts = count_accepted(f"{shown.rpartition(' .')[2]} {text}", accepts)
        samples.append(Sample(coefficient, shown, text, end is not None, repetition(ids), counts, nll))
    return samples


def _encoded(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], rewrite: Rewrite | None
) -> list[list[int]]:
    return [
        encode(tokenizer, rewrite(q.prompt) if rewrite else q.prompt, q.suffix, history=q.history).ids
        for q in questions
    ]


def _nll(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    written: Sequence[list[int]],
    batch_size: int,
) -> list[float]:
    """Negative log-likelihood of the tokens in `written` after each row, in nats per token, under the model."""
    whole = [row + ids for row, ids in zip(rows, written, strict=True)]
    spans = [(len(row) - 1, len(row) + len(ids) - 1) for row, ids in zip(rows, written, strict=True)]

    def read(states: Tensor, head: Callable[[Tensor], Tensor], members: list[int]) -> Tensor:
        own = torch.tensor([token for i in members for token in written[i]], dtype=torch.long)
        return head_logp(states, head, own.to(states.device))

    plain = has_plain_head(model, whole[0])
    parts = read_rows(model, tokenizer, whole, spans, read, plain=plain, share=False, batch_size=batch_size)
    return [-part.mean().item() for part in parts]


def repetition(ids: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams of a text that occur earlier in the text; 0 for a text without n-grams."""
    grams = [tuple(ids[index : index + n]) for index in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def count_accepted(text: str, accepts: Callable[[str], bool]) -> tuple[int, int]:
    """Number of complete sentences that a grammar accepts, and number of all complete sentences (with a full stop)."""
    sentences = [f"{part.strip()} ." for part in text.split(" .")[:-1]]
    return sum(map(accepts, sentences)), len(sentences)
