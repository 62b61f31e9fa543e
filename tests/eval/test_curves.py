"""Effect at equal cost on hand-built measurements, by arithmetic."""

import math
from dataclasses import replace

import pytest
import torch
from test_eval_report import report

from repeng import bootstrap
from repeng.eval.comparison import RESAMPLES, Comparison
from repeng.eval.curves import Curve, Draws, Estimate, Method, methods_of, nearest

# Costs 0.04 and 0.16 on either side: their roots are 0.2 and 0.4.
KL = [0.16, 0.04, 0.0, 0.04, 0.16]
ODDS = [[-4.0], [-1.0], [0.0], [2.0], [4.0]]


def one_curve(cost, effect, discrete=False):
    return Curve(torch.tensor([cost]).double(), torch.tensor([effect]).double(), discrete)


def test_effects_are_read_linearly_in_the_root_of_the_cost():
    curve = one_curve([0.0, 0.04, 0.16], [0.0, 2.0, 4.0])
    found = [curve.effect_at(cost).item() for cost in (0.0, 0.01, 0.04, 0.09, 0.16)]
    assert found == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0])
    assert curve.effect_at(9.0).item() == 4.0  # the dial ends there
    assert curve.cost_at(3.0).item() == pytest.approx(0.09)
    assert curve.cost_at(4.1).item() == math.inf and curve.cost_at(0.0).item() == 0.0


def test_the_first_crossing_counts():
    there_and_back = one_curve([0.0, 0.04, 0.01, 0.16], [0.0, 2.0, 9.0, 4.0])
    assert there_and_back.effect_at(0.04).item() == pytest.approx(2.0)
    falling = one_curve([0.0, 0.04, 0.16], [0.0, 2.0, 1.0])
    assert falling.effect_at(0.16).item() == pytest.approx(1.0)  # not the best that was passed on the way
    assert falling.cost_at(1.5).item() == pytest.approx(0.15**2)
    ends_cheaper = one_curve([0.0, 0.04, 0.03], [0.0, 2.0, 3.0])
    assert ends_cheaper.effect_at(0.1).item() == 3.0  # its end, though that costs less than what was passed


def test_prompts_are_points():
    prompts = one_curve([0.0, 0.1], [0.0, 3.0], discrete=True)
    assert prompts.effect_at(0.1).item() == 3.0 and prompts.effect_at(0.3).item() == 3.0
    assert math.isnan(prompts.effect_at(0.05).item())
    several = one_curve([0.0, 0.1, 0.2, 0.4], [0.0, 3.0, 5.0, 6.0], discrete=True)
    assert several.effect_at(0.3).item() == 5.0 and several.effect_at(0.15).item() == 3.0
    assert prompts.cost_at(1.0).item() == pytest.approx(0.1) and prompts.cost_at(3.5).item() == math.inf


def test_a_dial_that_does_nothing_scores_zero_and_costs_nothing():
    idle = report([[1.0]] * 5, kl=[0.0] * 5)
    method = methods_of({"idle": [idle]}, 20)["idle"]
    assert method.both_at(0.1).tolist() == [0.0] * 21
    assert method.end(+1)[1].tolist() == [0.0] * 21
    assert method.cost_at(+1, 1.0)[0] == math.inf


def test_a_dial_that_ruins_text_gains_little_at_equal_cost():
    good, ruin = report(ODDS, kl=KL), report(ODDS, kl=[100 * cost for cost in KL])
    methods = methods_of({"good": [good], "ruin": [ruin]}, 20)
    assert methods["good"].both_at(0.04)[0].item() == pytest.approx(2 + 1)
    assert methods["ruin"].both_at(0.04)[0].item() == pytest.approx((2 + 1) / 10)
    broken = report(ODDS, kl=[math.nan, math.nan, 0.0, math.nan, math.nan])
    assert methods_of({"": [broken]}, 0)[""].both_at(0.04).tolist() == [0.0]


def test_two_wrong_dials_are_in_the_right_order():
    wrong = [report([[scale * -y[0]] for y in ODDS], kl=KL) for scale in (1, 2)]
    methods = methods_of({"wrong": wrong[:1], "worse": wrong[1:]}, 20)
    assert methods["wrong"].both_at(0.16)[0].item() == pytest.approx(-8)
    assert methods["worse"].both_at(0.16)[0].item() == pytest.approx(-16)


def test_rmse_tells_a_loop_from_an_even_change():
    """Two dials of equal mean: one spreads it over ten tokens, the other puts it all on one."""
    even, loop = report(ODDS, kl=KL), report(ODDS, kl=KL)
    loop.neutral_kl_squared = 10 * even.neutral_kl_squared
    methods = methods_of({"even": [even], "loop": [loop]}, 20)
    assert methods["even"].both_at(0.04)[0] == methods["loop"].both_at(0.04)[0]
    assert loop.kl_rmse[4].item() == pytest.approx(math.sqrt(10) * 0.16) and even.kl_rmse[4].item() == pytest.approx(
        0.16
    )
    assert methods["loop"].both_at(0.04, "rmse")[0] < methods["even"].both_at(0.04, "rmse")[0]


