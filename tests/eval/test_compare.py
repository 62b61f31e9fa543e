"""A comparison on the embedded model: equal costs, chance, kept baselines; and the cost by definition."""

import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support import some_questions

from repeng import evaluate, extract, steer, tiny
from repeng.data.arguments import TaskArguments
from repeng.data.pairs import ContrastPair
from repeng.eval import compare as module
from repeng.eval import measure
from repeng.eval.compare import MEAN_DIFF, PROMPTS, RANDOM, best_layer, compare, mean_differences, screened_layers
from repeng.eval.measure import prompt_dial
from repeng.eval.stored import load_reports, save_reports

TEXTS = ["the train moves along the rails .", "the guard opens the gate . the ship leaves ."]


@pytest.fixture(scope="module")
def task():
    whole = tiny.task(TaskArguments(positive="cheerful", negative="gloomy"), 0)
    return replace(
        whole,
        pairs=whole.pairs[:60],
        questions=some_questions(whole.questions, 24),
        unseen_neutral_texts=whole.unseen_neutral_texts[:8],
        probes={name: type(probe)(probe.plus[:6], probe.minus[:6]) for name, probe in whole.probes.items()},
    )


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as one:
        one.setattr(module, "screened_layers", lambda depth: [2])
        one.setattr(module, "RANDOM_DIRECTIONS", 2)
        yield one


@pytest.fixture(scope="module")
def dial(embedded, task):
    vector = extract(*embedded, task.pairs, layers=[2], held_out=0)
    return partial(steer, embedded[0], vector=vector)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("baselines")


@pytest.fixture(scope="module")
def found(embedded, task, dial, patch, cache):
    return compare(*embedded, task, dial, "mine", rivals={"backwards": lambda c: dial(-c)}, cache=cache)


def test_every_method_is_measured_near_the_same_costs(found):
    assert list(found.reports) == [PROMPTS, f"{MEAN_DIFF} (layer 2)", RANDOM, "mine", "backwards"]
    assert found.reports[PROMPTS][0].discrete and found.prompts == PROMPTS
    whole = [cost[0].item() for cost in found.yardstick()]
    for name in ("mine", "backwards", f"{MEAN_DIFF} (layer 2)"):
        (report,) = found.reports[name]
        for sign, target in ((1, whole[0]), (-1, whole[1])):
            end = report.endpoint(sign)
            assert end * sign > 0 and abs(math.log(report.kl[report.at(end)].item() / target)) < 0.5
        assert len(report.coefficients) <= 23


def test_a_dial_turned_around_is_as_bad_as_the_other_is_good(found):
    mine, other = (found.figures(name)["effect_at_0.1"].value for name in ("mine", "backwards"))
    assert mine > 5 and other == pytest.approx(-mine, rel=0.15)
    assert found.shortcomings() == []
    assert len(replace(found, own="backwards").shortcomings()) == 4
    assert found.times("mine", f"{MEAN_DIFF} (layer 2)").value == pytest.approx(1, abs=0.05)


def test_a_random_direction_is_within_its_interval_of_zero_at_every_cost(found):
    figures = found.figures(RANDOM)
    for name, figure in figures.items():
        if name.startswith("effect") and "plus" not in name and "minus" not in name:
            assert figure.low <= 0 <= figure.high, name


def test_what_is_looked_at_is_looked_at_where_it_costs_as_much(found):
    (report,) = found.reports["mine"]
    assert {s.coefficient for s in report.samples} == {report.endpoint(-1), 0.0, report.endpoint(1)}
    assert all(sample.base_nll > 0 for sample in report.samples)
    assert set(found.probes) == {PROMPTS, f"{MEAN_DIFF} (layer 2)", "mine", "backwards"}
    assert set(found.probes["mine"]) == {"honesty"}


def test_baselines_are_measured_once(found, embedded, task, dial, patch, cache):
    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(module, "measure_baselines", lambda *args: pytest.fail("measured again"))
        again = compare(*embedded, task, dial, "mine", cache=cache)
        assert again.figures("mine") == found.figures("mine") and again.probes["mine"] == found.probes["mine"]
        assert again.untrained == found.untrained
        other = replace(task, questions=task.questions[1:])
        with pytest.raises(pytest.fail.Exception):
            compare(*embedded, other, dial, "mine", cache=cache)
        (path,) = cache.glob("*.safetensors")
        reports, more = load_reports(path)
        reports[PROMPTS][0].log_odds[1] += 0.1  # as a base of another precision would have answered
        save_reports(path, reports, **more)
        with pytest.raises(pytest.fail.Exception):
            compare(*embedded, task, dial, "mine", cache=cache)
        path.write_bytes(b"broken")
        with pytest.raises(pytest.fail.Exception):
            compare(*embedded, task, dial, "mine", cache=cache)


