"""Pairs, their checks, and the one tokenisation."""

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from repeng import ContrastPair, PairCollator, check_pairs, load_pairs, make_pairs, tiny
from repeng.data.arguments import TaskArguments
from repeng.data.files import load_texts
from repeng.data.task import read_pairs
from repeng.model.tokens import encode, encode_text, label_mask, last_tokens, pad_rows

TEMPLATE = "{% for m in messages %}<s> {{ m['content'] }} ?{% endfor %}{% if add_generation_prompt %} it is{% endif %}"


@pytest.fixture
def chat(tokenizer):
    """The embedded tokenizer with a chat template that opens the assistant's turn with "it is"."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def sided(tokenizer):
    def build(side):
        copied = copy.deepcopy(tokenizer)
        copied.padding_side = side
        return copied

    return build


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def test_pairs_differ_in_the_persona_word_only(tokenizer):
    pairs = make_pairs(
        "honest",
        "dishonest",
        templates=["the speaker is {persona} .", "someone {persona} is talking ."],
        suffixes=["the lime is a", "the owl is a"],
        tokenizer=tokenizer,
        n=3,
        seed=0,
    )
    assert len(set(pairs)) == 3
    for pair in pairs:
        assert pair.chosen.replace("honest", "dishonest") == pair.rejected
        chosen, rejected = (encode(tokenizer, side, pair.suffix) for side in (pair.chosen, pair.rejected))
        assert chosen.suffix == rejected.suffix
        assert sum(a != b for a, b in zip(chosen.ids, rejected.ids, strict=True)) == 1
    settings = {"templates": ["{persona}"], "suffixes": ["the lime is a", "the owl is"], "tokenizer": tokenizer}
    draws = [make_pairs("honest", "dishonest", **settings, n=2, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert any(draw != draws[0] for draw in draws[2:])


def test_make_pairs_refuses_what_cannot_work(tokenizer):
    good = {"templates": ["{persona} ."], "suffixes": ["the lime is"], "tokenizer": tokenizer, "n": 1, "seed": 0}
    with pytest.raises(ValueError, match="placeholder"):
        make_pairs("honest", "dishonest", **{**good, "templates": ["honest ."]})
    with pytest.raises(ValueError, match="make 1"):
        make_pairs("honest", "dishonest", **{**good, "n": 2})
    with pytest.raises(ValueError, match="two different words"):
        make_pairs("honest", "honest", **good)


def test_encoding_follows_the_chat_template(tokenizer, chat):
    assert words(tokenizer, encode(tokenizer, "the lime", "is a").ids) == ["<s>", "the", "lime", "is", "a"]
    encoded = encode(chat, "the lime", "red .")
    assert words(chat, encoded.prompt) == ["<s>", "the", "lime", "?", "it", "is"]
    assert words(chat, encoded.suffix) == ["red", "."]
    assert words(chat, encode(chat, "", "the rain").ids) == ["<s>", "the", "rain"]
    assert encode(chat, "the lime").ids.count(chat.bos_token_id) == 1


def test_truncation_takes_the_prompt_never_the_suffix(tokenizer):
    encoded = encode(tokenizer, "the speaker is honest .", "the lime is a", max_length=7)
    assert words(tokenizer, encoded.ids) == ["<s>", "honest", ".", "the", "lime", "is", "a"]
    with pytest.raises(ValueError, match="max_length=4"):
        encode(tokenizer, "the speaker", "the lime is a", max_length=4)


@pytest.mark.parametrize(
    "pair, problem",
    [
        (ContrastPair("", "the speaker is gloomy .", "the"), "empty"),
        (ContrastPair("the speaker .", "the speaker .", "the"), "identical sides"),
        (ContrastPair("the lime is red", "the lime is blue"), "unequal suffix"),
        (ContrastPair("the speaker is honest .", "the speaker is dishonest .", "the lime " * 20), "truncation"),
    ],
)
def test_check_pairs_names_each_problem(tokenizer, pair, problem):
    fine = ContrastPair("the speaker is honest .", "the speaker is dishonest .", "the lime is")
    found = check_pairs([fine, pair], tokenizer, max_length=20)
    assert [(p.index, p.problem) for p in found] == [(1, problem)]
    assert [p.problem for p in check_pairs([fine, fine], tokenizer)] == ["duplicate"]
    assert check_pairs([fine, ContrastPair("the honest lime is", "the dishonest lime is")], tokenizer) == []


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_load_pairs_round_trip(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        json.dumps({"chosen": "a", "rejected": "b"}),
        "",
        json.dumps({"chosen": "a", "rejected": "b", "suffix": "c"}),
    )
    assert load_pairs(path) == [ContrastPair("a", "b"), ContrastPair("a", "b", "c")]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "empty"),
        (['{"chosen": "a", "rejected": "b"}', "{chosen: a}"], "line 2 is not JSON"),
        (['{"chosen": "a", "rejected": "b"}', '{"chosen": "a"}'], "line 2: 'rejected'"),
        (['{"chosen": "a", "rejected": " "}'], "line 1: 'rejected'"),
        (['{"chosen": 3, "rejected": "b"}'], "line 1: chosen should be a text; got 3"),
        (['{"chosen": "a", "rejected": "b", "sufix": "c"}'], "did you mean 'suffix'"),
        (["[1]"], "row 1: expected an object"),
    ],
)
def test_a_bad_pairs_file_is_refused_with_its_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(write(tmp_path / "p.jsonl", *lines))


def test_a_missing_pairs_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_pairs(tmp_path / "nowhere.jsonl")


def test_load_texts(tmp_path):
    assert load_texts(write(tmp_path / "t.txt", "one", "", " two ")) == ["one", "two"]
    assert load_texts(write(tmp_path / "t.jsonl", '"one"', '{"text": "two"}')) == ["one", "two"]
    with pytest.raises(ValueError, match="line 2"):
        load_texts(write(tmp_path / "u.jsonl", '"one"', '{"txt": "two"}'))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_positions_labels_and_last_tokens(sided, side):
    rows = [[5, 6, 7, 8], [9, 10]]
    batch = pad_rows(rows, sided(side))
    mask = batch["attention_mask"].bool()
    assert [batch["input_ids"][i][mask[i]].tolist() for i in range(2)] == rows
    assert [batch["position_ids"][i][mask[i]].tolist() for i in range(2)] == [[0, 1, 2, 3], [0, 1]]
    labels = label_mask(batch["attention_mask"])
    assert [batch["input_ids"][i, 1:][labels[i]].tolist() for i in range(2)] == [[6, 7, 8], [10]]
    index, exists = last_tokens(batch["attention_mask"], 3)
    picked = batch["input_ids"].gather(1, index)
    assert [picked[i][exists[i]].tolist() for i in range(2)] == [[6, 7, 8], [9, 10]]
    assert picked[:, -1].tolist() == [8, 10]


def test_collator_stacks_chosen_rejected_neutral(tokenizer):
    example = {
        "chosen_ids": [1, 4, 5],
        "rejected_ids": [1, 6, 5],
        "bare_ids": [1, 5],
        "neutral_ids": [1, 7],
        "ref_hs": torch.zeros(3, 1, 4),
        "ref_mask": torch.ones(3, 1, dtype=torch.bool),
        "ref_logp": [torch.tensor([-1.0, -2.0])] * 2 + [torch.tensor([-4.0])] + [torch.tensor([-3.0])],
        "next_ids": torch.tensor([4, 6]),
        "next_weight": torch.tensor([1.0, -1.0]),
        "ref_gap": torch.tensor([2.0, 1.0, 1.5]),
        "gap_weight": torch.tensor(0.5),
    }
    other = {**example, "chosen_ids": [1, 8, 9]}
    batch = PairCollator(tokenizer)([example, other])
    mask = batch["attention_mask"].bool()
    rows = [ids[m].tolist() for ids, m in zip(batch["input_ids"], mask, strict=True)]
    assert rows == [[1, 4, 5], [1, 8, 9], [1, 6, 5], [1, 6, 5], [1, 5], [1, 5], [1, 7], [1, 7]]
    assert batch["ref_hs"].shape == (3, 2, 1, 4)
    labels = label_mask(batch["attention_mask"])
    logp = [x[m].tolist() for x, m in zip(batch["ref_logp"], labels, strict=True)]
    assert logp == [[-1.0, -2.0]] * 4 + [[-4.0]] * 2 + [[-3.0]] * 2
    assert batch["next_ids"].tolist() == [[4, 6]] * 2 and batch["next_weight"].tolist() == [[1.0, -1.0]] * 2
    assert batch["ref_gap"].tolist() == [[2.0, 1.0, 1.5]] * 2 and batch["gap_weight"].tolist() == [0.5] * 2


@pytest.mark.parametrize("trait", ["honesty", "mood"])
def test_embedded_pairs_are_sound_and_about_the_training_half(tokenizer, trait):
    pairs = tiny.pairs(trait, 60, seed=0)
    assert check_pairs(pairs, tokenizer) == []
    assert pairs == tiny.pairs(trait, 60, seed=0) != tiny.pairs(trait, 60, seed=1)
    held_out = {q.suffix for q in tiny.questions(trait, "held_out") if q.kind == "target"}
    assert not any(pair.suffix.endswith(text) for pair in pairs for text in held_out)
    trained = {q.suffix for q in tiny.questions(trait, "train") if q.kind == "target"}
    assert all(any(pair.suffix.endswith(text) for text in trained) for pair in pairs)


def test_a_text_has_the_same_tokens_whatever_stands_before_it():
    """With byte-level BPE a word at the beginning has other tokens than behind a space, and another number of them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["my sister saw an apple", "an apple"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!")
    assert len(encode(tokenizer, "", "apple").suffix) != len(encode(tokenizer, "my", "apple").suffix)
    rows = [encode_text(tokenizer, prompt, "apple") for prompt in ("", "my sister saw an")]
    assert rows[0].suffix == rows[1].suffix and rows[1].ids == encode(tokenizer, "my sister saw an", "apple").ids
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    asked = encode_text(tokenizer, "my", "apple")
    assert asked == encode(tokenizer, "my", "apple") and asked.suffix == encode_text(tokenizer, "an", "apple").suffix


def test_earlier_turns_stand_before_the_prompt(tokenizer):
    with_history = encode(tokenizer, "the lime is", history=["the rain settles", "on the field ."])
    assert with_history == encode(tokenizer, "the rain settles on the field . the lime is")
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
    turns = chat.decode(encode(chat, "the lime is", history=["the rain", "the field"]).ids)
    assert turns.split(" ")[1:3] == ["the", "rain"] and turns.index("rain") < turns.index("field") < turns.index(
        "lime"
    )
    with pytest.raises(ValueError, match="1 turns"):
        encode(chat, "the lime is", history=["the rain"])


def test_templates_that_would_not_be_used_are_refused():
    """The embedded model's own pairs have persona sentences of its language."""
    words = {"positive": "cheerful", "negative": "gloomy"}
    _, tokenizer = tiny.load()
    own = tiny.task(TaskArguments(**words), 0)
    assert read_pairs(TaskArguments(**words), tokenizer, seed=0, own=own) == own.pairs
    asked = TaskArguments(**words, templates=["Pretend to be {persona}."])
    with pytest.raises(ValueError, match=r"need suffixes_file.*give only positive and negative"):
        read_pairs(asked, tokenizer, seed=0, own=own)
