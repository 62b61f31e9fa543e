"""Neutral texts that the base model writes are kept: another run of the same model need not write them again."""

import json
from types import SimpleNamespace

import pytest

from repeng.data import task
from repeng.data.task import neutral_texts

ARGS = SimpleNamespace(neutral_file=None)


@pytest.fixture
def drawn(embedded, monkeypatch, tmp_path):
    """How often the model was asked to generate."""
    monkeypatch.setenv("REPENG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(task, "SAMPLED_TRAIN", 4)
    monkeypatch.setattr(task, "SAMPLED_TEST", 2)
    monkeypatch.setattr(task, "NEUTRAL_LENGTH", 6)
    calls, generate = [], embedded[0].generate
    monkeypatch.setattr(embedded[0], "generate", lambda *a, **k: calls.append(1) or generate(*a, **k))
    return calls


def test_texts_are_written_once(embedded, drawn, tmp_path):
    first = neutral_texts(ARGS, *embedded, seed=0, own=None)
    assert [len(some) for some in first] == [4, 2] and len(drawn) == 1
    assert neutral_texts(ARGS, *embedded, seed=0, own=None) == first and len(drawn) == 1
    assert neutral_texts(ARGS, *embedded, seed=1, own=None) != first and len(drawn) == 2
    assert len(list((tmp_path / "cache").glob("texts-*.json"))) == 2


@pytest.mark.parametrize("text", ["", "{", "[1, 2, 3, 4, 5, 6]", '["a", "b"]', '{"a": 1}'])
def test_what_is_no_such_file_is_written_again(embedded, drawn, tmp_path, text):
    first = neutral_texts(ARGS, *embedded, seed=0, own=None)
    (path,) = (tmp_path / "cache").glob("texts-*.json")
    path.write_text(text)
    assert neutral_texts(ARGS, *embedded, seed=0, own=None) == first and len(drawn) == 2
    assert len(json.loads(path.read_text())) == 6


def test_a_cache_that_cannot_be_written_is_done_without(embedded, drawn, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REPENG_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be stored"):
        texts = neutral_texts(ARGS, *embedded, seed=0, own=None)
    assert len(texts[0]) == 4
