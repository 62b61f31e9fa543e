"""Questions made of pairs carry no persona, and say how far the personas move them."""

from types import SimpleNamespace

import pytest
import torch

from repeng import tiny
from repeng.data import word_questions as module
from repeng.data.pairs import ContrastPair
from repeng.data.probes import ROBUSTNESS, other_traits, robustness, some_suffixes, traits_that_move
from repeng.data.questions import Question
from repeng.data.task import hold_out, personas
from repeng.data.word_questions import NEUTRAL_REQUEST, persona_sentences, without_persona, word_questions

PAIR = ContrastPair("You are cheerful. Tell me of the sea.", "You are gloomy. Tell me of the sea.", "It is")


def test_the_persona_is_taken_out():
    assert without_persona(PAIR, has_template=True) == "Tell me of the sea."
    assert without_persona(PAIR, has_template=False) == ""
    alone = ContrastPair("Be a cheerful person.", "Be a gloomy person.", "It is")
    assert without_persona(alone, has_template=True) == NEUTRAL_REQUEST
    text = ContrastPair("cheerful people say that rain", "gloomy people say that rain")
    assert without_persona(text, has_template=False) == "people say that rain"
    whole = ContrastPair("Hear a cheerful voice. The rain is", "Hear a gloomy voice. The rain is")
    assert without_persona(whole, has_template=False) == "The rain is"
    last = ContrastPair("I saw the sea. A happy man said it was", "I saw the sea. A sad man said it was")
    assert without_persona(last, has_template=False) == "man said it was"


def test_the_persona_of_pairs_is_what_differs():
    assert persona_sentences(PAIR) == ("You are cheerful.", "You are gloomy.")
    args = SimpleNamespace(positive=None, negative=None)
    same = [PAIR, ContrastPair("You are cheerful. Sing.", "You are gloomy. Sing.", "La")]
    assert personas(args, same, None) == ("You are cheerful.", "You are gloomy.")
    apart = [ContrastPair(f"I like {a}.", f"I hate {a}.", "It is") for a in "abcdef"]
    assert personas(args, apart, None) is None
    whole = [ContrastPair(f"Be {a}. I see {x}", f"Be {b}. I see {x}") for a, b in ("up", "no") for x in "xyz"]
    assert personas(args, whole, None) == ("Be u.", "Be p.")
    assert personas(args, [ContrastPair("I like rain", "I hate rain")] * 9, None) is None
    assert personas(args, [ContrastPair("a", "b")], None) is None


def test_texts_that_are_held_out_are_not_learned_behind_another_persona():
    whole = [ContrastPair(f"Be {a}. I see {x}", f"Be {b}. I see {x}") for a, b in ("up", "no", "hi") for x in "vwxyz"]
    learned, held = hold_out(whole)
    ends = [{pair.chosen.split(". ")[1] for pair in some} for some in (learned, held)]
    assert held and len(learned) == 12 and not ends[0] & ends[1]
    uneven = [ContrastPair(f"Be {i}. I see x", f"Be not {i}. I see x") for i in range(40)]
    learned, held = hold_out(uneven + [pair for pair in whole if not pair.chosen.endswith("x")])
    assert len(held) == 6 and len(learned) == 46  # two groups of three


def test_the_words_that_tell_the_sides_apart(tokenizer):
    ids = tokenizer.get_vocab()
    said = torch.full((1, 2, len(tokenizer)), -20.0)
    said[0, 0, [ids["red"], ids["blue"]]] = torch.tensor([1.0, 0.0])
    said[0, 1, [ids["red"], ids["blue"]]] = torch.tensor([0.0, 2.0])
    pairs = [ContrastPair("the speaker is cheerful .", "the speaker is gloomy .", "the lime looks")]
    made = module.questions_of(tokenizer, pairs, said.log_softmax(dim=-1))
    assert made.questions == [Question("", ("red", "blue"), ("red",), suffix="the lime looks", unit="the lime looks")]
    assert made.effect == pytest.approx((1.0 - 0.0) - (0.0 - 2.0), abs=1e-4)


