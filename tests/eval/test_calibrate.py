"""Calibration: the solver on functions that are known, the KL against single rows, and the unit of c afterwards."""

import copy
import math
import random
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from peft import PeftModel

from repeng import Budget, Calibration, KLBudget, SteeringVector, calibrate, extract, steer, tiny
from repeng.eval.calibrate import generated_kl, set_units, solve
from repeng.model.generate import continuations
from repeng.model.tokens import encode

FOUND = Calibration(0.5, 2.0, {"plus": 1.0, "minus": 1.0}, {"kind": "KLBudget"})


@pytest.mark.parametrize("scale", [0.03, 1.0, 3.7])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_solver_finds_where_the_budget_is_spent(scale, sign):
    seen = []

    def spend(c):
        seen.append(c)
        return (c / (sign * scale)) ** 2 if c * sign > 0 else math.nan

    size, spent = solve(spend, sign, 8.0, 0.02)
    assert size == pytest.approx(scale, rel=0.011) and spent == pytest.approx(1.0, abs=0.02)
    assert len(seen) < 20


def test_the_solver_stays_inside_of_a_jump_and_below_the_largest_coefficient():
    size, spent = solve(lambda c: 0.5 if c < 2.3 else 5.0, 1, 8.0, 0.02)
    assert size == pytest.approx(2.3, rel=2e-3) and size < 2.3 and spent == 0.5
    assert solve(lambda c: 0.1 * c, 1, 4.0, 0.02) == (4.0, 0.4)
    assert solve(lambda c: math.nan if c > 1 else 0.2, 1, 4.0, 0.02)[0] == pytest.approx(1.0, rel=2e-3)
    calls = []
    with pytest.raises(ValueError, match="already exceeds the budget"):
        solve(lambda c: calls.append(c) or (7.0 if c else 0.0), 1, 8.0, 0.02)
    assert len(calls) < 20


def test_kl_is_that_of_single_rows(embedded, tokenizer, monkeypatch):
    """Left-padded batches of unequal prompts against one at a time, on the tokens that the steered model wrote."""
    model = embedded[0]
    vector = extract(model, tokenizer, tiny.pairs("mood", 24, 0), layers=[2], held_out=0)
    dial = partial(steer, model, vector=vector)
    prompts = ["today the weather seems", "the rain settles on", "two plus three is", "i open the door"]
    written = []

    def remembered(*args, **kwargs):
        found = continuations(*args, **kwargs)
        written.extend(found)
        return found

    monkeypatch.setattr(sys.modules["repeng.eval.calibrate"], "continuations", remembered)
    found = generated_kl(model, tokenizer, dial, prompts, 1.5, KLBudget(tokens=6, sequences=8), batch_size=3)
    assert len(written) == 8 and len({tuple(ids) for ids, _ in written[::4]}) == 2  # drawn twice, differently
    expected = []
    for prompt, (ids, end) in zip(prompts * 2, written, strict=True):
        row = encode(tokenizer, prompt).ids
        whole = torch.tensor([row + ids + ([] if end is None else [end])])
        with torch.no_grad():
            with dial(1.5):
                steered = model(whole).logits[0, len(row) - 1 : -1].log_softmax(-1)
            base = model(whole).logits[0, len(row) - 1 : -1].log_softmax(-1)
        expected.append((steered.exp() * (steered - base)).sum(-1))
    assert torch.allclose(found, torch.cat(expected), atol=1e-4)
    again = generated_kl(model, tokenizer, dial, prompts, 1.5, KLBudget(tokens=6, sequences=8), batch_size=3)
    assert torch.equal(again, found)
    assert generated_kl(model, tokenizer, dial, prompts, 0.0, KLBudget(sequences=4)).abs().max() < 1e-6


