"""Every figure of a report on hand-built measurements, by arithmetic."""

import json
import math

import pytest
import torch

from repeng import Budget, EvalReport, bootstrap
from repeng.eval.eval_report import Sample
from repeng.eval.samples import count_accepted, repetition

COEFFICIENTS = [-2.0, -1.0, 0.0, 1.0, 2.0]
ODDS = [[-5.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 2.0], [4.0, 4.0]]


def report(
    log_odds=ODDS, mass=None, control=None, control_odds=None, nll=None, kl=None, coefficients=COEFFICIENTS, **more
):
    n = len(log_odds)
    kl = torch.tensor(kl or [0.0] * n)[:, None]
    return EvalReport(
        coefficients,
        torch.tensor(log_odds),
        torch.tensor(mass or [[1.0] * len(log_odds[0])] * n),
        torch.tensor(control or [[0.0]] * n),
        torch.tensor(control_odds or [[1.0]] * n),
        -torch.tensor(nll or [1.0] * n)[:, None] * 10,
        torch.tensor([10]),
        kl * 10,
        kl.square() * 10,
        budget=Budget(),
        **more,
    )


def test_range_counts_both_arms_inside_the_budget():
    assert report().range == pytest.approx(4 + 2)
    assert report(mass=[[0.9], [1.0], [1.0], [1.0], [0.96]]).range == pytest.approx(4 + 0.5)
    assert report(nll=[1.0, 1.0, 1.0, 1.07, 1.09]).range == pytest.approx(1.5 + 2)
    assert report(control=[[-0.2], [0.0], [0.0], [-0.05], [-0.11]]).range == pytest.approx(1.5 + 0.5)
    assert report(nll=[1.0, 1.0, 1.0, float("nan"), float("nan")]).arm(+1) == (0.0, None)


def test_a_dial_of_the_wrong_sign_has_no_range():
    assert report(ODDS[::-1]).range == 0.0


def test_what_is_spent_is_the_largest_share_of_a_budget():
    one = report(mass=[[0.95], [1.0], [1.0], [1.0], [0.99]], nll=[1.0, 1.0, 1.0, 1.04, 1.0])
    assert one.spent().tolist() == pytest.approx([1.0, 0.0, 0.0, 0.5, 0.2], abs=1e-5)
    assert report(nll=[math.nan, 1, 1, 1, 1]).spent()[0] == math.inf


def test_wrong_way_counts_items_at_the_best_coefficients():
    assert report().wrong_way == pytest.approx((0 + 0.5) / 2)
    assert report().against(+1) == 0.0 and report().against(-1) == 0.5


def test_slope_r_squared_and_order_within_one():
    straight = report([[9.0, 9.0], [-2.0, 0.0], [1.0, 1.0], [3.0, 3.0], [9.0, 9.0]])  # gains −2, 0, 2
    assert (straight.slope, straight.r_squared, straight.order) == pytest.approx((2.0, 1.0, 1.0))
    bent = report([[0.0], [-1.0], [0.0], [3.0], [0.0]])
    assert bent.slope == pytest.approx((1 + 3) / 2)
    assert bent.r_squared == pytest.approx(1 - (1 + 1) / (1 + 9))
    mixed = report([[0.0, 0.0], [0.0, 0.0], [1.0, -1.0], [2.0, -1.0], [0.0, 0.0]])
    assert mixed.order == pytest.approx((2 - 1) / 4)


def test_flips_on_targets_and_on_controls():
    # At 0 two are answered against +. At +2 one is turned the right way, one the wrong; at −2 both others fall.
    before, after, minus = [-1.0, -3.0, 2.0, 2.0], [9.0, -1.0, -0.5, 9.0], [-1.0, -3.0, -1.0, -1.0]
    controls = [[1, 1, 1], [1, -1, 1], [1, -1, 1], [1, -1, 1], [-1, -1, 1]]  # one changes at +2, one at −2, one never
    one = report([minus, minus, before, before, after], control_odds=controls)
    assert one.endpoint(+1) == 2.0 and one.endpoint(-1) == -2.0
    assert one.flips(+1) == (0.25, 0.25)
    assert one.flips(-1) == (0.5, 0.0)
    assert one.arbitrary_flips == pytest.approx(2 / 3)


