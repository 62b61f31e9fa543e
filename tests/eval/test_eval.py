"""Metrics on hand-built logits: every figure by arithmetic."""

import copy
import json
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from repeng import Question, evaluate, steer, tiny
from repeng.data.questions import load_questions
from repeng.eval import measure
from repeng.eval.measure import Meter, prompt_dial
from repeng.model.logprob import head_logp


class Fixed(torch.nn.Module):
    """A "model" whose next-token distribution is given, wherever it is asked; `shift` adds to some logits."""

    def __init__(self, probabilities, size):
        super().__init__()
        self.device = torch.device("cpu")
        self.logits = torch.full((size,), 1e-9).log()
        for index, probability in probabilities.items():
            self.logits[index] = math.log(probability)
        self.shift = {}

    def forward(self, input_ids, **_):
        logits = self.logits.clone()
        for index, value in self.shift.items():
            logits[index] += value
        return SimpleNamespace(logits=logits.expand(*input_ids.shape, -1))

    @contextmanager
    def dial(self, c):
        before, self.shift = self.shift, {index: c * value for index, value in self.pull.items()}
        yield
        self.shift = before


@pytest.fixture
def fixed(tokenizer):
    ids = tokenizer.get_vocab()
    model = Fixed({ids["red"]: 0.5, ids["blue"]: 0.2, ids["green"]: 0.1, ids["five"]: 0.2}, len(tokenizer))
    model.pull = {ids["red"]: 1.0}
    return model


QUESTIONS = [
    Question("", ("red", "blue", "green"), ("red",), suffix="the lime looks"),
    Question("", ("five", "six"), ("five",), "control", suffix="two plus three is"),
]


def test_figures_of_a_known_distribution(fixed, tokenizer):
    report = evaluate(fixed, tokenizer, QUESTIONS, fixed.dial, [1, -1], neutral_texts=["red blue"])
    assert report.coefficients == [-1.0, 0.0, 1.0]
    assert report.mean_log_odds(0.0) == pytest.approx(math.log(0.5 / 0.3), abs=1e-5)
    assert report.mean_log_odds(1.0) == pytest.approx(math.log(0.5 / 0.3) + 1, abs=1e-5)
    assert report.answer_mass[report.at(0.0), 0].item() == pytest.approx(0.8, abs=1e-5)
    assert report.control_logp[report.at(0.0), 0].item() == pytest.approx(math.log(0.2), abs=1e-5)
    assert report.neutral_nll[report.at(0.0)].item() == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 2, abs=1e-5)
    z = 1 + 0.5 * (math.e - 1)
    assert report.cost(1.0)["control_logp"] == pytest.approx(math.log(z), abs=1e-5)
    assert report.cost(1.0)["answer_mass"] == pytest.approx(1 - (0.5 * math.e + 0.3) / z / 0.8, abs=1e-5)
    at = report.at(1.0)
    kl = 0.5 * math.e / z - math.log(z)  # of every token: that of one whose odds rise by e, from 0.5
    assert report.kl.tolist() == pytest.approx([report.kl[0].item(), 0.0, kl], abs=1e-5) and report.kl[1] == 0
    assert report.kl_rmse[at].item() == pytest.approx(kl, abs=1e-5)
    assert report.relative_mass[at].item() == pytest.approx((0.5 * math.e + 0.3) / z / 0.8, abs=1e-5)


def test_a_dial_that_does_nothing_scores_zero(fixed, tokenizer):
    report = evaluate(fixed, tokenizer, QUESTIONS, lambda c: nullcontext(), [1, -1], neutral_texts=["red"])
    assert report.range == 0.0 and report.arm(+1) == (0.0, None)
    assert math.isnan(report.wrong_way)
    assert all(cost == 0 for cost in report.cost(1.0).values())


