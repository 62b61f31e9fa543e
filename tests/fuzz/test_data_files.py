"""Whatever a file holds, it is read, or refused in one line that names it: never another exception, never a hang."""

import math

import pytest
import yaml
from hostile_values import VALUES, as_json, damaged, read, rewritten
from hypothesis import given
from hypothesis import strategies as st

from repeng.data.configuration import read_configs
from repeng.data.files import load_texts
from repeng.data.pairs import load_pairs
from repeng.data.questions import load_questions

PAIR = {"chosen": "You are kind.", "rejected": "You are unkind.", "suffix": "I think"}
QUESTION = {
    "prompt": "Is it?",
    "choices": ["Yes", "No"],
    "target": "Yes",
    "kind": "target",
    "suffix": "It is",
    "group": "a",
    "unit": "b",
    "history": ["Hello", "Hi"],
}
LINES = st.one_of(
    VALUES.map(as_json),
    damaged(PAIR).map(as_json),
    damaged(QUESTION).map(as_json),
    st.just(as_json(PAIR)),
    st.just(as_json(QUESTION)),
    st.text(max_size=30),
)
TEXTS = st.one_of(
    st.lists(LINES, max_size=4).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.one_of(VALUES, damaged(PAIR), damaged(QUESTION)), max_size=3).map(as_json).map(str.encode),
    rewritten("\n".join([as_json(PAIR), as_json(QUESTION)]).encode()),
    st.binary(max_size=60),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@given(data=TEXTS, suffix=st.sampled_from(["jsonl", "json", "txt"]))
def test_pairs(folder, data, suffix):
    path = folder / f"pairs.{suffix}"
    path.write_bytes(data)
    for pair in read(load_pairs, path) or ():
        assert all(isinstance(text, str) for text in (pair.chosen, pair.rejected, pair.suffix))
        assert pair.chosen.strip() and pair.rejected.strip()


@given(data=TEXTS, suffix=st.sampled_from(["jsonl", "json", "txt"]))
def test_texts(folder, data, suffix):
    path = folder / f"texts.{suffix}"
    path.write_bytes(data)
    for text in read(load_texts, path) or ():
        assert isinstance(text, str) and text.strip() and text.encode("utf-8")


@given(data=TEXTS, suffix=st.sampled_from(["jsonl", "json", "csv"]))
def test_questions(folder, data, suffix):
    path = folder / f"questions.{suffix}"
    path.write_bytes(data)
    for question in read(load_questions, path) or ():
        assert set(question.target) < set(question.choices) and all(isinstance(c, str) for c in question.choices)
        assert isinstance(question.prompt, str) and isinstance(question.suffix, str)


def test_what_is_whole_is_read(folder):
    """Else everything could be refused unnoticed."""
    path = folder / "whole.jsonl"
    for reader, whole in ((load_pairs, PAIR), (load_questions, QUESTION), (load_texts, {"text": "words"})):
        path.write_text(as_json(whole))
        assert len(reader(path)) == 1
    path = folder / "whole.yaml"
    path.write_text(yaml.dump(CONFIGURATION))
    assert read_configs([str(path)], HINTS) == CONFIGURATION


def finite(value):
    """Whether a value holds no number that is not finite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return all(map(finite, value)) if isinstance(value, list) else True


HINTS = {"positive": str | None, "negative": str | None, "r": int, "layers": list[int] | str}
CONFIGURATION = {"positive": "honest", "negative": "dishonest", "r": 4, "layers": [1, 2]}
YAML = st.one_of(
    damaged(CONFIGURATION).map(lambda values: yaml.dump(values).encode("utf-8", "surrogatepass")),
    rewritten(yaml.dump(CONFIGURATION).encode()),
    st.text(max_size=40).map(str.encode),
    st.binary(max_size=40),
)


@given(data=YAML)
def test_configurations(folder, data):
    path = folder / "own.yaml"
    path.write_bytes(data)
    values = read(lambda file: read_configs([str(file)], HINTS), path)
    assert values is None or (set(values) <= set(HINTS) and finite(values))