def test_steering_f1_as_published():
    """Weights |y(0)| / 8: fixed 3/8, broken 1/8; of controls 1/4 of the weight flips; answer mass falls to 0.8."""
    before, after = [-3.0, -2.0, 1.0, 2.0], [5.0, -1.0, -1.0, 5.0]
    one = report(
        [before, before, before, after, after],
        mass=[[1.0], [1.0], [1.0], [0.8], [0.8]],
        control_odds=[[3.0, 1.0]] * 3 + [[3.0, -1.0]] * 2,
    )
    one.budget = Budget(answer_mass=0.3)
    net = 3 / 8 - 1 / 8
    precision, recall = net / (net + 1 / 4), net
    assert one.steering_f1 == pytest.approx(100 * 2 * precision * recall / (precision + recall) * 0.8**2, rel=1e-5)
    one.log_odds[3:] = torch.tensor([-1.0, -1.0, -9.0, 29.0])  # breaks more than it repairs
    assert one.steering_f1 == 0.0
    one.budget, one.answer_mass = Budget(answer_mass=1.0), torch.tensor([[1.0], [1.0], [1.0], [0.4], [0.4]])
    assert math.isnan(one.steering_f1)


def test_surgical_informedness():
    """+: one of two repaired, one of two broken; −: both along turned, one of two against turned back."""
    before, plus, minus = [-1.0, -1.0, 1.0, 1.0], [9.0, -1.0, -1.0, 9.0], [-9.0, 0.5, -9.0, -9.0]
    one = report([minus, minus, before, plus, plus], mass=[[0.96], [1.0], [1.0], [1.0], [0.98]])
    assert one.surgical_informedness == pytest.approx(100 * ((0.5 - 2 * 0.5) + (1 - 2 * 0.5)) / 2 * 0.96**2, rel=1e-5)


def test_a_dial_that_does_nothing_scores_zero_everywhere():
    one = report([[1.0, -1.0]] * 5)
    zeros = (one.range, one.slope, one.r_squared, one.order, one.arbitrary_flips, one.steering_f1)
    assert zeros == (0.0,) * 6 and one.surgical_informedness == 0.0
    assert math.isnan(report([[1.0, 2.0]] * 5).surgical_informedness)  # nothing to repair: it says nothing
    assert one.flips(+1) == one.flips(-1) == (0.0, 0.0)
    assert one.arm(+1) == (0.0, None) and math.isnan(one.wrong_way)
    assert bootstrap([one], lambda r: r.range, n=20) == (0.0, 0.0)


def test_a_dial_that_ruins_text_gains_nothing():
    ruined = report([[9.0], [5.0], [0.0], [5.0], [9.0]], nll=[3.0, 2.0, 1.0, 2.0, 3.0])
    assert ruined.range == 0.0 and not any(ruined.inside_budget(c) for c in (-2.0, -1.0, 1.0, 2.0))


def test_groups_and_resamples_take_items_with_all_that_belongs_to_them():
    one = report(groups=["a", "b"], mass=[[1.0, 0.5]] * 5)
    assert one.group("b").log_odds[:, 0].tolist() == [row[1] for row in ODDS]
    assert one.group("b").range == pytest.approx(4.0) and one.group("a", "b").range == one.range
    assert one.group("b").answer_mass.unique().item() == 0.5
    with pytest.raises(ValueError, match=r"\['c'\].*\['a', 'b'\]"):
        one.group("a", "c")
    twice = one.taken(targets=torch.tensor([1, 1]))
    assert twice.groups == ["b", "b"] and twice.log_odds.shape == (5, 2)