def test_a_cache_that_cannot_be_written_costs_nothing(found, tmp_path):
    (tmp_path / "file").write_text("in the way")
    known = module.Baselines(found.reports, found.untrained, found.probes)
    with pytest.warns(UserWarning, match="baselines are not stored"):
        module._keep(tmp_path / "file" / "below", known)
    module._keep(tmp_path / "new" / "below", known)
    assert (tmp_path / "new" / "below").is_file()


def test_without_neutral_texts_nothing_is_begun(embedded, task, dial):
    with pytest.raises(ValueError, match="unseen_neutral_texts"):
        compare(*embedded, replace(task, unseen_neutral_texts=[]), dial)


def test_a_dial_that_rewrites_at_zero_is_measured_against_that(embedded):
    """A constant opening at every coefficient, 0 included, has no effect and no cost."""

    @contextmanager
    def dial(c):
        yield lambda prompt: f"the speaker is cheerful . {prompt}".strip()

    report = evaluate(*embedded, tiny.questions("mood", "held_out")[:3], dial, [1], neutral_texts=TEXTS)
    assert report.kl.tolist() == [0.0, 0.0] and torch.equal(report.log_odds[0], report.log_odds[1])


def test_the_best_layer_is_looked_for_beside_the_best_of_every_second_one(embedded, task, monkeypatch):
    merit, seen = {0: 0.0, 1: 1.0, 2: 2.0, 3: 5.0, 4: 3.0, 5: 1.0}, []

    def trace(meter, dial, targets, step):
        seen.append(dial.keywords["vector"])  # here a layer
        return seen[-1]

    def methods_of(reports, resamples):
        return {"": SimpleNamespace(both_at=lambda cost: [torch.tensor(merit[reports[""][0]])])}

    monkeypatch.setattr(module, "Meter", lambda *_, **__: SimpleNamespace(report=lambda points: points))
    monkeypatch.setattr(module, "trace", trace)
    monkeypatch.setattr(module, "methods_of", methods_of)
    assert best_layer(*embedded, task, {layer: layer for layer in merit}) == 3
    assert sorted(seen) == [0, 2, 3, 4, 5]


def test_the_layer_is_chosen_on_training_pairs(embedded, task):
    pairs = tiny.pairs("honesty", 120, seed=0)
    vectors = mean_differences(*embedded, pairs, [1, 2])  # at the first, the effect is less than half of the second's
    assert best_layer(*embedded, replace(task, pairs=pairs, questions=[]), vectors) == 2
    alike = [ContrastPair("the rain", "the rain", pair.suffix) for pair in pairs[:4]]
    assert best_layer(*embedded, replace(task, pairs=alike), {0: None, 3: None, 5: None}) == 3
    assert screened_layers(6) == [0, 1, 2, 3, 4, 5] and screened_layers(30) == list(range(6, 29, 2))
    assert len(screened_layers(80)) <= 12


@pytest.mark.parametrize("kept", [measure.KEPT, 0])
def test_the_cost_is_the_divergence_over_the_whole_vocabulary(embedded, dial, monkeypatch, kept):
    """By the definition, from whole logits, token by token; whether log-probabilities of the base are kept or not."""
    monkeypatch.setattr(measure, "KEPT", kept)
    model, tokenizer = embedded
    questions = tiny.questions("mood", "held_out")[:2]
    report = evaluate(model, tokenizer, questions, dial, [1.5], neutral_texts=TEXTS)
    kl = []
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            q = model(ids).logits[0, :-1].log_softmax(-1)
            with dial(1.5):
                p = model(ids).logits[0, :-1].log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
    at = report.at(1.5)
    assert report.kl[at].item() == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert report.kl_rmse[at].item() == pytest.approx(torch.cat(kl).square().mean().sqrt().item(), rel=1e-4)
    assert report.kl[report.at(0.0)] == 0 and report.neutral_tokens.tolist() == [len(part) for part in kl]


def test_prompts_cost_what_they_do_to_the_same_tokens(embedded):
    model, tokenizer = embedded
    opening = "the speaker is cheerful ."
    report = evaluate(
        model,
        tokenizer,
        tiny.questions("mood", "held_out")[:2],
        prompt_dial(opening, "the speaker is gloomy ."),
        [1],
        neutral_texts=TEXTS[:1],
    )
    own = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    before = tokenizer(opening, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        q = model(torch.tensor([[tokenizer.bos_token_id, *own]])).logits[0, :-1].log_softmax(-1)
        p = model(torch.tensor([[tokenizer.bos_token_id, *before, *own]])).logits[0, len(before) : -1].log_softmax(-1)
    assert report.kl[report.at(1.0)].item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