def test_draws_pair_methods_by_unit_text_and_seed():
    """Twice the other's effect on every item: the ratio has no width, whatever is drawn."""
    odds = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)) + torch.tensor(ODDS)
    odds[2] = 0
    one = report(odds.tolist(), kl=KL, units=[f"u{i % 7}" for i in range(30)])
    two = report((2 * odds).tolist(), kl=KL, units=[f"u{i % 7}" for i in range(30)])
    methods = methods_of({"one": [one], "two": [two]}, 100)
    ratio = Estimate.of(methods["two"].both_at(0.1) / methods["one"].both_at(0.1))
    assert ratio == pytest.approx((2.0, 2.0, 2.0))
    assert methods["one"].both_at(0.1).std() > 0
    draws = Draws.of(one, 100)
    assert draws.units.shape == (101, 7) and draws.units.sum(dim=1).unique().tolist() == [7.0]
    with pytest.raises(ValueError, match="same items"):
        methods_of({"one": [one], "other": [report(ODDS, kl=KL)]})


def test_seeds_widen_the_interval_and_share_their_draws():
    apart = [report([[scale * y[0]] for y in ODDS], kl=KL) for scale in (1, 2, 3)]
    method = methods_of({"": apart}, 300)[""]
    figure = Estimate.of(method.both_at(0.16))
    assert figure.value == pytest.approx(16) and figure.low < 12 and figure.high > 20
    assert torch.equal(Method(apart, method.draws).both_at(0.16), method.both_at(0.16))


def test_a_mirrored_dial_does_the_opposite():
    one = report(ODDS, kl=[0.25, *KL[1:]])
    other = one.mirrored()
    assert other.coefficients == one.coefficients
    methods = methods_of({"one": [one], "other": [other], "both": [one, other]}, 100)
    assert methods["other"].effect_at(+1, 0.04)[0] == pytest.approx(-1.0)
    assert methods["other"].effect_at(-1, 0.04)[0] == pytest.approx(-2.0)
    figure = Estimate.of(methods["both"].both_at(0.04))
    assert figure.value == pytest.approx(0.0)
    assert other.kl.tolist() == pytest.approx([0.16, 0.04, 0.0, 0.04, 0.25])
    uneven = replace(one, coefficients=[-2.0, -1.0, 0.0, 1.0, 3.0], operating=(-2.0, 1.0)).mirrored()
    assert uneven.coefficients == [-3.0, -1.0, 0.0, 1.0, 2.0] and uneven.operating == (-1.0, 2.0)


def test_of_chance_the_interval_is_where_a_single_one_may_lie():
    """One of three directions does 3 nats: a mean of them would hide it, an interval of single ones does not."""
    group = [report([[0.0]] * 5, kl=KL), report([[0.0]] * 5, kl=KL), report(ODDS, kl=KL)]
    mean, single = (methods_of({"x": group}, 400, chance)["x"] for chance in (None, "x"))
    assert mean.both_at(0.04)[0] == single.both_at(0.04)[0] == pytest.approx(1.0)
    assert Estimate.of(single.both_at(0.04)) == pytest.approx((1.0, 0.0, 3.0))
    assert single.largest_at(+1, 0.04).unique().tolist() == pytest.approx([2.0])
    assert 0 < single.both_at(0.04)[1:].eq(3.0).double().mean() < 0.5


def test_chance_may_not_do_as_much():
    """It does as much as the method in one direction of ninety, less often than an interval of 95 % sees."""
    noise = [report([[0.0] * 8] * 5, kl=KL) for _ in range(89)] + [report([y * 8 for y in ODDS], kl=KL)]
    assert len(compared(noise=noise).shortcomings()) == 2


def test_few_questions_are_said():
    assert "only 1 units of questions" in Comparison({"mine": [report(ODDS, kl=KL)]}, "mine").verdict
    many = report([y * 9 for y in ODDS], kl=KL)
    alone = Comparison({"mine": [many]}, "mine")
    assert "only" not in alone.verdict and "0.100 nat" in alone.verdict and alone.where == "0.1 nat"


def test_prompts_that_cost_nothing_leave_the_plain_yardstick():
    free = prompts(cost=0.0)
    assert compared(prompts=[free]).yardstick()[0].unique().tolist() == [0.1]


def test_the_nearest_measured_cost():
    one = report(ODDS, kl=KL)
    assert nearest(one, +1, 0.05) == 1.0 and nearest(one, -1, 0.1) == -2.0
    assert nearest(report(ODDS, kl=[0.0] * 5), +1, 0.05) == 0.0


def prompts(effect=3.0, cost=0.04):
    return report(
        [[-effect] * 8, [0.0] * 8, [effect] * 8],
        kl=[cost, 0.0, cost],
        coefficients=[-1.0, 0.0, 1.0],
        discrete=True,
        operating=(-1.0, 1.0),
    )


def compared(**more):
    reports = {
        "mine": [report([y * 8 for y in ODDS], kl=KL)],
        "prompts": [prompts()],
        "vector": [report([[y[0] / 2] * 8 for y in ODDS], kl=KL)],
        "noise": [report([[0.0] * 8] * 5, kl=KL), report([[0.0] * 8] * 5, kl=KL)],
    }
    return Comparison({**reports, **more}, "mine", prompts="prompts", random="noise", untrained="vector")


