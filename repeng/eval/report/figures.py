"""Figures of reports. They need the extra `plot`."""

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from repeng.eval.comparison import Comparison
from repeng.eval.curves import FIXED_COSTS, Method
from repeng.eval.eval_report import ARMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def svg(figure: "Figure") -> str:
    """The figure as SVG text. Equal figures give equal texts."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "repeng"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _style(name: str, comparison: Comparison) -> dict[str, Any]:
    """Line style of a method: the own method is emphasised, random directions are drawn faintly."""
    if name == comparison.own:
        return {"linewidth": 2.5, "zorder": 4, "color": "black"}
    if name == comparison.random:
        return {"linewidth": 1, "color": "0.6", "alpha": 0.8}
    return {"linewidth": 1.4, "alpha": 0.9}


def effect_and_cost(comparison: Comparison) -> "Figure":
    """Effect over cost for both arms: one curve per method and seed, a point for prompts."""
    figure = new_figure(11, 4.4)
    yardstick = [cost[0].item() for cost in comparison.yardstick()]
    for axes, (_, sign), whole in zip(figure.subplots(1, 2), ARMS, yardstick, strict=True):
        right = 1.6 * max(whole, *FIXED_COSTS)
        for name, method in comparison.methods.items():
            _draw_method(axes, method, sign, name, comparison)
        axes.axvline(whole, color="black", linestyle="--", linewidth=1, zorder=0)
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes.set(xlim=(0, right), xticks=[0, 0.02, *FIXED_COSTS], title=f"{'−+'[sign > 0]} arm")
        axes.set(xlabel="cost: KL from the base, nat per token of neutral text", ylabel="effect on log-odds, nats")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_method(axes: "Axes", method: Method, sign: int, name: str, comparison: Comparison) -> None:
    """Draw the curves of one method, those of the own method with a 95 % band; or the point of a discrete method."""
    style = _style(name, comparison)
    for seed, one in enumerate(method.curves(sign)):
        cost, effect = one.cost[0], one.effect[0]
        low, high = (one.effect[1:].quantile(share, dim=0) for share in (0.025, 0.975))
        label = name if seed == 0 else None
        if one.discrete:
            reach = [[max(0.0, (effect - low)[-1].item())], [max(0.0, (high - effect)[-1].item())]]
            axes.errorbar(cost[-1:], effect[-1:], yerr=reach, fmt="*", markersize=11, label=label, zorder=5)
            continue
        (line,) = axes.plot(cost, effect, marker=".", label=label, **style)
        style = {**style, "color": line.get_color()}
        if name == comparison.own:
            axes.fill_between(cost, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def dose_response(comparison: Comparison) -> "Figure":
    """Mean log-odds of the own method over the coefficient, with the 95 % band over items, and its cost."""
    figure = new_figure(11, 3.8)
    effect, cost = figure.subplots(1, 2)
    for report in comparison.reports[comparison.own]:
        c = report.coefficients
        low, high = report.band()
        (line,) = effect.plot(c, report.log_odds.mean(dim=1), marker=".", linewidth=2)
        effect.fill_between(c, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        cost.plot(c, report.kl, marker=".", label="mean over tokens")
        cost.plot(c, report.kl_rmse, marker=".", linestyle=":", label="root mean square")
    for axes in (effect, cost):
        for end in comparison.reports[comparison.own][0].operating or ():
            axes.axvline(end, color="black", linestyle="--", linewidth=1, zorder=0)
    effect.set(xlabel="coefficient c", ylabel="log-odds of the target answer, nats", title="Dose and response")
    cost.set(xlabel="coefficient c", ylabel="KL from the base, nat per token", title="Cost")
    cost.legend(fontsize=8)
    return figure


def probes(comparison: Comparison) -> "Figure | None":
    """Effects of each method at equal cost on the behaviour, on other behaviours and in other circumstances.

    None if there are no probes.
    """
    names = list(comparison.probes)
    columns = ["the behaviour", *dict.fromkeys(probe for name in names for probe in comparison.probes[name])]
    if len(columns) == 1:
        return None
    rows = [[_own_effect(comparison, name)] for name in names]
    for row, name in zip(rows, names, strict=True):
        row += [sum(comparison.probes[name].get(column, (math.nan, math.nan))) for column in columns[1:]]
    figure = new_figure(11, 1.6 + 0.5 * len(names))
    axes = figure.subplots()
    reach = max(abs(value) for row in rows for value in row if value == value) or 1.0
    image = axes.imshow(rows, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=25, ha="right")
    axes.set_yticks(range(len(names)), names)
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", color="w" if abs(value) > 0.6 * reach else "k")
    figure.colorbar(image, ax=axes, label="both arms, nats")
    return figure


def _own_effect(comparison: Comparison, name: str) -> float:
    """Sum of the effects of both arms at the endpoints of a method's first report."""
    report = comparison.reports[name][0]
    return sum(sign * (report.mean_log_odds(report.endpoint(sign)) - report.mean_log_odds(0.0)) for _, sign in ARMS)


def by_group(comparison: Comparison) -> "Figure | None":
    """The effect on each group of target questions at the endpoints of each method; None if there are no groups."""
    first = {name: reports[0] for name, reports in comparison.reports.items()}
    names = sorted(set(first[comparison.own].groups) - {""})
    if not names:
        return None
    figure = new_figure(11, 3.6)
    axes = figure.subplots()
    width = 0.8 / len(first)
    for index, (name, report) in enumerate(first.items()):
        places = [place + (index - (len(first) - 1) / 2) * width for place in range(len(names))]
        parts = [report.group(group) for group in names]
        heights = [
            sum(s * (part.mean_log_odds(part.endpoint(s)) - part.mean_log_odds(0.0)) for _, s in ARMS)
            for part in parts
        ]
        axes.bar(places, heights, 0.92 * width, label=name, alpha=1.0 if name == comparison.own else 0.65)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="effect at equal cost, nats", title="Groups of questions")
    axes.legend(fontsize=8)
    return figure
