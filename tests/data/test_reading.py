"""Files of pairs, texts and questions: every form that is meant is read, every other is named, with its line."""

import gzip
import json

import pytest
from tiny_tokenizers import TEMPLATE, build

from repeng.data.files import load_texts
from repeng.data.pairs import ContrastPair, check_pairs, load_pairs, require_sound
from repeng.data.questions import load_questions
from repeng.data.task import hold_out

PAIR = {"chosen": "Be glad.", "rejected": "Be sad.", "suffix": "I"}
QUESTION = {"prompt": "Red?", "choices": ["yes", "no"], "target": "yes"}
LINE = json.dumps(PAIR)


def file_of(tmp_path, content, name="f.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.txt", "f.JSONL", "f"])
def test_a_form_is_told_by_what_a_file_holds(tmp_path, name):
    texts = ["one text", "another\u2028line\x85 of\u2029 it", "第三"]
    lists = json.dumps(texts, indent=1), json.dumps(texts)
    lines = "\r\n".join(json.dumps(text, ensure_ascii=False) for text in texts)
    objects = "".join(json.dumps({"text": text}) + "\n\n" for text in texts)
    for content in (*lists, lines, objects, "\ufeff" + lines):
        assert load_texts(file_of(tmp_path, content, name)) == texts
    for content in (f"[{LINE},\n{LINE}]", f"{LINE}\r\n\n{LINE}", f"\ufeff{LINE}\n{LINE}"):
        assert load_pairs(file_of(tmp_path, content, name)) == [ContrastPair(**PAIR)] * 2


def test_lines_of_text_are_left_as_they_are(tmp_path):
    lines = ['"Well," she said', "[INST] is a mark", "{name} went", "a\u2028b\x0cc"]
    assert load_texts(file_of(tmp_path, "\ufeff" + "\n".join(lines), "t.txt")) == lines


BAD = [
    (gzip.compress(b"x", mtime=0), "gzip"),
    (b"PAR1....", "Parquet"),
    (b"PK\x03\x04", "zip"),
    (LINE.encode("utf-16"), "UTF-16"),
    (LINE.encode("utf-16-le"), "UTF-16"),
    ("Sé".encode("latin-1"), "line 1: byte 0xe9.*UTF-8"),
    (b"\x80\x00\x01", "binary"),
    ("", "is empty"),
    (" \n ", "is empty"),
    ("[]", "no rows"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_files_of_another_kind_are_named(tmp_path, content, message):
    path = file_of(tmp_path, content)
    for load in (load_pairs, load_texts, load_questions):
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert "f.jsonl" in str(caught.value) and "\n" not in str(caught.value)


DEEP = "[" * 100_000
BAD_LINES = [
    ('{"chosen": "a", "chosen": "b", "rejected": "c"}', "'chosen' is given twice"),
    ('{"chosen": NaN, "rejected": "c"}', "NaN is not a JSON"),
    ('{"chosen": 1e999, "rejected": "c"}', "1e999"),
    ('{"chosen": ' + "9" * 5000 + ', "rejected": "c"}', "5000 digits"),
    ('{"chosen": "\\ud83d", "rejected": "c"}', r"half a character \(.ud83d"),
    ('{"chosen": ' + DEEP, "deep"),
    ('{"chosen": ' + "[" * 150 + "]" * 150 + "}", "deep"),
    ('{"chosen": "' + "x" * 2_000_000 + '"}', "2000014 characters"),
    ("{'chosen': 'a'}", "not JSON"),
    (LINE + LINE, "not JSON"),
    ('{"chosen": "a",}', "not JSON"),
    ("chosen,rejected\na,b", "not JSON"),
    ('{\n "chosen": "a"\n}', "not JSON"),
    ('{"chosen": "a", "rejected": "b", "sufix": "c"}', "did you mean 'suffix'"),
    ('{"chosen": "a", "rejected": "b", "suffix": null}', "suffix should be a text; got None"),
    ('{"chosen": "a", "rejected": "b", "suffix": "  "}', "'suffix' is blank"),
    ('{"chosen": "a", "rejected": "\u200b\u2060"}', "'rejected' is missing or"),
    ("3", "expected an object"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_row_of_pairs_that_is_none_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=rf"f\.jsonl, line 2.*{message}") as caught:
        load_pairs(file_of(tmp_path, f"{LINE}\n{line}"))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("a,b\nc,d", "t.csv", "CSV file by its name"),
        ('["a",\n"b"', "t.txt", "not JSON"),
        ('{"txt": "a"}', "t.txt", "did you mean 'text'"),
        ('{"text": "a", "label": 1}', "t.jsonl", "unknown key 'label'"),
        ('{"text": 3}', "t.jsonl", "text should be a text; got 3"),
        ("[1]", "t.json", "row 1.*got 1"),
        ("good\n\u200b\u200d", "t.txt", "line 2.*no visible characters"),
        ("plain", "t.json", "line 1 is not JSON"),
    ],
)
def test_texts_that_are_none_are_named(tmp_path, content, name, message):
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        load_texts(file_of(tmp_path, content, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "yse"}, "target 'yse' is not one of the choices.*did you mean 'yes'"),
        ({"target": []}, "target should"),
        ({"target": 1}, "target should"),
        ({"target": ["yes", "no"]}, "some, not all"),
        ({"target": ["yes", "yes"]}, "a list of different ones"),
        ({"choices": []}, "choices should hold two or more texts"),
        ({"choices": ["yes", 1]}, "choices.*a text"),
        ({"choices": ["yes", " yes "]}, "must be different texts; got 'yes' and ' yes '"),
        ({"choices": ["yes", "\u200b"]}, "visible texts"),
        ({"kind": "controll"}, "did you mean 'control'"),
        ({"history": ["Hello!"]}, "must end with a turn of the assistant"),
        ({"history": "Hello!"}, "history should be a valid list"),
        ({"prompt": " "}, "needs a prompt or a suffix"),
        ({"suffix": " "}, "suffix is blank"),
        ({"unit": 3}, "unit should be a text; got 3"),
        ({"grup": "g"}, "did you mean 'group'"),
    ],
)
def test_a_row_of_questions_that_is_none_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"f\.jsonl, line 1.*{message}"):
        load_questions(file_of(tmp_path, json.dumps({**QUESTION, **change})))


