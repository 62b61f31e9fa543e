"""The loss against arithmetic done by hand, its invariances, and its gradient."""

import math
import re
from pathlib import Path

import pytest
import torch

from repeng.train.inner_contrastive_loss import inner_contrastive_loss

DOCS = Path(__file__).parents[2] / "docs" / "loss_geometry.md"
B, T, D, K = 3, 5, 4, 2


def random_inputs(seed=0, dtype=torch.float64, b=B, spread=1.0):
    """Arguments of the loss, away from the kinks of relu with probability one."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype) * spread

    def mask(*shape):
        kept = torch.rand(*shape, generator=g) < 0.7
        kept[..., -1] = True
        return kept

    direction = torch.linalg.qr(normal(D, K)).Q
    return {
        "hs_pi": normal(2, 2, b, T, D),
        "hs_ref": normal(2, b, T, D),
        "hs_mask": mask(2, b, T),
        "logp_pi": -normal(2, b, T).abs(),
        "logp_ref": -normal(2, b, T).abs(),
        "logp_mask": mask(2, b, T),
        "neutral_logp_pi": -normal(2, b, T).abs(),
        "neutral_logp_ref": -normal(b, T).abs(),
        "neutral_mask": mask(b, T),
        "direction": direction,
        "scale": torch.tensor([1.5, 0.7], dtype=dtype),
        "gap_pi": normal(2, 2, b),
        "gap_ref": normal(2, b),
        "gap_weight": torch.rand(b, generator=g, dtype=dtype),
        "gap_unit": 1.0,
    }


POLICY = ("hs_pi", "logp_pi", "neutral_logp_pi", "gap_pi")


def worked_example():
    """One pair, one token, one direction of width 2; the numbers of docs/loss_geometry.md."""
    return {
        "hs_pi": torch.tensor([[[[[3.0, 1.0]]], [[[0.5, 0.0]]]], [[[[0.0, 0.0]]], [[[-5.0, 2.0]]]]]),
        "hs_ref": torch.tensor([[[[1.0, 0.0]]], [[[-1.0, 0.0]]]]),
        "hs_mask": torch.ones(2, 1, 1, dtype=torch.bool),
        "logp_pi": torch.tensor([[[-0.5, -2.0]], [[-1.0, -1.0]]]),
        "logp_ref": torch.tensor([[[-1.0, -1.5]], [[-1.0, -1.0]]]),
        "logp_mask": torch.ones(2, 1, 2, dtype=torch.bool),
        "neutral_logp_pi": torch.tensor([[[-1.0]], [[-1.3]]]),
        "neutral_logp_ref": torch.tensor([[-1.0]]),
        "neutral_mask": torch.ones(1, 1, dtype=torch.bool),
        "direction": torch.tensor([[1.0], [0.0]]),
        "scale": torch.tensor([2.0]),
        "gap_pi": torch.tensor([[[3.0], [3.0]], [[-5.0], [-2.0]]]),
        "gap_ref": torch.tensor([[1.0], [-1.0]]),
        "gap_weight": torch.tensor([0.8]),
        "gap_unit": 2.0,
        "separation_target": 1.0,
        "order_target": 2.0,
        "order_weight": 2.0,
        "coherence_margin": 0.1,
        "coherence_weight": 30.0,
    }


def test_worked_example_by_hand():
    result = inner_contrastive_loss(**worked_example())
    # Shifts in units of 2: plus chosen 1, rejected .75; minus chosen .5, rejected 2 (nothing for the excess).
    separation = (0 + 0.25 + 0.5 + 0) / 4
    # Only the second token of the chosen text falls, by .5: v = .4; its neighbour's gain of .5 does not help.
    coherence = ((0.4 + 0.16) / 2 + 0) / 2
    neutral = (0 + 0.2 + 0.04) / 2
    # Gaps move by 1 and 2 units of 2 at plus, by 3 (1 in excess) and 0.5 at minus.
    order = 0.8 * (0.5 + 0 + 0 + 0.75) / 4
    assert result.terms["separation"].item() == pytest.approx(separation)
    assert result.terms["order"].item() == pytest.approx(order)
    assert result.terms["coherence"].item() == pytest.approx(coherence)
    assert result.terms["neutral"].item() == pytest.approx(neutral)
    assert result.loss.item() == pytest.approx(separation + 2 * order + 30 * (coherence + neutral))


def test_documented_numbers_are_the_losses():
    """Every `name = number` of the worked example in the documentation is what the code gives."""
    text = DOCS.read_text(encoding="utf-8")
    section = text.split("## Worked numbers")[1].split("\n## ")[0]
    stated = {name: float(value) for name, value in re.findall(r"`(\w+) = (-?[\d.]+)`", section)}
    result = inner_contrastive_loss(**worked_example())
    given = {name: term.item() for name, term in result.terms.items()} | {"loss": result.loss.item()}
    assert stated.keys() == given.keys()
    for name, value in stated.items():
        assert value == pytest.approx(given[name], abs=1e-4), name


def test_gradcheck():
    fixed = random_inputs()
    leaves = [fixed.pop(name).requires_grad_() for name in POLICY]

    def loss(*tensors):
        return inner_contrastive_loss(**fixed, **dict(zip(POLICY, tensors, strict=True))).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_pads_have_no_value_and_no_gradient(side, poison):
    inputs = random_inputs()
    pad = torch.zeros(T, dtype=torch.bool)
    pad[: 2 if side == "left" else None] = True
    if side == "right":
        pad[:3] = False
    for name in ("hs_mask", "logp_mask", "neutral_mask"):
        inputs[name] = (~pad).expand_as(inputs[name]).clone()
    clean = inner_contrastive_loss(**inputs).loss
    for name in ("hs_pi", "hs_ref"):
        inputs[name] = inputs[name].masked_fill(pad[:, None], poison)
    for name in ("logp_pi", "logp_ref", "neutral_logp_pi", "neutral_logp_ref"):
        inputs[name] = inputs[name].masked_fill(pad, poison)
    leaves = {name: inputs[name].requires_grad_() for name in POLICY}
    poisoned = inner_contrastive_loss(**inputs).loss
    poisoned.backward()
    assert poisoned.item() == clean.item()
    for name, leaf in leaves.items():
        if name != "gap_pi":
            assert ((leaf.grad[..., pad, :] if name == "hs_pi" else leaf.grad[..., pad]) == 0).all(), name
        assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0, name


PAIR_AXIS = {
    "hs_pi": 2,
    "hs_ref": 1,
    "hs_mask": 1,
    "logp_pi": 1,
    "logp_ref": 1,
    "logp_mask": 1,
    "neutral_logp_pi": 1,
    "neutral_logp_ref": 0,
    "neutral_mask": 0,
    "gap_pi": 2,
    "gap_ref": 1,
    "gap_weight": 0,
}


def test_batch_of_two_is_the_mean_of_two_of_one():
    inputs = random_inputs(b=2)
    both = inner_contrastive_loss(**inputs)
    singles = [
        inner_contrastive_loss(
            **{name: x.narrow(PAIR_AXIS[name], i, 1) if name in PAIR_AXIS else x for name, x in inputs.items()}
        )
        for i in range(2)
    ]
    assert both.loss.item() == pytest.approx(sum(s.loss.item() for s in singles) / 2, rel=1e-12)
    for name, term in both.terms.items():
        assert torch.allclose(term, torch.cat([s.terms[name] for s in singles])), name


def test_swapping_the_sides_changes_nothing():
    """Chosen ↔ rejected together with plus ↔ minus; the direction then points the other way."""
    inputs = random_inputs()
    swapped = {
        **inputs,
        "hs_pi": inputs["hs_pi"].flip(0, 1),
        "hs_ref": inputs["hs_ref"].flip(0),
        "hs_mask": inputs["hs_mask"].flip(0),
        "logp_pi": inputs["logp_pi"].flip(0),
        "logp_ref": inputs["logp_ref"].flip(0),
        "logp_mask": inputs["logp_mask"].flip(0),
        "neutral_logp_pi": inputs["neutral_logp_pi"].flip(0),
        "direction": -inputs["direction"],
        "gap_pi": -inputs["gap_pi"].flip(0, 1),
        "gap_ref": -inputs["gap_ref"].flip(0),
    }
    one, other = inner_contrastive_loss(**inputs), inner_contrastive_loss(**swapped)
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-12)
    assert torch.allclose(one.terms["shift_plus"], other.terms["shift_minus"])
    assert torch.allclose(one.terms["gap_plus"], other.terms["gap_minus"])
    only_half = {**swapped, "direction": inputs["direction"]}
    assert inner_contrastive_loss(**only_half).loss.item() != pytest.approx(one.loss.item(), rel=1e-3)


@pytest.mark.parametrize("name, ref", [("logp_pi", "logp_ref"), ("neutral_logp_pi", "neutral_logp_ref")])
def test_one_tokens_ruin_is_not_paid_for_by_anothers_gain(name, ref):
    inputs = random_inputs()
    inputs["logp_mask"], inputs["neutral_mask"] = (torch.ones_like(inputs[m]) for m in ("logp_mask", "neutral_mask"))
    inputs[name] = inputs[ref].expand_as(inputs[name]).clone()
    inputs[name][0, 0, 0] -= 1.0
    ruined = inner_contrastive_loss(**inputs).loss.item()
    inputs[name][0, 0, 1:] += 5.0
    assert inner_contrastive_loss(**inputs).loss.item() == ruined
    inputs[name][0, 0, 0] += 1.0
    assert inner_contrastive_loss(**inputs).loss.item() < ruined


def test_inside_the_margin_costs_nothing_and_beyond_the_target_gains_nothing():
    inputs = {**random_inputs(), "separation_target": 1.0, "coherence_margin": 0.1, "order_target": 2.0}
    inputs["order_weight"], inputs["gap_weight"] = 3.0, torch.full_like(inputs["gap_weight"], 0.5)
    wanted = torch.tensor([1.0, -1.0])[:, None, None]
    inputs["gap_pi"] = inputs["gap_ref"] + 2.0001 * wanted
    for name, ref in (("logp_pi", "logp_ref"), ("neutral_logp_pi", "neutral_logp_ref")):
        inputs[name] = inputs[ref].expand_as(inputs[name]) - 0.09
    along = inputs["direction"] * inputs["scale"]
    away = torch.stack([along.sum(dim=1), -along.sum(dim=1)])[:, None, None, None]
    inputs["hs_pi"] = inputs["hs_ref"] + 1.0001 * away
    assert inner_contrastive_loss(**inputs).loss.item() == 0.0
    inputs["hs_pi"] = inputs["hs_ref"] + 50 * away
    assert inner_contrastive_loss(**inputs).loss.item() == 0.0
    inputs["hs_pi"] = inputs["hs_ref"] - 1.0 * away
    assert inner_contrastive_loss(**inputs).loss.item() == pytest.approx(2.0)
    inputs["gap_pi"] = inputs["gap_ref"] + 50 * wanted
    assert inner_contrastive_loss(**inputs).loss.item() == pytest.approx(2.0)
    inputs["gap_pi"] = inputs["gap_ref"] - 2.0 * wanted
    assert inner_contrastive_loss(**inputs).loss.item() == pytest.approx(2.0 + 3 * 0.5 * 2.0)


def test_at_the_reference_the_loss_is_one_and_pushes_apart():
    """At c·0 nothing is lost and nothing separated; the gradient moves plus and minus in opposite directions."""
    inputs = {**random_inputs(), "order_weight": 3.0}
    for name, ref in zip(POLICY, ("hs_ref", "logp_ref", "neutral_logp_ref", "gap_ref"), strict=True):
        inputs[name] = inputs[ref].expand_as(inputs[name]).clone()
    hs, gap = inputs["hs_pi"].requires_grad_(), inputs["gap_pi"].requires_grad_()
    result = inner_contrastive_loss(**inputs)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(1.0 + 3 * inputs["gap_weight"].mean().item())
    assert (gap.grad[0] < 0).all() and torch.equal(gap.grad[0], -gap.grad[1])
    plus, minus = hs.grad @ inputs["direction"]
    assert (plus[inputs["hs_mask"]] < 0).all() and torch.allclose(plus, -minus)


def test_terms_are_detached_and_one_for_each_pair():
    inputs = random_inputs()
    inputs["hs_pi"].requires_grad_()
    result = inner_contrastive_loss(**inputs)
    assert result.loss.requires_grad
    assert all(term.shape == (B,) and not term.requires_grad for term in result.terms.values())
    assert not math.isnan(result.loss.item())


@pytest.mark.parametrize(
    "name", ["hs_pi", "hs_mask", "logp_ref", "neutral_logp_ref", "neutral_mask", "gap_pi", "gap_ref", "gap_weight"]
)
def test_a_shape_that_would_broadcast_is_refused_by_name(name):
    inputs = random_inputs()
    short = name in ("hs_pi", "gap_weight")
    inputs[name] = inputs[name][:1] if short else inputs[name][:, :1]
    with pytest.raises(ValueError, match=name):
        inner_contrastive_loss(**inputs)