def test_figures_are_at_the_cost_of_the_prompts():
    found = compared().figures("mine")
    assert found["effect"].value == pytest.approx(3)
    assert found["effect_plus"].value == pytest.approx(2)
    assert found["effect_at_0.1"].value == pytest.approx(2 + 1 + (math.sqrt(0.1) - 0.2) / 0.2 * (2 + 3))
    assert found["cost_at_prompt_effect_plus"].value == pytest.approx(0.09)
    assert found["cost_at_prompt_effect_minus"].value == pytest.approx((0.2 + 0.2 * 2 / 3) ** 2)
    assert compared().times("mine", "vector").value == pytest.approx(2)
    assert compared().times("mine", "prompts").value == pytest.approx(0.5)
    assert "prompts is 6.00 nats (ratio 0.50 [0.50, 0.50])" in compared().verdict
    assert "vector is 1.50 nats (ratio 2.00 [2.00, 2.00])" in compared().verdict


def test_what_the_report_says_follows_the_measurements_not_the_names():
    one = compared()
    swapped = compared(mine=one.reports["vector"], vector=one.reports["mine"])
    assert swapped.figures("mine") == one.figures("vector") and swapped.figures("vector") == one.figures("mine")
    assert swapped.times("mine", "vector").value == pytest.approx(0.5)


def test_shortcomings_name_what_is_missing():
    assert compared().shortcomings() == []
    idle = compared(mine=[report([[0.0] * 8] * 5, kl=KL)]).shortcomings()
    assert len([reason for reason in idle if "random direction" in reason]) == 2
    moves = [[-4.0, 1.0], [-1.0, 1.0], [0.0, 0.0], [9.0, -1.0], [9.0, -1.0]]
    against = report([y * 4 for y in moves], kl=KL, operating=(-1.0, 1.0))
    assert any("50.0%" in reason for reason in compared(mine=[against]).shortcomings())


def test_over_very_few_units_nothing_is_claimed():
    """Two questions of one held-out pair agree to the last digit, which is no evidence."""

    def of(units):
        noise = [report([[y[0] / 2] * len(units) for y in ODDS], kl=KL, units=units)]
        mine = [report([y * len(units) for y in ODDS], kl=KL, units=units)]
        return Comparison({"mine": mine, "noise": noise}, "mine", random="noise")

    one, five, six = of(["pair"] * 8), of([f"u{i}" for i in range(5)]), of([f"u{i}" for i in range(6)])
    assert six.shortcomings() == [] and not math.isnan(six.figures("mine")["effect"].low)
    for few, n in ((one, 1), (five, 5)):
        assert any(f"{n} units" in reason for reason in few.shortcomings()) and "[" not in few.verdict
        assert all(math.isnan(figure.low) for figure in few.figures("mine").values())
        report_of = few.reports["mine"][0]
        assert report_of.to_dict()["range_interval"] == [None, None] and report_of.band()[0].isnan().all()
    assert math.isnan(bootstrap(one.reports["mine"], lambda r: r.range, n=10)[0])


def test_answers_that_the_model_never_gives_are_said():
    mass = [[1e-6] * 8] * 5
    rare = compared(mine=[report([y * 8 for y in ODDS], kl=KL, mass=mass)])
    assert "only 1e-06" in rare.verdict and any("only 1e-06" in reason for reason in rare.shortcomings())
    assert "probability" not in compared().verdict


def test_without_prompts_the_yardstick_is_a_tenth_of_a_nat():
    alone = Comparison({"mine": [report(ODDS, kl=KL)]}, "mine")
    plus, minus = alone.yardstick()
    assert plus.shape == (1 + RESAMPLES,) and plus.unique().item() == minus.unique().item() == 0.1
    assert "cost_at_prompt_effect_plus" not in alone.figures("mine")
    with pytest.raises(ValueError, match="neutral_texts"):
        silent = report(ODDS, kl=KL)
        silent.neutral_tokens = torch.tensor([0])
        methods_of({"": [silent]})


def test_metrics_of_moral_maps():
    """On: half of the log-odds between the ends; off: half of the controls'; gated by the answer mass squared."""
    one = report(
        [[-3.0, 1.0], [0.0, 0.0], [1.0, -1.0], [0.0, 0.0], [3.0, 1.0]],
        mass=[[0.8], [1.0], [1.0], [1.0], [0.9]],
        control_odds=[[1.0], [1.0], [1.0], [1.0], [-1.0]],
        operating=(-2.0, 2.0),
    )
    assert one.selectivity_gated == pytest.approx(((3 + 1 - (-3 + 1)) / 2 / 2 - 0.1 * 2 / 2) * 0.8**2)
    assert one.si_flips == pytest.approx(1.0 - 0.5)
    one.answer_mass = 2 * one.answer_mass  # more mass than the base's is no merit
    one.answer_mass[2] = 1.0
    assert one.selectivity_gated == pytest.approx(1.5 - 0.1)