@pytest.mark.parametrize("trait, nats", [("mood", 0.5), pytest.param("honesty", 1.0, marks=pytest.mark.slow)])
def test_after_calibration_one_spends_the_budget_on_other_prompts(embedded, tokenizer, trait, nats):
    model = embedded[0]
    vector = extract(model, tokenizer, tiny.pairs(trait, 72, 0), layers=[2], held_out=0)
    asked = [q for split in ("train", "held_out") for q in tiny.questions(trait, split)]
    texts = [q.suffix for q in asked if q.kind == "target"]
    random.Random(0).shuffle(texts)
    budget = KLBudget(nats, tokens=8, sequences=96)
    found = calibrate(model, tokenizer, partial(steer, model, vector=vector), texts[::2], budget)
    assert found.budget == {"kind": "KLBudget", "nats": nats, "percentile": 95.0, "tokens": 8, "sequences": 96}
    calibrated = vector.calibrated(found.to_dict())
    for name, c in (("plus", 1.0), ("minus", -1.0)):
        assert found.spent[name] == pytest.approx(1.0, abs=0.02)
        kl = generated_kl(model, tokenizer, partial(steer, model, vector=calibrated), texts[1::2], c, budget)
        assert kl.quantile(0.95).item() == pytest.approx(nats, rel=0.1)


def test_a_budget_of_costs_is_met(embedded, tokenizer):
    model = embedded[0]
    vector = extract(model, tokenizer, tiny.pairs("honesty", 96, 0), layers=[2], held_out=0)
    questions = tiny.questions("honesty", "train")[::6]
    texts, budget = tiny.neutral_texts(16, 0), Budget(neutral_nll=0.05)
    dial = partial(steer, model, vector=vector)
    found = calibrate(model, tokenizer, dial, budget=budget, questions=questions, neutral_texts=texts, tolerance=0.05)
    assert 0.9 < found.spent["plus"] <= 1.05 and 0.9 < found.spent["minus"] <= 1.05
    assert found.budget["neutral_nll"] == 0.05


def test_what_a_budget_is_measured_on_must_be_given(embedded, tokenizer):
    with pytest.raises(ValueError, match="training prompts"):
        calibrate(*embedded, lambda c: None)
    with pytest.raises(ValueError, match="questions and neutral texts"):
        calibrate(*embedded, lambda c: None, ["a prompt"], Budget())


def logits(model, batch, c, **options):
    with torch.no_grad(), steer(model, c, **options):
        return model(batch).logits


def test_the_unit_of_an_adapter_is_stored_with_it(steered, embedded, batch, tmp_path):
    expected = {c: logits(steered, batch, own) for c, own in ((1.0, 0.5), (-1.0, -2.0), (0.5, 0.25), (-0.5, -1.0))}
    rows = logits(steered, batch, torch.tensor([0.5, -2.0, 0.0, 1.0]))
    zero = logits(steered, batch, 0.0)
    set_units(steered, FOUND)
    steered.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(embedded[0]), tmp_path).eval()
    for model in (steered, loaded):
        for c, value in expected.items():
            assert torch.allclose(logits(model, batch, c), value, atol=1e-5), c
        assert torch.allclose(logits(model, batch, torch.tensor([1.0, -1.0, 0.0, 2.0])), rows, atol=1e-5)
        assert torch.equal(logits(model, batch, 0.0), zero)
        with torch.no_grad():
            assert torch.allclose(model(batch).logits, expected[1.0], atol=1e-5)  # outside of any context
        assert model.peft_config["default"].calibration["minus"] == 2.0
    with steer(loaded, 1.0):
        merged = loaded.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(batch).logits, expected[1.0], atol=1e-3)


def test_calibrating_again_is_in_the_units_of_the_first(steered, batch):
    expected = logits(steered, batch, 0.25), logits(steered, batch, -4.0)
    set_units(steered, FOUND)
    set_units(steered, FOUND)
    assert torch.allclose(logits(steered, batch, 1.0), expected[0], atol=1e-5)
    assert torch.allclose(logits(steered, batch, -1.0), expected[1], atol=1e-5)


def test_a_new_adapter_of_the_same_configuration_is_not_calibrated(steered, batch):
    set_units(steered, FOUND)
    config = steered.peft_config["default"]
    steered.add_adapter("fresh", config.__class__(r=4, target_modules=["up_proj"], init_weights=False))
    config.init_bases = True
    steered.add_adapter("again", config)
    assert steered.peft_config["again"].calibration is None and config.calibration is not None
    assert steered.base_model.coefficients.setting("fresh", torch.device("cpu")).values.tolist() == [1.0]
    assert steered.base_model.coefficients.setting("default", torch.device("cpu")).values.tolist() == [0.5]