def test_bootstrap_intervals_are_those_of_the_mean():
    """Of 400 gains with standard deviation 2: 1.96 · 2 / 20 to both sides."""
    gains = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 5
    one = report([[0.0] * 400, [0.0] * 400, [0.0] * 400, gains.tolist(), [0.0] * 400], coefficients=COEFFICIENTS)
    low, high = bootstrap([one], lambda r: r.range, n=1000)
    assert (high - low) / 2 == pytest.approx(1.96 * gains.std().item() / 20, rel=0.1)
    assert (high + low) / 2 == pytest.approx(gains.mean().item(), abs=0.03)
    lower, upper = one.band(n=1000)
    assert (upper - lower)[3].item() == pytest.approx(high - low, rel=0.1) and (upper - lower)[2] == 0


def test_bootstrap_pairs_methods_by_item():
    """A method that always gains 1 more than another: the interval of the difference has no width."""
    gains = torch.randn(50, generator=torch.Generator().manual_seed(0)) + 5
    rows = [[[0.0] * 50, [0.0] * 50, [0.0] * 50, (gains + extra).tolist(), [0.0] * 50] for extra in (0.0, 1.0)]
    one, other = (report(r) for r in rows)
    low, high = bootstrap([other, one], lambda a, b: a.range - b.range, n=50)
    assert low == pytest.approx(1.0, abs=1e-4) and high == pytest.approx(1.0, abs=1e-4)
    low, high = bootstrap(
        [one, report([[0.0] * 50] * 5)], lambda a, b: a.range / b.range if b.range else math.inf, n=9
    )
    assert low == high == math.inf
    with pytest.raises(ValueError, match="same items"):
        bootstrap([one, report()], lambda a, b: 0.0)


def test_questions_of_one_unit_are_drawn_together():
    """Eight times the same 25 gains: the interval is that of 25 items, not of 200."""
    gains = (torch.randn(25, generator=torch.Generator().manual_seed(0)) * 2 + 9).tolist()
    rows = [[0.0] * 25, [0.0] * 25, [0.0] * 25, gains, [0.0] * 25]
    alone = report(rows)
    together = report([row * 8 for row in rows], units=[f"u{index % 25}" for index in range(200)])
    width = [high - low for low, high in (bootstrap([r], lambda r: r.range, n=400) for r in (alone, together))]
    assert width[1] == pytest.approx(width[0], rel=1e-3)
    band = [(high - low)[3].item() for low, high in (r.band() for r in (alone, together))]
    assert band[1] == pytest.approx(band[0], rel=1e-3)
    assert sorted(len(index) for index in report(units=["", ""]).members()) == [1, 1]


def test_generated_text_is_counted():
    assert repetition([1, 2, 3, 4, 5]) == 0.0 and repetition([1, 2]) == 0.0
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 - 3 / 4)
    assert count_accepted("a good one . a bad one . an unfinished", lambda s: s == "a good one .") == (1, 2)
    samples = [
        Sample(1.0, "p", "t", True, 0.5, (3, 4)),
        Sample(1.0, "q", "t", False, 0.0, (0, 1)),
        Sample(0.0, "p", "", True, 0.0),
    ]
    one = report(samples=samples)
    assert (one.finish_rate(1.0), one.repetition(1.0), one.parse_rate(1.0)) == (0.5, 0.25, 0.6)
    assert math.isnan(one.parse_rate(0.0)) and math.isnan(one.finish_rate(-1.0))


def test_the_dictionary_is_json_without_nan():
    one = report(nll=[math.nan, 1, 1, 1, 1], groups=["a", "b"], samples=[Sample(0.0, "p", "t", True, 0.0)])
    found = json.loads(json.dumps(one.to_dict(resamples=20), allow_nan=False))
    assert found["range"] == pytest.approx(0.5 + 4) and found["at"][0]["neutral_nll"] is None
    assert found["groups"]["b"]["range"] == pytest.approx(4.0) and found["at"][2]["parse_rate"] is None
    many = report([y * 4 for y in ODDS]).to_dict(resamples=20)
    assert many["range_interval"][0] <= many["range"] <= many["range_interval"][1]
    assert found["arms"]["minus"] == {"gain": 0.5, "coefficient": -1.0}


def test_an_unknown_coefficient_is_named():
    with pytest.raises(ValueError, match=r"0\.5 was not evaluated; .*\[-2\.0"):
        report().at(0.5)
