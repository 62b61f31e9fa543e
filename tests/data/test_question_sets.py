"""Published question sets, on rows of their documented columns: the hub itself is not asked."""

import sys
from types import SimpleNamespace

import pytest

from repeng.data import question_sets

DILEMMAS = (
    [
        {
            "dilemma_idx": 1,
            "dilemma_situation": "A friend asks.",
            "action_type": action,
            "action": f"{action}!",
            "values_aggregated": values,
        }
        for action, values in (("to_do", "['truthfulness', 'care']"), ("not_to_do", "['loyalty']"))
    ]
    + [
        {
            "dilemma_idx": 2,
            "dilemma_situation": "Both are honest.",
            "action_type": action,
            "action": action,
            "values_aggregated": ["Truthfulness"],
        }
        for action in ("to_do", "not_to_do")
    ]
    + [
        {
            "dilemma_idx": 3,
            "dilemma_situation": "Silence.",
            "action_type": action,
            "action": f"{action}?",
            "values_aggregated": values,
        }
        for action, values in (("to_do", ["care"]), ("not_to_do", ["truthfulness"]))
    ]
)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets` with the rows that a test puts there."""
    asked, rows = [], []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return SimpleNamespace(asked=asked, rows=rows)


def test_dilemmas_ask_for_both_actions_and_the_value_decides(hub):
    hub.rows += DILEMMAS
    questions = question_sets.daily_dilemmas()
    assert hub.asked == [("kellycyy/daily_dilemmas", "Dilemmas_with_values_aggregated", "test")]
    answers = [(q.prompt.split("\n")[0], q.prompt.split("\n")[2], q.target) for q in questions]
    assert answers == [
        ("A friend asks.", "Action: to_do!", ("Yes",)),
        ("A friend asks.", "Action: not_to_do!", ("No",)),
        ("Silence.", "Action: to_do?", ("No",)),
        ("Silence.", "Action: not_to_do?", ("Yes",)),
    ]
    with pytest.raises(ValueError, match="truthfulness"):
        question_sets.daily_dilemmas("thrift")


def test_vignettes_of_social_norms_are_controls(hub):
    hub.rows += [
        {"text": "You see a boy.", "foundation_coarse": name} for name in ("Care", "SocialNorms", "Social Norms")
    ]
    care, *norms = question_sets.moral_foundations("scifi", "self_violate")
    assert hub.asked == [("wassname/tiny-mfv", "scifi", "self_violate")]
    assert (care.kind, care.target, care.group) == ("target", ("Yes",), "Care")
    assert all((q.kind, q.target) == ("control", ("No",)) for q in norms)


def test_the_true_answer_goes_round_the_letters(hub):
    choices = {"choices": ["true", "false", "wrong"], "labels": [1, 0, 0]}
    hub.rows += [{"question": f"q{i}?", "mc1_targets": choices} for i in range(6)]
    questions = question_sets.truthful_qa()
    assert [q.target[0] for q in questions] == ["A", "B", "C"] * 2
    for q in questions:
        assert f"{q.target[0]}. true" in q.prompt and q.choices == ("A", "B", "C")
        assert sum(f". {text}\n" in q.prompt for text in choices["choices"]) == 3


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"repeng\[hub\]"):
        question_sets.truthful_qa()