def test_a_dial_that_acts_behind_the_head_is_seen(embedded, tokenizer):
    """It adds to the logits that the model gives: what the head makes of the states does not show it."""
    model, red = embedded[0], tokenizer.get_vocab()["red"]

    @contextmanager
    def dial(c):
        def add(_module, _args, out):
            out.logits = out.logits + c * torch.nn.functional.one_hot(torch.tensor(red), out.logits.shape[-1])
            return out

        hook = model.register_forward_hook(add) if c else None
        yield
        if hook:
            hook.remove()

    report = evaluate(model, tokenizer, QUESTIONS[:1], dial, [2], neutral_texts=tiny.neutral_texts(2, seed=0))
    assert report.mean_log_odds(2.0) - report.mean_log_odds(0.0) == pytest.approx(2.0, abs=1e-4)
    assert report.kl[report.at(2.0)] > 0 and report.kl[report.at(0.0)] == 0


def test_a_dial_is_tried_once_for_each_sign(embedded, monkeypatch):
    tried = []
    monkeypatch.setattr(measure, "can_share", lambda model, ids: tried.append(1) or False)
    meter = Meter(*embedded, QUESTIONS[:1], base=nullcontext)
    one, other = (lambda c: nullcontext()), (lambda c: nullcontext())
    counts = []
    for dial, c in (
        (one, 1.0),
        (one, 0.5),
        (one, 2.0),
        (one, 8.0),
        (one, -1.0),
        (one, -2.0),
        (other, -2.0),
        (one, 0.0),
    ):
        meter.at(dial, c)
        counts.append(len(tried))
    assert counts == [2, 2, 2, 3, 4, 4, 5, 5]  # the base was tried before


def test_choices_order_batch_size_and_padding_side_do_not_matter(embedded, tokenizer):
    questions = tiny.questions("honesty", "held_out")[::29]
    right = copy.deepcopy(tokenizer)
    right.padding_side = "right"
    reordered = [Question(q.prompt, q.choices[::-1], q.target, q.kind, q.suffix) for q in questions]
    texts = tiny.neutral_texts(5, seed=0)
    model = embedded[0]
    one = evaluate(model, tokenizer, questions, lambda c: nullcontext(), [], neutral_texts=texts, batch_size=1)
    for tok, qs, size in ((tokenizer, questions, 64), (right, questions, 7), (tokenizer, reordered, 64)):
        other = evaluate(model, tok, qs, lambda c: nullcontext(), [], neutral_texts=texts, batch_size=size)
        for name in ("log_odds", "answer_mass", "control_logp", "control_log_odds", "neutral_logp"):
            assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-4), name


def test_evaluation_switches_dropout_off_and_restores_the_mode(steered, tokenizer):
    modes = []

    @contextmanager
    def dial(c):
        modes.append(steered.training)
        with steer(steered, c):
            yield

    steered.train()
    evaluate(steered, tokenizer, QUESTIONS[:1], dial, [1])
    assert modes and not any(modes) and steered.training


def test_prompts_are_rewritten_and_neutral_text_counts_its_own_tokens_only(embedded):
    seen = []

    @contextmanager
    def dial(c):
        def rewrite(prompt):
            seen.append(prompt)
            return f"the speaker is honest . {prompt}".strip() if c else prompt

        yield rewrite

    report = evaluate(*embedded, QUESTIONS, dial, [1], neutral_texts=["the train moves along the rails ."])
    assert set(seen) == {""}
    model, tokenizer = embedded
    ids = torch.tensor([tokenizer("the speaker is honest . the train moves along the rails .")["input_ids"]])
    with torch.no_grad():
        logp = head_logp(model(ids).logits[0, :-1], nn.Identity(), ids[0, 1:])
    assert report.neutral_nll[report.at(1.0)].item() == pytest.approx(-logp[-7:].mean().item(), abs=1e-4)
    with prompt_dial("plus .", "minus .")(0.0) as rewrite:
        assert rewrite is None


