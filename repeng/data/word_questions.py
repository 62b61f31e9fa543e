"""Questions without a persona, made of pairs: which next words tell the two sides apart."""

import math
from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.data.pairs import ContrastPair
from repeng.data.questions import Question, choice_ids
from repeng.model.logprob import has_plain_head
from repeng.model.rows import can_share, read_rows
from repeng.model.script import joined, sentences, visible, words
from repeng.model.tokens import answer_ids, encode

TOP = 5
TELLING = 1e-4  # change of a word's probability from which on it tells the sides apart
NEUTRAL_REQUEST = "Write a short text."  # what a chat model is asked where no persona and no other request is left


class WordQuestions(NamedTuple):
    """Questions made of pairs, and how far the pairs' own prompts move them.

    Attributes:
        questions: one for each suffix and request, without a persona.
        effect: log-odds behind the chosen prompts minus those behind the rejected ones, mean over the questions, nats.
        error: its standard error; infinite for fewer than two questions.
    """

    questions: list[Question]
    effect: float
    error: float


def word_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[ContrastPair],
    *,
    most: int | None = None,
    batch_size: int = 128,
) -> WordQuestions:
    """Questions for data without any: the next words that the base's own personas favour.

    The target choices are the tokens whose probability the chosen prompts raise most over the rejected ones, the other
    choices those that they lower most. The effect of a pair's own prompts is measured on words that the other pairs of
    the same question have chosen, if there are others: words that a pair has chosen for itself always move with it.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        pairs: contrast pairs.
        most: keep so many questions, those on which the personas disagree most.
        batch_size: prompts per forward.
    """
    return questions_of(tokenizer, pairs, next_logp(model, tokenizer, pairs, batch_size), most)


def questions_of(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[ContrastPair], logp: Tensor, most: int | None = None
) -> WordQuestions:
    """`word_questions` from the next-token log-probabilities `(n 2 v)` that `next_logp` gives."""
    shift = logp[:, 0].exp() - logp[:, 1].exp()
    members: dict[tuple[str, str], list[int]] = {}
    for index, pair in enumerate(pairs):
        key = (without_persona(pair, has_template=bool(tokenizer.chat_template)), pair.suffix)
        members.setdefault(key, []).append(index)
    made: list[tuple[float, Question, float]] = []
    for (prompt, suffix), own in members.items():
        pair, mean = pairs[own[0]], shift[own].mean(dim=0)
        targets, against = _telling_words(tokenizer, mean, pair)
        if not targets or not against:
            continue
        question = Question(prompt, (*targets, *against), targets, suffix=suffix, unit=suffix)
        effects = []
        for index in own:
            others = [i for i in own if i != index] or own
            words = _telling_words(tokenizer, shift[others].mean(dim=0), pair)
            if all(words):
                effects.append(_odds(tokenizer, logp[index], pair, words))
        made.append((mean.abs().sum().item(), question, sum(effects) / max(1, len(effects))))
    made.sort(key=lambda row: -row[0])
    made = made[:most]
    effects = [row[2] for row in made]
    error = stdev(effects) / math.sqrt(len(effects)) if len(effects) > 1 else math.inf
    return WordQuestions([row[1] for row in made], fmean(effects) if effects else 0.0, error)


def without_persona(pair: ContrastPair, *, has_template: bool) -> str:
    """What is asked of the model where a pair has a persona: the prompt without the sentences in which sides differ.

    With a chat template, a neutral request if nothing is left. Without one, nothing stands before a suffix, and of
    pairs whose last sentences differ the words are left that both end with.
    """
    if has_template:
        return shared_sentences(pair) or NEUTRAL_REQUEST
    if pair.suffix:
        return ""
    ends = {sentences(side)[-1] for side in (pair.chosen, pair.rejected)}
    return shared_sentences(pair) if len(ends) == 1 else _shared_end(pair.chosen, pair.rejected)


def shared_sentences(pair: ContrastPair) -> str:
    """The sentences that the prompts of a pair have in common."""
    rejected = sentences(pair.rejected)
    return joined(*(sentence for sentence in sentences(pair.chosen) if sentence in rejected)).strip()


def persona_sentences(pair: ContrastPair) -> tuple[str, str]:
    """The sentences in which the prompts of a pair differ, chosen and rejected."""
    chosen, rejected = (sentences(text) for text in (pair.chosen, pair.rejected))
    kept = [
        joined(*(text for text in own if text not in other)) for own, other in ((chosen, rejected), (rejected, chosen))
    ]
    return kept[0].strip(), kept[1].strip()


def _shared_end(chosen: str, rejected: str) -> str:
    """The words that both prompts end with; the first prompt if there are none."""
    left, right = words(chosen), words(rejected)
    n = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(reversed(left), reversed(right), strict=False)))
    return joined(*left[len(left) - n :]) or chosen


def _telling_words(
    tokenizer: PreTrainedTokenizerBase, shift: Tensor, pair: ContrastPair
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words whose probability rises most, and those whose falls most, for a change of probabilities `(v)`."""
    found = []
    for sign in (1, -1):
        top = (sign * shift).topk(min(8 * TOP, len(shift)))
        found.append(distinct_words(tokenizer, top.indices[top.values > TELLING].tolist(), TOP, pair))
    return found[0], found[1]


def _odds(
    tokenizer: PreTrainedTokenizerBase, logp: Tensor, pair: ContrastPair, words: tuple[tuple[str, ...], ...]
) -> float:
    """Log-odds of the first words against the second ones behind the chosen prompt minus behind the rejected one."""
    probe = Question(pair.chosen, (*words[0], *words[1]), words[0], suffix=pair.suffix)
    ids = choice_ids(tokenizer, probe)
    target, other = (logp[:, [ids[word] for word in some]].logsumexp(dim=1) for some in words)
    return ((target - other)[0] - (target - other)[1]).item()


@torch.no_grad()
def next_logp(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[ContrastPair], batch_size: int = 128
) -> Tensor:
    """Next-token log-probabilities `(n 2 v)` behind both prompts of each pair, float32, on the CPU."""
    rows = [encode(tokenizer, side, pair.suffix).ids for pair in pairs for side in (pair.chosen, pair.rejected)]
    parts = read_rows(
        model,
        tokenizer,
        rows,
        [(len(row) - 1, len(row)) for row in rows],
        lambda states, head, _: head(states).float().log_softmax(dim=-1),
        plain=has_plain_head(model, rows[0]),
        share=can_share(model, rows[0]),
        batch_size=batch_size,
    )
    return torch.cat(parts).unflatten(0, (len(pairs), 2))


def distinct_words(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], n: int, pair: ContrastPair
) -> tuple[str, ...]:
    """The first `n` of `ids` that, written as a word, are encoded as that very token again."""
    special = tokenizer.all_special_ids
    found: list[str] = []
    for token in ids:
        word = "" if token in special else str(tokenizer.decode([token])).strip()
        if len(found) < n and visible(word) and word not in found and _sole_token(tokenizer, pair, word) == token:
            found.append(word)
    return tuple(found)


def _sole_token(tokenizer: PreTrainedTokenizerBase, pair: ContrastPair, word: str) -> int | None:
    """The only token of a word behind a pair's chosen side; None if there are more, or it has none of its own."""
    try:
        (ids,) = answer_ids(tokenizer, pair.chosen, pair.suffix, [word])
    except ValueError:
        return None
    return ids[0] if len(ids) == 1 else None