def test_a_pair_is_measured_on_the_words_of_the_others(tokenizer):
    """Two wordings move different words: by the own words each would be moved, by the other's words neither is."""
    ids = tokenizer.get_vocab()
    words = [ids[word] for word in ("red", "blue", "green", "five")]
    said = torch.full((2, 2, len(tokenizer)), -20.0)
    said[:, :, words] = 3.0 * torch.eye(4).view(2, 2, 4)
    pairs = [
        ContrastPair("the speaker is cheerful .", "the speaker is gloomy .", "the lime looks"),
        ContrastPair("the speaker is honest .", "the speaker is dishonest .", "the lime looks"),
    ]
    logp = said.log_softmax(dim=-1)
    assert module.questions_of(tokenizer, pairs, logp).effect == pytest.approx(0.0, abs=0.2)
    assert module.questions_of(tokenizer, pairs[:1], logp[:1]).effect > 5


def test_batches_change_nothing_and_the_most_telling_are_kept(embedded):
    model, tokenizer = embedded
    pairs = tiny.pairs("mood", 40, seed=0)
    whole = word_questions(model, tokenizer, pairs, batch_size=7)
    assert [q.suffix for q in whole.questions] == [
        q.suffix for q in word_questions(model, tokenizer, pairs, batch_size=64).questions
    ]
    assert len({q.suffix for q in whole.questions}) == len(whole.questions) and whole.effect > 2
    most = word_questions(model, tokenizer, pairs, most=5)
    assert most.questions == whole.questions[:5] and 0 < whole.error < most.error < whole.effect
    assert word_questions(model, tokenizer, pairs[:1]).error == float("inf")
    assert all(q.unit == q.suffix and q.prompt == "" for q in whole.questions)
    same = [ContrastPair("the speaker is cheerful .", "the speaker is cheerful .", p.suffix) for p in pairs[:3]]
    assert word_questions(model, tokenizer, same).questions == []


def test_probes_change_the_circumstances_only():
    questions = [
        Question("Tell me.", ("a", "b"), ("a",), suffix="It is"),
        Question("Sum?", ("one", "two"), ("one",), "control"),
    ]
    probes = robustness(questions, ("Be glad.", "Be sad."), has_template=True)
    assert list(probes) == list(ROBUSTNESS)
    against = probes["argued against"]
    assert [q.prompt for q in against.plus] == ["Be sad. Tell me."]
    assert [q.prompt for q in against.minus] == ["Be glad. Tell me."]
    for name in ROBUSTNESS[1:]:
        assert probes[name].plus == probes[name].minus and "Tell me." in probes[name].plus[0].prompt
        assert probes[name].plus[0].choices == ("a", "b") and probes[name].plus[0].suffix == "It is"
    assert len(probes["several turns"].plus[0].history) == 2
    assert list(robustness(questions, None, has_template=False)) == []
    orders = [Question("?", ("A", "B"), (x,), unit=f"u{i}") for i in range(40) for x in "AB"]
    some = robustness(orders, None, has_template=True)["reworded"].plus
    assert 15 <= len(some) <= 30 and [q.target[0] for q in some] == ["A", "B"] * (len(some) // 2)


def test_traits_of_another_language_are_left_out(embedded):
    assert some_suffixes(embedded[1]) == []  # the embedded world has no words for them
    assert other_traits(SimpleNamespace(positive="honest", negative="dishonest"), *embedded) == {}
    assert traits_that_move(*embedded, least=1.0) == {}


def test_each_trait_but_the_own_is_a_probe(embedded, monkeypatch):
    from repeng.data import probes

    monkeypatch.setattr(probes, "some_suffixes", lambda tokenizer: ["the rain settles on"])
    seen = []

    def made_of(tokenizer, pairs, logp):
        seen.append(pairs)
        assert torch.allclose(logp, module.next_logp(*embedded, pairs), atol=1e-4)
        return module.WordQuestions([Question("", ("a", "b"), ("a",))], 2.0, 0.1, {})

    monkeypatch.setattr(probes, "questions_of", made_of)
    found = other_traits(SimpleNamespace(positive="honest", negative="dishonest"), *embedded)
    assert "honesty" not in found and {"mood", "warmth"} <= set(found)
    assert traits_that_move(*embedded, least=1.0)["honesty"] == 2.0 and traits_that_move(*embedded, least=3.0) == {}
    assert all(pair.suffix == "the rain settles on" for pairs in seen for pair in pairs)
