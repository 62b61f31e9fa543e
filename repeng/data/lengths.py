"""Checks that pairs, questions and texts are neither too long for a model nor too short to be measured."""

import math
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.data.pairs import ContrastPair
from repeng.data.questions import Question
from repeng.data.word_questions import NEUTRAL_REQUEST
from repeng.model.tokens import answer_ids, encode, encode_text, plain_ids, special_id

SHOWN = 40  # characters of a text in a message


def positions(model: PreTrainedModel) -> float:
    """The largest number of tokens that a model reads; infinite if its configuration does not state it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_pair_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[ContrastPair]
) -> None:
    """Raise ValueError for the first pair that has more tokens than the model reads."""
    most = positions(model)
    for pair in pairs:
        longest = max(len(encode(tokenizer, side, pair.suffix).ids) for side in (pair.chosen, pair.rejected))
        if longest > most:
            raise ValueError(
                f"the pair {pair.chosen[:SHOWN]!r}… has {longest} tokens, but the model reads at most {most}; shorten "
                "its prompts"
            )


def check_question_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> None:
    """Raise ValueError for the first question that has, with its longest answer, more tokens than the model reads."""
    most = positions(model)
    for index, q in enumerate(questions):
        answers = answer_ids(tokenizer, q.prompt, q.suffix, q.choices)
        longest = len(encode(tokenizer, q.prompt, q.suffix, history=q.history).ids) + max(map(len, answers)) - 1
        if longest > most:
            raise ValueError(
                f"question {index}, {(q.prompt or q.suffix)[:SHOWN]!r}…, has {longest} tokens with its answer, but "
                f"the model reads at most {most}; shorten it"
            )


def check_texts(path: str, texts: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the neutral texts are too few, or one is too short, too long, or of unknown words only."""
    most, request = positions(model), NEUTRAL_REQUEST if tokenizer.chat_template else ""
    if len(set(texts)) < 2:
        raise ValueError(f"{path} has one text; give two or more: some for training, the others for the evaluation")
    for number, text in enumerate(texts, start=1):
        shown, ids = text[:SHOWN], plain_ids(tokenizer, text)
        if set(ids) <= set(special_id(tokenizer, "unk")):
            raise ValueError(f"{path}: this tokenizer knows no word of text {number}, {shown!r}; leave it out")
        if len(ids) < 2:
            raise ValueError(f"{path}: text {number}, {shown!r}, is a single token; write longer ones")
        longest = len(encode_text(tokenizer, request, text).ids)
        if longest > most:
            raise ValueError(
                f"{path}: text {number}, {shown!r}…, has {longest} tokens, but the model reads at most {most}; "
                "split it"
            )