def test_bad_calibrations_are_refused(steered, embedded, tokenizer):
    model = steered.base_model
    with pytest.raises(ValueError, match="'plus' and 'minus'"):
        model.set_units({"plus": 1.0})
    for bad in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="positive"):
            model.set_units({"plus": 1.0, "minus": bad})
        with pytest.raises(ValueError, match="positive"):
            SteeringVector({("residual", 1): torch.ones(128)}).calibrated({"plus": bad, "minus": 1.0})
    with steer(steered, 1.0), pytest.raises(ValueError, match="leave the contexts"):
        set_units(steered, FOUND)


def test_the_unit_of_a_vector_is_stored_with_it(embedded, batch, tmp_path):
    model = embedded[0]
    vector = SteeringVector({("residual", 2): torch.linspace(-1, 1, 128)})
    calibrated = vector.calibrated(FOUND.to_dict())
    calibrated.save(tmp_path / "v.safetensors")
    loaded = SteeringVector.load(tmp_path / "v.safetensors")
    for c, own in ((1.0, 0.5), (-1.0, -2.0), (torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([0.5, -2, 0, 1]))):
        expected = logits(model, batch, own, vector=vector)
        assert torch.allclose(logits(model, batch, c, vector=calibrated), expected, atol=1e-5)
        assert torch.allclose(logits(model, batch, c, vector=loaded), expected, atol=1e-5)
    assert "c = 1 is 0.5" in loaded.describe()
    ablated = logits(model, batch, 1.0, vector=vector, operator="ablate")
    assert torch.equal(logits(model, batch, 1.0, vector=calibrated, operator="ablate"), ablated)


def test_what_is_computed_from_a_calibrated_vector_is_not_calibrated():
    plain = SteeringVector({("residual", layer): torch.ones(4) for layer in (1, 2)})
    one = plain.calibrated(FOUND.to_dict())
    assert one.calibrated(FOUND.to_dict()).metadata["calibration"]["minus"] == 4.0
    assert "calibration" in one.select(layers=[1, 2]).metadata
    for other in (2 * one, -one, one / 2, one + one, one.normalize(), one.random_like(0), one.select(layers=[1])):
        assert "calibration" not in other.metadata


def test_the_end_of_a_text_counts(embedded, tokenizer, monkeypatch):
    """A dial that makes texts end: where it says so is a token too, and a row may hold nothing else."""
    model, end, written = embedded[0], tokenizer.eos_token_id, []

    @contextmanager
    def dial(c):
        def stop(_module, _args, logits):
            logits = logits.clone()
            logits[..., end] += c
            return logits

        hook = model.lm_head.register_forward_hook(stop)
        yield
        hook.remove()

    def remembered(*args, **kwargs):
        written.extend(continuations(*args, **kwargs))
        return written[-len(args[2]) :]

    monkeypatch.setattr(sys.modules["repeng.eval.calibrate"], "continuations", remembered)
    prompts = ["the rain settles on", "two plus three is"]
    found = generated_kl(model, tokenizer, dial, prompts, 50.0, KLBudget(tokens=6, sequences=2))
    with torch.no_grad():
        logp = [model(torch.tensor([encode(tokenizer, p).ids])).logits[0, -1].log_softmax(-1)[end] for p in prompts]
    assert found.tolist() == pytest.approx([-value.item() for value in logp], rel=1e-3)
    written.clear()
    strength = -sum(value.item() for value in logp) / 2  # about every other step ends a text
    found = generated_kl(model, tokenizer, dial, prompts, strength, KLBudget(tokens=6, sequences=16))
    lengths = [len(ids) for ids, ended in written if ended is not None]
    assert max(lengths) > 0
    assert found.numel() == sum(len(ids) + (ended is not None) for ids, ended in written)


@pytest.mark.parametrize("wrong", [{"nats": 0}, {"percentile": 950}, {"sequences": 0}, {"tokens": 0}])
def test_a_budget_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="got KLBudget"):
        KLBudget(**wrong)
