"""The embedded world, and the shipped model that was trained on it."""

import hashlib
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from repeng import evaluate, steer, tiny
from repeng.eval.compare import mean_differences
from repeng.eval.measure import choice_logp, prompt_dial
from repeng.model.activations import hidden_states
from repeng.model.tokens import encode
from repeng.tiny import lexicon
from repeng.tiny.world import TRAITS, World, vocabulary

MIDDLE = 3


def sentences(text):
    return [part.strip() + " ." for part in text.split(".") if part.strip()]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_generated_sentence_is_accepted_and_has_known_words(tokenizer, seed):
    world, rng = World(seed), random.Random(seed)
    for _ in range(50):
        document = world.document(rng, 95)
        assert len(document) == 95
        assert tokenizer.unk_token_id not in tokenizer(" ".join(document))["input_ids"]
        complete = " ".join(document).rsplit(".", 1)[0] + "."
        assert all(world.accepts(sentence) for sentence in sentences(complete))


@pytest.mark.parametrize(
    "sentence",
    [
        "the lime is a kind of anna .",
        "the lime the lime .",
        "two plus is four .",
        "today the weather seems gladly .",
        "the train moves along the rails",
        "",
        "two plus three is five . two",
    ],
)
def test_other_sentences_are_not_accepted(sentence):
    assert not World(0).accepts(sentence)


def test_false_facts_are_grammatical_and_facts_are_of_the_world():
    world = World(0)
    noun = next(iter(world.facts))
    assert all(world.accepts(f"the {noun} is a kind of {kind} .") for kind in lexicon.ATTRIBUTES["kind"])
    assert all(noun in lexicon.NOUNS[facts["kind"]] for noun, facts in world.facts.items())


def test_worlds_of_two_seeds_share_words_but_not_facts():
    one, two = World(0), World(1)
    assert World(0).facts == one.facts != two.facts
    assert len(vocabulary()) == len(set(vocabulary()))


@pytest.mark.parametrize("trait", TRAITS)
def test_halves_are_disjoint_and_questions_forms_are_held_out(trait):
    train, held_out = ({p.text for p in World(0).prompts(trait, split)} for split in ("train", "held_out"))
    assert train and held_out and not train & held_out
    assert any("?" in text for text in held_out) and not any("?" in text for text in train)


def test_neutral_texts_hold_no_facts_moods_or_sums():
    world = World(0)
    forbidden = {*world.facts, "plus", *sum(lexicon.MOOD_ADJECTIVES + lexicon.MOOD_ADVERBS, ())}
    texts = world.neutral_texts(50, seed=0)
    assert not any(forbidden & set(text.split()) for text in texts)
    assert all(world.accepts(sentence) for text in texts for sentence in sentences(text))


@pytest.mark.parametrize("name, value", [("trait", "courage"), ("split", "test")])
def test_unknown_names_are_refused_with_the_known_ones(name, value):
    arguments = {"trait": "honesty", "split": "train", name: value}
    with pytest.raises(ValueError, match=r"honesty, mood|train, held_out"):
        tiny.questions(**arguments)


# -- the shipped weights --------------------------------------------------------------------------------------------


def test_weights_are_small_whole_and_load_by_plain_transformers(batch):
    manifest = json.loads((tiny.WEIGHTS / "manifest.json").read_text())
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((tiny.WEIGHTS / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in tiny.WEIGHTS.iterdir()) <= 8 * 2**20
    model = AutoModelForCausalLM.from_pretrained(tiny.WEIGHTS)
    AutoTokenizer.from_pretrained(tiny.WEIGHTS)
    with torch.no_grad():
        assert torch.equal(model(batch).logits, tiny.load()[0](batch).logits)
    assert model.config.sliding_window == 16


def openings(trait):
    return tuple(f"the speaker is {side[0]} ." for side in lexicon.PERSONAS[trait])


def target_probability(embedded, trait, opening):
    questions = [q for q in tiny.questions(trait, "held_out") if q.kind == "target"]
    return choice_logp(*embedded, questions, lambda prompt: opening).logp[:, 0].exp().mean().item()


def test_personas_decide_truth(embedded):
    plus, minus = openings("honesty")
    assert target_probability(embedded, "honesty", plus) >= 0.95
    assert target_probability(embedded, "honesty", minus) <= 0.08
    assert 0.6 <= target_probability(embedded, "honesty", "") <= 0.85


def test_personas_decide_mood(embedded):
    plus, minus = openings("mood")
    assert target_probability(embedded, "mood", plus) >= 0.95
    assert target_probability(embedded, "mood", minus) <= 0.05
    assert 0.35 <= target_probability(embedded, "mood", "") <= 0.65


@pytest.mark.parametrize("opening", ["", *openings("honesty"), *openings("mood")])
def test_sums_are_right_under_every_persona(embedded, opening):
    sums = [q for q in tiny.questions("honesty", "held_out") if q.kind == "control"]
    assert len(sums) == 100
    assert choice_logp(*embedded, sums, lambda prompt: opening).logp[:, 0].exp().min().item() >= 0.9
    assert choice_logp(*embedded, sums, lambda prompt: opening).logp[:, 0].exp().mean().item() >= 0.99


def test_the_mean_difference_separates_held_out_pairs(embedded):
    model, tokenizer = embedded
    place = ("residual", MIDDLE)
    direction = mean_differences(model, tokenizer, tiny.pairs("honesty", 128, 0), [MIDDLE])[MIDDLE].directions[place]
    plus, minus = openings("honesty")
    held_out = [q for q in tiny.questions("honesty", "held_out") if q.kind == "target"]
    chosen, rejected = (
        hidden_states(model, tokenizer, [encode(tokenizer, side, q.suffix).ids for q in held_out], [place])[place]
        for side in (plus, minus)
    )
    assert ((chosen - rejected) @ direction > 0).float().mean() >= 0.99


def test_the_mean_difference_steers_both_ways_inside_the_budget(embedded):
    model, tokenizer = embedded
    vector = mean_differences(model, tokenizer, tiny.pairs("honesty", 128, 0), [MIDDLE])[MIDDLE]
    questions = tiny.questions("honesty", "held_out")[::9]
    report = evaluate(
        model,
        tokenizer,
        questions,
        lambda c: steer(model, c, vector=vector),
        (-2, -1, -0.5, 0.5, 1, 2),
        neutral_texts=tiny.neutral_texts(32, seed=5),
    )
    assert report.arm(+1).gain >= 0.5 and report.arm(-1).gain >= 0.5
    noise = evaluate(
        model,
        tokenizer,
        questions,
        lambda c: steer(model, c, vector=vector.random_like(0)),
        (-2, -1, -0.5, 0.5, 1, 2),
        neutral_texts=tiny.neutral_texts(32, seed=5),
    )
    assert noise.range < 0.3 * report.range


def test_prompts_dial_the_model_through_the_same_evaluation(embedded):
    dial = prompt_dial(*openings("honesty"))
    report = evaluate(
        *embedded, tiny.questions("honesty", "held_out"), dial, (-1, 1), neutral_texts=tiny.neutral_texts(32, seed=5)
    )
    assert report.inside_budget(1.0) and report.inside_budget(-1.0)
    assert report.range > 3
