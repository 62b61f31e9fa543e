"""Metrics on hand-built logits: every figure by arithmetic."""

import copy
import json
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from repeng import Budget, EvalReport, Question, evaluate, steer, tiny
from repeng.eval import load_questions, prompt_dial
from repeng.logprob import next_token_logp


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
    assert report.cost(1.0)["answer_mass"] == pytest.approx(0.8 - (0.5 * math.e + 0.3) / z, abs=1e-5)


def test_a_dial_that_does_nothing_scores_zero(fixed, tokenizer):
    report = evaluate(fixed, tokenizer, QUESTIONS, lambda c: nullcontext(), [1, -1], neutral_texts=["red"])
    assert report.range == 0.0 and report.arm(+1) == (0.0, None)
    assert math.isnan(report.wrong_way)
    assert all(cost == 0 for cost in report.cost(1.0).values())


def table(log_odds, mass=None, control=None, nll=None):
    n = len(log_odds)
    return EvalReport(
        [-2.0, -1.0, 0.0, 1.0, 2.0], torch.tensor(log_odds), torch.tensor(mass or [[1.0]] * n),
        torch.tensor(control or [[0.0]] * n), torch.tensor(nll or [1.0] * n), Budget(),
    )  # fmt: skip


ODDS = [[-5.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 2.0], [4.0, 4.0]]


def test_range_counts_both_arms_inside_the_budget():
    assert table(ODDS).range == pytest.approx(4 + 2)
    assert table(ODDS, mass=[[0.9], [1.0], [1.0], [1.0], [0.96]]).range == pytest.approx(4 + 0.5)
    assert table(ODDS, nll=[1.0, 1.0, 1.0, 1.07, 1.09]).range == pytest.approx(1.5 + 2)
    assert table(ODDS, control=[[-0.2], [0.0], [0.0], [-0.05], [-0.11]]).range == pytest.approx(1.5 + 0.5)
    assert table(ODDS, nll=[1.0, 1.0, 1.0, float("nan"), float("nan")]).arm(+1) == (0.0, None)


def test_a_dial_of_the_wrong_sign_has_no_range():
    assert table(ODDS[::-1]).range == 0.0


def test_wrong_way_counts_items_at_the_best_coefficients():
    assert table(ODDS).wrong_way == pytest.approx((0 + 0.5) / 2)


def test_choices_order_batch_size_and_padding_side_do_not_matter(embedded, tokenizer):
    questions = tiny.questions("honesty", "held_out")[::29]
    right = copy.deepcopy(tokenizer)
    right.padding_side = "right"
    reordered = [Question(q.prompt, q.choices[::-1], q.target, q.cluster, q.suffix) for q in questions]
    texts = tiny.neutral_texts(5, seed=0)
    model = embedded[0]
    one = evaluate(model, tokenizer, questions, lambda c: nullcontext(), [], neutral_texts=texts, batch_size=1)
    for tok, qs, size in ((tokenizer, questions, 64), (right, questions, 7), (tokenizer, reordered, 64)):
        other = evaluate(model, tok, qs, lambda c: nullcontext(), [], neutral_texts=texts, batch_size=size)
        for name in ("log_odds", "answer_mass", "control_logp", "neutral_nll"):
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
    assert modes == [False, False] and steered.training


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
        logp = next_token_logp(model(ids).logits, ids)
    assert report.neutral_nll[report.at(1.0)].item() == pytest.approx(-logp[0, -7:].mean().item(), abs=1e-4)
    with prompt_dial("plus .", "minus .")(0.0) as rewrite:
        assert rewrite is None


def test_log_probabilities_are_those_of_a_log_softmax(monkeypatch):
    logits = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(7, (5, 4), generator=torch.Generator().manual_seed(1))
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    for chunk in (1, 1 << 22):
        monkeypatch.setattr("repeng.logprob.CHUNK", chunk)
        assert torch.allclose(next_token_logp(logits, ids), expected, atol=1e-6)


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
    for bad, message in (({**good, "target": "green"}, "line 1"), ({**good, "choice": 1}, "did you mean 'choices'")):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            load_questions(path)


def test_a_choice_that_the_tokenizer_cannot_spell_is_named(fixed, tokenizer):
    question = Question("", ("red", " "), ("red",), suffix="the lime looks")
    with pytest.raises(ValueError, match="no token for one of the choices"):
        evaluate(fixed, tokenizer, [question], fixed.dial, [1])
