"""What the page's buttons do, its markup and its code, without gradio."""

import html
import json
import re
import shlex

import pytest

from repeng import extract, tiny
from repeng.chat import Answer, Chat, Column, Cost
from repeng.chat.markup import END, Turn, code_boxes, merged, note, shade, talk
from repeng.chat.snippets import Origin, as_curl, as_python
from repeng.chat.web import Session, Shown
from repeng.control.dials import Dials
from repeng.serve.protocol import ChatCompletion, Completion, parse

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{7*7}} \"'&"
PROMPT = "today the weather seems"


@pytest.fixture(scope="module")
def session(embedded, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("vector") / "mood.safetensors"
    vector = extract(embedded[0], tokenizer, tiny.pairs("mood", 40, 0), layers=[2], held_out=0)
    vector.save(path)
    chat = Chat(Dials(embedded[0], vectors={"mood": vector}), tokenizer, max_new_tokens=8)
    return Session(chat, Origin("tiny", "tiny", None, {"mood": path}))


def answered(session, prompts, settings, shown=None, attempt=0):
    shown = shown or Shown()
    *_, last = session.answer("a page", session.columns(prompts, settings, shown), shown, attempt)
    return last


def said(chat, *columns, attempt=0):
    *_, answers = chat.answer(columns, attempt)
    return [answer.text for answer in answers]


def test_each_column_has_its_coefficient_and_its_history(session):
    first = answered(session, [PROMPT, PROMPT], [-1.0, 1.0])
    texts = said(session.chat, Column(PROMPT, {"mood": -1.0}), Column(PROMPT, {"mood": 1.0}))
    assert [turn.answer.text for (turn,) in first.turns] == texts
    second = answered(session, ["the rain", "the speaker is"], [0.5, 0.0], first)
    columns = [
        Column("the rain", {"mood": 0.5}, (PROMPT, texts[0])),
        Column("the speaker is", {"mood": 0.0}, (PROMPT, texts[1])),
    ]
    assert [turns[1].answer.text for turns in second.turns] == said(session.chat, *columns)
    assert [turns[1].column for turns in second.turns] == columns
    assert second.turns[1][1].cost.mean == 0 < second.turns[0][1].cost.mean


def test_a_column_without_a_prompt_is_left_alone(session):
    first = answered(session, [PROMPT, PROMPT], [-1.0, 1.0])
    second = answered(session, ["  ", "the rain"], [-1.0, 1.0], first)
    assert second.turns[0] == first.turns[0] and len(second.turns[1]) == 2
    assert session.columns(["", "\n"], [0, 0], first) == {}


def test_a_stopped_answer_has_its_cost(session):
    stream = session.answer("a page", session.columns([PROMPT, ""], [-1.0, 1.0], Shown()), Shown(), 0)
    shown = next(stream)
    session.stop("another page")
    session.stop("a page")
    *_, shown = stream
    turn = shown.turns[0][0]
    assert 1 <= len(turn.answer.ids) < 8 and turn.answer.ended is None and len(turn.cost.kl) == len(turn.answer.ids)
    session.stop("a page")  # nothing runs
    assert session._running == {}


def test_the_same_answer_again_at_temperature_0_is_explained(session):
    first = answered(session, [PROMPT, PROMPT], [-1.0, 1.0])
    assert session.remark(answered(session, [PROMPT, PROMPT], [-1.0, 1.0], attempt=1), first)
    assert not session.remark(answered(session, [PROMPT, PROMPT], [-1.0, 0.5], attempt=1), first)
    assert not session.remark(first, Shown())


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_python_code_gives_the_same_answers(session, temperature):
    chat = Chat(session.chat.dials, session.chat.tokenizer, max_new_tokens=8, temperature=temperature, seed=5)
    session = Session(chat, session.origin)
    first = answered(session, [PROMPT, PROMPT], [-1.0, 1.0])
    second = answered(session, ["the rain", "the speaker is"], [0.5, 1.0], first, attempt=3)
    code, _ = session.code(second)
    space = {}
    exec(compile(code, "code", "exec"), space)
    last = [turns[-1] for turns in second.turns]
    assert space["answers"] == [turn.answer for turn in last]
    assert space["chat"].costs(space["columns"], space["answers"]) == [turn.cost for turn in last]


def test_the_curl_code_is_what_the_server_takes(session):
    first = answered(session, [PROMPT, HOSTILE], [-1.0, 1.0])
    second = answered(session, ["the rain", "it's $HOME"], [0.5, 1.0], first)
    _, code = session.code(second)
    start, *lines = code.splitlines()
    path = str(session.origin.paths["mood"])
    assert shlex.split(start.partition(": ")[2])[2:] == [f"mood={path}", "--model_name_or_path", "tiny"]
    for line, turns in zip(lines, second.turns, strict=True):
        body = parse(Completion, shlex.split(line)[-1].encode())
        assert body.model == "tiny" and body.steer == turns[-1].column.coefficients
        assert body.max_tokens == 8 and body.temperature == 0
        assert turns[-1].column.prompt in body.prompt and turns[0].answer.text in body.prompt


def test_a_chat_models_code_has_the_turns(session, monkeypatch):
    monkeypatch.setattr(session.chat.tokenizer, "chat_template", "a template")
    column = Column("b", {"mood": 1.0}, ("a", HOSTILE))
    (_, line) = as_curl(session.chat, session.origin, [column], 0).splitlines()
    body = parse(ChatCompletion, shlex.split(line)[-1].encode())
    assert [(one["role"], one["content"]) for one in json.loads(shlex.split(line)[-1])["messages"]] == [
        ("user", "a"),
        ("assistant", HOSTILE),
        ("user", "b"),
    ]
    assert body.steer == {"mood": 1.0} and "chat/completions" in line


def test_hostile_text_stays_text_in_the_code(session):
    columns = [Column(f"{HOSTILE}\n'''\"\"\"", {"mood": 1.0}, (HOSTILE, "a\\"))]
    code = as_python(session.chat, session.origin, columns, 0)
    space = {}
    exec(
        compile(
            "Column = tuple\n"
            + code[code.index("columns = [") : code.index("*_")]
            .replace("Column(", "dict(prompt=")
            .replace(", {", ", steer={"),
            "code",
            "exec",
        ),
        space,
    )
    assert space["columns"] == [{"prompt": columns[0].prompt, "steer": {"mood": 1.0}, "history": [HOSTILE, "a\\"]}]


def test_without_answers_there_is_no_code(session):
    python, curl = session.code(Shown())
    assert python.startswith("#") and curl.startswith("#")


# -- markup --------------------------------------------------------------------------------------------------------


def turn(pieces, change, ended="length", prompt="p"):
    answer = Answer(tuple(range(len(pieces))), tuple(pieces), ended)
    return Turn(Column(prompt, {"mood": 1.0}), answer, Cost(tuple(change), tuple(abs(one) for one in change)))


@pytest.mark.parametrize("cost", [True, False])
def test_prompts_and_answers_are_escaped(cost):
    one = turn([HOSTILE, f" {HOSTILE}"], [0.0, 3.0], prompt=HOSTILE)
    text = talk([one if cost else Turn(one.column, one.answer)], "A")
    assert "<img" not in text and text.count(html.escape(HOSTILE)) == (5 if cost else 3)
    assert set(re.findall(r"<(\w+)", text)) <= set("div p span details summary table thead tbody tr th td".split())


def test_code_and_notes_are_escaped():
    for text in (code_boxes(HOSTILE, HOSTILE), note(HOSTILE)):
        assert "<img" not in text and html.escape(HOSTILE) in text


def test_tokens_without_text_join_the_next_and_the_end_has_a_sign():
    one = turn(["", " h", "", "é", ""], [1.0, 2.0, -0.25, 0.5, 4.0], ended="stop")
    assert list(merged(one.answer, one.cost)) == [("h", 3.0, 3.0), ("é", 0.25, 0.75), (END, 4.0, 4.0)]
    cut = turn(["a", ""], [1.0, 2.0])
    assert list(merged(cut.answer, cut.cost)) == [("a", 1.0, 1.0), ("…", 2.0, 2.0)]


def test_every_number_stands_in_a_title_and_in_the_table():
    text = talk([turn(["a", " b"], [0.125, -2.5])], "A")
    assert re.findall(r'title="([^ ]+) nats, KL ([^"]+)"', text) == [("+0.12", "0.12"), ("-2.50", "2.50")]
    assert re.findall(r"<td>([^<]*)</td>", text) == ["a", "+0.12", "0.12", " b", "-2.50", "2.50"]
    assert re.sub(r"<[^>]+>", "", text[text.index('class="text"') :]).partition(">")[2].startswith("a b")


@pytest.mark.parametrize(
    ("change", "name"),
    [(0.0, "same"), (0.09, "same"), (0.1, "up1"), (0.5, "up2"), (2.0, "up3"), (-0.3, "down1"), (-9.0, "down3")],
)
def test_direction_and_strength_have_a_class(change, name):
    assert shade(change) == name
