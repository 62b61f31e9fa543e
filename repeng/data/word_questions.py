"""Questions without a persona, made from pairs: their answers are the next words that differ between the sides."""

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
TELLING = 1e-4  # least change of a word's probability between the sides for the word to be an answer
NEUTRAL_REQUEST = "Write a short text."  # for a chat model, if a prompt without its persona is empty


class WordQuestions(NamedTuple):
    """Questions made from pairs, and the effect of the pairs' own prompts on them.

    Attributes:
        questions: one question per suffix and request, without a persona.
        effect: log-odds after the chosen prompts minus log-odds after the rejected ones, in nats, mean over the
            questions.
        error: standard error of the effect; infinite for fewer than two questions.
        by_pair: effect of each pair's own prompts, by the index of the pair; pairs without telling words are missing.
    """

    questions: list[Question]
    effect: float
    error: float
    by_pair: dict[int, float]


def word_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[ContrastPair],
    *,
    most: int | None = None,
    batch_size: int = 128,
) -> WordQuestions:
    """Make questions from pairs, for data without questions: the answers are next words that the personas favour.

    The target choices are the tokens whose probability rises most from the rejected prompts to the chosen ones. The
    other choices are the tokens whose probability falls most. The effect of a pair's prompts is measured on the words
    that the other pairs of the same question select, if there are other pairs: on words that a pair selects itself,
    its effect would always be positive.

    Args:
        model: base model.
        tokenizer: its tokenizer.
        pairs: contrast pairs.
        most: maximum number of questions; the questions on which the personas differ most are kept.
        batch_size: prompts per forward pass.
    """
    return questions_of(tokenizer, pairs, next_logp(model, tokenizer, pairs, batch_size), most)


def questions_of(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[ContrastPair], logp: Tensor, most: int | None = None
) -> WordQuestions:
    """`word_questions` from next-token log-probabilities `(n 2 v)`, the result of `next_logp`."""
    shift = logp[:, 0].exp() - logp[:, 1].exp()
    members: dict[tuple[str, str], list[int]] = {}
    for index, pair in enumerate(pairs):
        key = (without_persona(pair, has_template=bool(tokenizer.chat_template)), pair.suffix)
        members.setdefault(key, []).append(index)
    made: list[tuple[float, Question, float]] = []
    by_pair: dict[int, float] = {}
    for (prompt, suffix), own in members.items():
        pair, mean = pairs[own[0]], shift[own].mean(dim=0)
        targets, against = _telling_words(tokenizer, mean, pair)
        if not targets or not against:
            continue
        question = Question(prompt, (*targets, *against), targets, suffix=suffix, unit=suffix)
        for index in own:
            others = [i for i in own if i != index] or own
            words = _telling_words(tokenizer, shift[others].mean(dim=0), pair)
            if all(words):
                by_pair[index] = _odds(tokenizer, logp[index], pair, words)
        effects = [by_pair[index] for index in own if index in by_pair]
        made.append((mean.abs().sum().item(), question, sum(effects) / max(1, len(effects))))
    made.sort(key=lambda row: -row[0])
    made = made[:most]
    effects = [row[2] for row in made]
    error = stdev(effects) / math.sqrt(len(effects)) if len(effects) > 1 else math.inf
    return WordQuestions([row[1] for row in made], fmean(effects) if effects else 0.0, error, by_pair)


def without_persona(pair: ContrastPair, *, has_template: bool) -> str:
    """The prompt of a pair without the sentences in which the sides differ.

    With a chat template, the result is a neutral request if no sentence is left. Without a template, the result is
    empty if the pair has a suffix, and is the words at the end that both prompts share if the last sentences differ.
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
    """The words at the end that both prompts share; the whole chosen prompt if there are none."""
    left, right = words(chosen), words(rejected)
    n = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(reversed(left), reversed(right), strict=False)))
    return joined(*left[len(left) - n :]) or chosen


def _telling_words(
    tokenizer: PreTrainedTokenizerBase, shift: Tensor, pair: ContrastPair
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words whose probability rises most, and those whose probability falls most; `shift (v)` is the change."""
    found = []
    for sign in (1, -1):
        top = (sign * shift).topk(min(8 * TOP, len(shift)))
        found.append(distinct_words(tokenizer, top.indices[top.values > TELLING].tolist(), TOP, pair))
    return found[0], found[1]


def _odds(
    tokenizer: PreTrainedTokenizerBase, logp: Tensor, pair: ContrastPair, words: tuple[tuple[str, ...], ...]
) -> float:
    """Log-odds of the first words against the second, after the chosen prompt minus after the rejected prompt."""
    probe = Question(pair.chosen, (*words[0], *words[1]), words[0], suffix=pair.suffix)
    ids = choice_ids(tokenizer, probe)
    target, other = (logp[:, [ids[word] for word in some]].logsumexp(dim=1) for some in words)
    return ((target - other)[0] - (target - other)[1]).item()


@torch.no_grad()
def next_logp(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[ContrastPair], batch_size: int = 128
) -> Tensor:
    """Next-token log-probabilities `(n 2 v)` after both prompts of each pair, float32, on the CPU."""
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
    """The words of the first `n` of `ids` whose decoded word is encoded as the same token again."""
    special = tokenizer.all_special_ids
    found: list[str] = []
    for token in ids:
        word = "" if token in special else str(tokenizer.decode([token])).strip()
        if len(found) < n and visible(word) and word not in found and _sole_token(tokenizer, pair, word) == token:
            found.append(word)
    return tuple(found)


def _sole_token(tokenizer: PreTrainedTokenizerBase, pair: ContrastPair, word: str) -> int | None:
    """The token of a word after a pair's chosen side; None if the word has several tokens, or none of its own."""
    try:
        (ids,) = answer_ids(tokenizer, pair.chosen, pair.suffix, [word])
    except ValueError:
        return None
    return ids[0] if len(ids) == 1 else None
