"""The conversation in the terminal: lines in, texts and a file out."""

import io
import json
import sys

import pytest

from repeng import cli, extract, tiny
from repeng.chat import Chat, Column, terminal
from repeng.chat.terminal import Terminal, printable
from repeng.control.dials import Dials

PROMPT = "today the weather seems"


@pytest.fixture(scope="module")
def vector(embedded, tokenizer):
    return extract(embedded[0], tokenizer, tiny.pairs("mood", 40, 0), layers=[2], held_out=0)


@pytest.fixture
def chat(embedded, tokenizer, vector):
    return Chat(Dials(embedded[0], vectors={"mood": vector}), tokenizer, max_new_tokens=8)


@pytest.fixture
def shown():
    return []


@pytest.fixture
def talk(chat, shown):
    return Terminal(chat, "tiny", shown.append)


def texts(talk):
    return [[(reply.coefficients["mood"], reply.answer.text) for reply in one.replies] for one in talk.rounds]


def answer(chat, prompt, c, history=(), attempt=0):
    *_, (found,) = chat.answer([Column(prompt, {"mood": c}, history)], attempt)
    return found.text


def test_the_coefficient_of_the_command_answers_and_the_history_goes_on(talk, chat, shown):
    for line in (PROMPT, "/c -1", "the speaker is", "/c mood 0.5", "the rain"):
        assert talk.take(line)
    first = answer(chat, PROMPT, 0)
    second = answer(chat, "the speaker is", -1, [PROMPT, first])
    third = answer(chat, "the rain", 0.5, [PROMPT, first, "the speaker is", second])
    assert texts(talk) == [[(0, first)], [(-1, second)], [(0.5, third)]]
    assert all(text.strip() in "".join(shown) for text in (first, second, third))


def test_compared_columns_keep_their_own_histories(talk, chat):
    for line in (PROMPT, "/compare -1 1", "the speaker is", "the rain", "/compare", "two plus three is"):
        talk.take(line)
    assert [[c for c, _ in one] for one in texts(talk)] == [[0], [-1, 1], [-1, 1], [0]]
    history = {c: [PROMPT, answer(chat, PROMPT, 0)] for c in (-1, 1)}
    for index, prompt in enumerate(("the speaker is", "the rain"), start=1):
        for c, said in texts(talk)[index]:
            assert said == answer(chat, prompt, c, history[c])
            history[c] += [prompt, said]
    assert texts(talk)[3][0][1] == answer(chat, "two plus three is", 0, history[-1])  # the first column goes on


def test_retry_answers_the_last_prompt_again_with_the_next_seed(embedded, tokenizer, vector, shown):
    chat = Chat(Dials(embedded[0], vectors={"mood": vector}), tokenizer, max_new_tokens=8, temperature=1.5)
    talk = Terminal(chat, "tiny", shown.append)
    for line in (PROMPT, "the speaker is", "/retry", "/c 1", "/retry"):
        talk.take(line)
    first = answer(chat, PROMPT, 0)
    assert texts(talk) == [[(0, first)], [(1, answer(chat, "the speaker is", 1, [PROMPT, first], attempt=2))]]


def test_a_retry_that_fails_leaves_the_answers(talk, chat, monkeypatch):
    talk.take(PROMPT)
    before = texts(talk)

    def fail(*_):
        raise ValueError("no")

    monkeypatch.setattr(chat, "answer", fail)
    assert talk.take("/retry") and texts(talk) == before


def test_clear_forgets_the_conversation_and_keeps_the_coefficient(talk, chat):
    for line in ("/c -1", PROMPT, "/clear", PROMPT):
        talk.take(line)
    assert texts(talk) == [[(-1, answer(chat, PROMPT, -1))]]


def test_a_file_holds_texts_coefficients_and_costs(talk, chat, tmp_path):
    for line in ("/compare -1 1", PROMPT, f"/save {tmp_path / 'new' / 'a.json'}"):
        talk.take(line)
    (told,) = json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8"))["rounds"]
    assert told["prompt"] == PROMPT
    for c, found in zip((-1, 1), told["answers"], strict=True):
        column = Column(PROMPT, {"mood": c})
        *_, answers = chat.answer([column])
        (cost,) = chat.costs([column], answers)
        assert found["coefficients"] == {"mood": c} and found["text"] == answers[0].text
        assert found["kl"] == pytest.approx(cost.mean) and found["rmse"] == pytest.approx(cost.rmse)
        assert [token["id"] for token in found["tokens"]] == list(answers[0].ids)
        assert [token["log_probability"] for token in found["tokens"]] == pytest.approx(cost.change, abs=1e-4)