def test_a_question_that_is_there_twice_is_named(tmp_path):
    other = {**QUESTION, "unit": "u"}
    with pytest.raises(ValueError, match=r"line 2: this is the same question as .*line 1"):
        load_questions(file_of(tmp_path, f"{json.dumps(QUESTION)}\n{json.dumps(other)}"))


def test_pairs_that_a_reader_or_a_tokenizer_cannot_tell_apart_are_found(tokenizer):
    cases = {
        "sides that differ in spaces only": ("the honest one", "the  honest\u200b one"),
        "same tokens": ("the xyz is", "the zyx is"),
        "unknown words": ("the honest lime is", "the xyz zyx lime is"),
        "formatted already": ("<s> the honest lime is", "<s> the dishonest lime is"),
    }
    for problem, sides in cases.items():
        assert [p.problem for p in check_pairs([ContrastPair(*sides)], tokenizer)] == [problem]
    blind = build("bytes")
    blind.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"  # it drops what is said
    assert [p.problem for p in check_pairs([ContrastPair("red", "blue", "I")], blind)] == ["same tokens"]


def test_what_a_chat_template_would_hide_is_found():
    chat = build("bytes", template=True)
    finished = [TEMPLATE_OF.format(word) for word in ("red", "blue")]
    (found,) = check_pairs([ContrastPair(*finished, "I")], chat)
    assert found.problem == "formatted already" and "<|" in found.advice
    (found,) = check_pairs([ContrastPair("red? (A) yes (B) no (A", "red? (A) yes (B) no (B")], chat)
    assert found.problem == "answers in the prompt" and "'(A'" in found.advice
    assert check_pairs([ContrastPair("pretend to be red", "pretend to be blue")], chat) == []


TEMPLATE_OF = "<|start|>user\n{}<|end|>\n<|start|>assistant\n"
assert TEMPLATE_OF.split("{")[0] in TEMPLATE.replace("{{ m.role }}", "user").replace("\\n", "\n")


def test_sides_that_are_swapped_are_told(tokenizer):
    there = ContrastPair("the speaker is honest .", "the speaker is dishonest .", "the lime is")
    back = ContrastPair("the speaker is dishonest .", "the speaker is honest .", "the owl is")
    with pytest.warns(UserWarning, match=r"pairs 0 and 1 .*'honest' and 'dishonest'|'dishonest' and 'honest'"):
        require_sound([there, back], tokenizer)


def test_no_pair_is_lost_when_some_are_held_out():
    many = [ContrastPair(f"yes {i}", "no", f"suffix {i % 7}") for i in range(60)]
    few = [ContrastPair(f"yes {i}", "no", "common" if i else "rare") for i in range(20)]
    for pairs in (many, few, many[:2]):
        kept, held = hold_out(pairs)
        assert sorted(map(str, kept + held)) == sorted(map(str, pairs)) and kept and held
        assert not {pair.suffix for pair in kept} & {pair.suffix for pair in held}
    assert [pair.suffix for pair in hold_out(few)[1]] == ["rare"]
    with pytest.raises(ValueError, match="1 pair cannot"):
        hold_out(many[:1])
