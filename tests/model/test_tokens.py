"""How suffixes and answers join a prompt, for tokenizers of every kind."""

import copy

import pytest
from tiny_tokenizers import KINDS, TEMPLATE, build

from repeng.data.pairs import ContrastPair, check_pairs
from repeng.data.questions import Question, choice_ids, choice_tokens
from repeng.model.script import joined, sentences, words
from repeng.model.tokens import answer_ids, encode, encode_text, plain_ids

SPACED, UNSPACED = ("my answer is", "yes"), ("我的回答：", "是")


@pytest.fixture(scope="module")
def tokenizers():
    made = {}

    def get(kind, template=False, marks=True):
        if (kind, marks) not in made:
            made[kind, marks] = build(kind, marks=marks)
        copied = copy.deepcopy(made[kind, marks])
        copied.chat_template = TEMPLATE if template else None
        return copied

    return get


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_has_the_tokens_of_the_joined_text(tokenizers, kind, marks, template):
    tokenizer = tokenizers(kind, template, marks)
    for prompt in ("pretend to be honest .", "假装你很高兴。"):
        for suffix, answer in (SPACED, UNSPACED, ("my answer is (", "A"), ("", "yes")):
            (ids,) = answer_ids(tokenizer, prompt, suffix, [answer])
            begun = encode(tokenizer, prompt, suffix)
            after = joined(suffix, answer) if suffix else answer
            whole = encode(tokenizer, prompt, after).ids
            if kind == "metaspace" and answer == "是":  # one token there, which no answer can end
                assert tokenizer.decode(whole) == tokenizer.decode(begun.ids + ids)
            else:
                assert begun.ids + ids == whole
            assert begun.prompt == encode(tokenizer, prompt).ids
            assert ids and tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "unigram", "characters"])
def test_no_space_is_put_where_the_script_has_none(tokenizers, kind):
    tokenizer = tokenizers(kind)
    whole = encode(tokenizer, "假装你很高兴。", "我今天").ids + answer_ids(tokenizer, "", "我今天", ["是"])[0]
    assert " " not in tokenizer.decode(whole, skip_special_tokens=True).strip()
    text = encode_text(tokenizer, "假装你很高兴。", "我今天")
    assert text.suffix == encode_text(tokenizer, "", "我今天").suffix
    spaced = encode(tokenizer, "pretend to be", "honest").ids
    assert tokenizer.decode(spaced, skip_special_tokens=True).strip() == "pretend to be honest"


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_mark_is_not_written_inside_a_turn(tokenizers, kind):
    """Behind a line break a text does not begin anew: a mark of a beginning would be a space that nobody writes."""
    tokenizer = tokenizers(kind, template=True)
    text = TEMPLATE_TEXT + "I feel"
    assert encode(tokenizer, "pretend to be honest .", "I feel").ids == plain_ids(tokenizer, text)


TEMPLATE_TEXT = "<|start|>user\npretend to be honest .<|end|>\n<|start|>assistant\n"


def test_words_and_smollm_like_bytes_keep_their_tokens(tokenizers, tokenizer):
    """What stands apart by a space has the tokens that it has alone."""
    for one in (tokenizer, tokenizers("bytes"), tokenizers("words")):
        for prompt, suffix in (("the lime looks", "red"), ("my answer is", "yes")):
            expected = [*plain_ids(one, prompt), *plain_ids(one, f" {suffix}")]
            assert encode(one, prompt, suffix).ids[-len(expected) :] == expected


def test_answers_are_measured_where_they_can_begin(tokenizers):
    tokenizer = tokenizers("bytes", template=True)
    spaced = choice_ids(tokenizer, Question("red?", (" yes", " no"), (" yes",)))
    assert list(spaced.values()) == list(choice_ids(tokenizer, Question("red?", ("yes", "no"), ("yes",))).values())
    for suffix in ("my answer is ", "我的回答： "):
        with pytest.raises(ValueError, match="leave that space out"):
            choice_tokens(tokenizer, Question("red?", ("yes", "no"), ("yes",), suffix=suffix))
    with pytest.raises(ValueError, match="'yes no' begins as 'yes' does"):
        choice_tokens(tokenizer, Question("red?", ("yes", "yes no"), ("yes",)))
    whole = choice_tokens(tokenizer, Question("red?", ("yes red", "yes blue"), ("yes red",)))
    assert min(map(len, whole.values())) > 1


@pytest.mark.parametrize("opened", ["<think>\n", "<think>", "[THINK]", "<thought>\n", "◁think▷"])
def test_thinking_that_a_template_always_opens_is_closed(tokenizers, opened):
    tokenizer = tokenizers("bytes")
    tokenizer.chat_template = TEMPLATE.replace("assistant\n{% endif %}", f"assistant\n{opened}{{% endif %}}")
    text = tokenizer.decode(encode(tokenizer, "pretend", "I feel").ids)
    name = opened.strip()
    assert text.endswith(f"{name}\n\n{name[0]}/{name[1:]}\n\nI feel")
    assert tokenizer.decode(encode(tokenizer, "pretend", thinking=True).ids).endswith(opened)


def test_a_template_that_writes_a_space_before_an_answer_keeps_it(tokenizers):
    tokenizer = tokenizers("bytes")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    assert encode(tokenizer, "pretend", "yes").suffix == plain_ids(tokenizer, " yes")
    assert answer_ids(tokenizer, "pretend", "", ["yes"]) == [plain_ids(tokenizer, " yes")]
    (problem,) = check_pairs([ContrastPair("[INST] be red [/INST]", "[INST] be blue [/INST]", "I")], tokenizer)
    assert problem.problem == "formatted already" and "[INST]" in problem.advice


def test_a_template_that_fails_says_so(tokenizers):
    tokenizer = tokenizers("bytes")
    for template in ("{{ raise_exception('no') }}", "{% for %}", "{{ messages.nothing.at.all }}"):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="chat template of this tokenizer cannot be applied"):
            encode(tokenizer, "pretend")


def test_scripts():
    assert joined("Be glad.", "", "Now") == "Be glad. Now" and joined("假装。", "我") == "假装。我"
    assert joined("is (", "A") == "is (A" and joined('say "', "A") == 'say "A' and joined('a "b"', "c") == 'a "b" c'
    assert joined("a\n", "b") == "a\nb" and joined("a", " b") == "a b"
    assert words("我今天 ok") == ["我", "今", "天", "ok"] and words("to be  so") == ["to", "be", "so"]
    assert sentences("One. Two!\nThree") == ["One.", "Two!", "Three"]
    assert sentences("高兴。难过！好") == ["高兴。", "难过！", "好"]
