"""Text comes in pieces that never change, and ends before a stop text."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from repeng.serve.decoding import TextStream


@pytest.fixture(scope="module")
def bytewise():
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def streamed(tokenizer, text, stop=(), seed=0, context=""):
    """The pieces of a text whose tokens come one to three at a time."""
    ids, drawn = tokenizer(text)["input_ids"], random.Random(seed)
    stream = TextStream(tokenizer, stop, tokenizer(context)["input_ids"] if context else ())
    pieces = []
    while ids and not stream.stopped:
        n = drawn.randint(1, 3)
        pieces.append(stream.push(ids[:n], n >= len(ids)))
        ids = ids[n:]
    return pieces, stream.stopped


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_whole_characters_and_give_the_text(bytewise, seed):
    text = "Grüße, 你好 — ein 🐑 und noch eins 🐑🐑." * 4
    pieces, stopped = streamed(bytewise, text, seed=seed)
    assert "".join(pieces) == text and not stopped
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "stop, expected", [(["</end>"], "one </e two "), (["zzz", " two"], "one </e"), (["e", "one"], ""), (["?"], None)]
)
def test_nothing_of_a_stop_text_is_handed_out(bytewise, seed, stop, expected):
    text = "one </e two </end> three"
    pieces, stopped = streamed(bytewise, text, stop, seed)
    assert "".join(pieces) == (text if expected is None else expected)
    assert stopped == (expected is not None)


def test_an_unfinished_character_at_the_end_is_shown(bytewise):
    ids = bytewise("a🐑")["input_ids"][:-1]
    assert TextStream(bytewise).push(ids, True) == "a\ufffd"


def test_a_space_at_the_start_depends_on_the_text_before(tokenizer):
    ids = tokenizer(" fruit .")["input_ids"]
    assert TextStream(tokenizer).push(ids, True) == "fruit ."
    assert TextStream(tokenizer, context=tokenizer("a kind of")["input_ids"]).push(ids, True) == " fruit ."


def test_a_long_answer_keeps_its_spaces(tokenizer):
    """What has been handed out is no longer decoded, and still decides how the next token is written."""
    ids = tokenizer("the lime is a kind of fruit . " * 20)["input_ids"][1:]
    stream = TextStream(tokenizer)
    pieces = [stream.push([token], n == len(ids) - 1) for n, token in enumerate(ids)]
    assert "".join(pieces) == tokenizer.decode(ids) and len(ids) > 100