def test_log_probabilities_are_those_of_a_log_softmax(monkeypatch):
    logits = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(7, (5, 4), generator=torch.Generator().manual_seed(1))
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    for chunk in (1, 1 << 22):
        monkeypatch.setattr("repeng.model.logprob.CHUNK", chunk)
        found = head_logp(logits[:, :-1].flatten(0, 1), nn.Identity(), ids[:, 1:].flatten())
        assert torch.allclose(found.view_as(expected), expected, atol=1e-6)


def test_bad_questions_are_refused(tmp_path, embedded, tokenizer):
    with pytest.raises(ValueError, match="some, not all"):
        Question("", ("red",), ("red",))
    with pytest.raises(ValueError, match="target, control"):
        Question("", ("red", "blue"), ("red",), "other")
    with pytest.raises(ValueError, match="different tokens"):
        evaluate(*embedded, [Question("", ("xyz", "zyx"), ("xyz",))], lambda c: nullcontext(), [])
    with pytest.raises(ValueError, match="target"):
        evaluate(*embedded, QUESTIONS[1:], lambda c: nullcontext(), [])
    path = tmp_path / "q.jsonl"
    good = {"suffix": "the lime looks", "choices": ["red", "blue"], "target": "red"}
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, "cluster": "control", "target": ["blue"]}))
    assert [q.target for q in load_questions(path)] == [("red",), ("blue",)]
    for bad, message in (
        ({**good, "target": "green"}, "line 1"),
        ({**good, "choice": 1}, "did you mean 'choices'"),
        ({**good, "choices": "red"}, "choices should be a valid list"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            load_questions(path)


def test_a_choice_that_the_tokenizer_cannot_spell_is_named(fixed, tokenizer):
    question = Question("", ("red", " "), ("red",), suffix="the lime looks")
    with pytest.raises(ValueError, match="this tokenizer has no token for"):
        evaluate(fixed, tokenizer, [question], fixed.dial, [1])


CHAT = (
    "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %} is <think>"
    "{% if not enable_thinking %} </think>{% endif %}{% endif %}"
)


@pytest.fixture
def thinker(tokenizer):
    """A random model and a tokenizer with a thinking template; `dial(1)` ends the thinking after two more words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    opened, tag = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])

    @contextmanager
    def dial(c):
        def end(_module, args, kwargs, out):
            out.logits = out.logits.clone()
            out.logits[..., tag] = -1e4
            if c > 0 and args_length(args, kwargs) == 1:  # not right behind the opening: a word of thought comes first
                out.logits[..., tag] = 1e4
            return out

        def args_length(args, kwargs):
            return (kwargs.get("input_ids") if kwargs.get("input_ids") is not None else args[0]).shape[1]

        hook = model.register_forward_hook(end, with_kwargs=True)
        yield
        hook.remove()

    return model, tokenizer, dial, (opened, tag)


def test_thinking_is_bounded_closed_and_counted(thinker):
    model, tokenizer, dial, (opened, tag) = thinker
    questions = [Question(text, ("red", "blue"), ("red",)) for text in ("the lime looks", "what colour is the apple")]
    report = evaluate(model, tokenizer, questions, dial, [1], think_tokens=5)
    assert report.thought.tolist() == [[False, False], [True, True]]
    ids = tokenizer.get_vocab()
    for c, length in ((0.0, 5), (1.0, 1)):
        for index, question in enumerate(questions):
            row = [*(ids[word] for word in question.prompt.split()), ids["is"], opened]
            with dial(c), torch.no_grad():
                for _ in range(length):
                    logits = model(torch.tensor([row])).logits[0, -1]
                    row.append(logits.argmax().item())
                logits = model(torch.tensor([[*row, tag]])).logits[0, -1]
            expected = (logits[ids["red"]] - logits[ids["blue"]]).item()
            assert report.log_odds[report.at(c), index].item() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="needs a prompt"):
        evaluate(model, tokenizer, QUESTIONS, dial, [1], think_tokens=5)
    with pytest.raises(ValueError, match="chat template has no </think>"):
        tokenizer.chat_template = None
        evaluate(model, tokenizer, questions, dial, [1], think_tokens=5)


def test_questions_that_cannot_be_asked_are_dropped_and_named(fixed, tokenizer):
    bad = Question("", ("xyz", "zyx"), ("xyz",), suffix="the lime looks")
    report = evaluate(fixed, tokenizer, [bad, *QUESTIONS], fixed.dial, [1])
    assert report.log_odds.shape == (2, 1) and report.control_logp.shape == (2, 1)
    assert len(report.dropped) == 1 and "question 0" in report.dropped[0] and "different tokens" in report.dropped[0]


def test_neutral_text_is_scored_on_the_same_tokens_whatever_the_dial(embedded, fixed, tokenizer):
    """Without a token for the beginning of a text its first token has nothing before it, unless a prompt is there."""
    text = "the train moves along the rails ."
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    dial = prompt_dial("the speaker is honest .", "the speaker is dishonest .")
    report = evaluate(embedded[0], bare, QUESTIONS[:1], dial, [1], neutral_texts=[text])
    assert report.neutral_tokens.tolist() == [6]
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHAT.replace(" is <think>", "").replace(" </think>", "")
    question = Question("what colour is the lime", ("red", "blue"), ("red",))
    report = evaluate(embedded[0], chat, [question], dial, [1], neutral_texts=[text])
    assert report.neutral_tokens.tolist() == [7]
    ids = [i for part in ("Write a short text.", text) for i in chat(part, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logp = head_logp(embedded[0](torch.tensor([ids])).logits[0, :-1], nn.Identity(), torch.tensor(ids[1:]))
    assert report.neutral_logp[report.at(0.0), 0].item() == pytest.approx(logp[-7:].sum().item(), abs=1e-3)


def test_generation_settings_of_the_model_do_not_leak_in(base, tokenizer):
    question = Question("", ("red", "blue"), ("red",), suffix="the rain settles on the")
    plain = evaluate(base, tokenizer, [question], lambda c: nullcontext(), [], sample_prompts=[question])
    before = base.generation_config = copy.deepcopy(base.generation_config)
    before.repetition_penalty, before.no_repeat_ngram_size = 5.0, 2
    again = evaluate(base, tokenizer, [question], lambda c: nullcontext(), [], sample_prompts=[question])
    assert again.samples == plain.samples and base.generation_config is before


def test_groups_come_from_the_questions(fixed, tokenizer, tmp_path):
    rows = [
        {"suffix": f"the {name} looks", "choices": ["red", "blue"], "target": "red", "group": name}
        for name in ("lime", "rain")
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = evaluate(fixed, tokenizer, load_questions(tmp_path / "q.jsonl"), fixed.dial, [1])
    assert report.groups == ["lime", "rain"]


def test_an_answer_of_several_tokens_counts_whole(embedded, tokenizer):
    """By the definition: the sum over its tokens, each behind the ones before it; the mass is that of the first."""
    model, suffix = embedded[0], "the lime looks"
    question = Question("", ("red .", "blue"), ("red .",), suffix=suffix)
    with pytest.warns(UserWarning, match="several tokens"):
        report = evaluate(model, tokenizer, [question], lambda c: nullcontext(), [])
    ids = tokenizer.get_vocab()
    row = [tokenizer.bos_token_id, *tokenizer(suffix, add_special_tokens=False)["input_ids"], ids["red"]]
    with torch.no_grad():
        first, second = model(torch.tensor([row])).logits[0, -2:].log_softmax(-1)
    assert report.log_odds.item() == pytest.approx(
        (first[ids["red"]] + second[ids["."]] - first[ids["blue"]]).item(), abs=1e-4
    )
    assert report.answer_mass.item() == pytest.approx(first[[ids["red"], ids["blue"]]].exp().sum().item(), abs=1e-5)