def test_a_file_is_never_replaced(talk, tmp_path, shown):
    path = tmp_path / "a.json"
    path.write_text("kept")
    for line in (PROMPT, f"/save {path}"):
        assert talk.take(line)
    assert path.read_text() == "kept" and str(path) in shown[-1]
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/cmpare -1 1", "/compare"),
        ("/", "/help"),
        ("/c", "/c"),
        ("/c mood", "number"),
        ("/c moood 1", "'mood'"),
        ("/c 1 2", "/compare"),
        ("/c 10.1", "10"),
        ("/c nan", "nan"),
        ("/c mood inf", "inf"),
        ("/c minus", "number"),
        ("/c mood x", "number"),
        ("/compare 1", "/compare"),
        ("/compare 1 1", "different"),
        ("/compare 1 x", "number"),
        ("/compare 0 11", "11"),
        ("/retry", "prompt"),
        ("/save a.json", "prompt"),
        ("/save", "file"),
        ("/save a b", "file"),
        pytest.param("rain " * 600, "512", id="long"),
        pytest.param("\ud800", "prompt", id="surrogate"),
    ],
)
def test_a_line_that_cannot_be_meant_gets_a_sentence_and_the_conversation_goes_on(talk, shown, line, named):
    assert talk.take(line)
    assert "error" in "".join(shown) and named in shown[-1] and len(shown[-1].splitlines()) == 1
    assert talk.rounds == [] and talk.compared == [] and talk.coefficients == {"mood": 0.0}
    assert talk.take(PROMPT) and len(talk.rounds) == 1


def test_names_are_needed_where_there_are_several(embedded, tokenizer, vector, shown):
    dials = Dials(embedded[0], vectors={"mood": vector, "other": vector})
    talk = Terminal(Chat(dials, tokenizer, max_new_tokens=4), "tiny", shown.append)
    talk.take("/c 1")
    assert "mood, other" in shown[-1] and talk.coefficients == {"mood": 0.0, "other": 0.0}
    for line in ("/c other 0.5", "/compare mood -1 1", PROMPT):
        talk.take(line)
    assert [reply.coefficients for reply in talk.rounds[0].replies] == [
        {"mood": -1.0, "other": 0.5},
        {"mood": 1.0, "other": 0.5},
    ]


def test_every_command_is_in_the_help(talk, shown):
    talk.take("/help")
    assert set(terminal.HELP) == {*talk._commands, "/quit"} and all(name in "".join(shown) for name in terminal.HELP)


def test_an_interrupt_keeps_what_is_there(talk, shown):
    def show(text):
        shown.append(text)
        if len(shown) == 4:
            raise KeyboardInterrupt

    talk._show = show
    assert talk.take(PROMPT)
    ((reply,),) = [one.replies for one in talk.rounds]
    assert (
        1 <= len(reply.answer.ids) < 8 and reply.answer.ended is None and len(reply.cost.kl) == len(reply.answer.ids)
    )


def test_text_cannot_steer_a_terminal():
    assert printable("a\x1b[2Jb\x07\x9b\u202ec\nd\té 😀") == "a\ufffd[2Jb\ufffd\ufffd\ufffdc\nd\té 😀"


@pytest.fixture
def vector_file(vector, tmp_path):
    vector.save(tmp_path / "mood.safetensors")
    return str(tmp_path / "mood.safetensors")


def test_piped_lines_are_answered_until_they_end(vector_file, tmp_path, monkeypatch, capsys):
    lines = ["/c -1", PROMPT, "/nothing", f"/save {tmp_path / 'a.json'}"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    cli.main(["chat", vector_file, "--model_name_or_path", "tiny", "--use_cpu", "--max_new_tokens", "5"])
    (told,) = json.loads((tmp_path / "a.json").read_text())["rounds"]
    assert told["answers"][0]["coefficients"] == {"mood": -1.0} and len(told["answers"][0]["tokens"]) == 5
    assert "> " not in capsys.readouterr().out


def test_quit_ends_before_the_other_lines(vector_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n/quit\n/save {tmp_path / 'a.json'}\n"))
    cli.main(["chat", vector_file, "--model_name_or_path", "tiny", "--use_cpu", "--max_new_tokens", "5"])
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--port", "7860"], "--web"),
        (["--host", "127.0.0.1"], "--web"),
        (["--web", "--host", "0.0.0.0"], "REPENG_API_KEY"),
        (["--web", "--port", "70000"], "--port"),
        (["--max_new_tokens", "0"], "max_new_tokens"),
        (["--temperature", "nan"], "temperature"),
        (["--seed", "-1"], "seed"),
        (["--gguf_file", "x.gguf"], "--model_name_or_path"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused(vector_file, monkeypatch, argv, named):
    monkeypatch.delenv("REPENG_API_KEY", raising=False)
    with pytest.raises(SystemExit, match=named):
        cli.main(["chat", vector_file, *argv])


def test_without_gradio_the_page_says_how_to_install_it(vector_file, monkeypatch):
    monkeypatch.setattr("repeng.cli.chat.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install 'gradio"):
        cli.main(["chat", vector_file, "--web", "--model_name_or_path", "tiny"])


@pytest.mark.parametrize("error, told", [(RuntimeError("no memory"), "no memory"), (KeyboardInterrupt(), "stopped")])
def test_what_ends_the_measuring_does_not_end_the_conversation(talk, shown, monkeypatch, error, told):
    talk.take(PROMPT)
    with monkeypatch.context() as patch:
        patch.setattr(talk.chat, "costs", lambda *_: (_ for _ in ()).throw(error))
        assert talk.take(PROMPT)
    assert told in shown[-1] and len(talk.rounds) == 1
    assert talk.take(PROMPT) and len(talk.rounds) == 2
