"""Pictures of reports; they need matplotlib (`pip install 'repeng[plot]'`)."""

import io
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from repeng.eval.eval_report import EvalReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 2.0  # coefficients up to which a dose is drawn


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
    """The figure as SVG text, the same for the same figure."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "repeng"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _style(name: str, own: str | None) -> dict:
    """One's own method stands out."""
    return {"linewidth": 2.5, "zorder": 3} if name == own else {"linewidth": 1.2, "alpha": 0.8}


def dose_response(reports: Mapping[str, EvalReport], own: str | None = None) -> "Figure":
    """Mean log-odds over the coefficient, with 95 % bands over items; and what `own` spends of the budget."""
    figure = new_figure(11, 4.2)
    effect, cost = figure.subplots(1, 2)
    for name, report in reports.items():
        _draw_dose(effect, report, name, own)
    shown = reports[own] if own is not None and own in reports else next(iter(reports.values()))
    effect.set(xlabel="coefficient c", ylabel="log-odds of the target answer, nats", title="Target")
    effect.legend(fontsize=8)
    for name, values in shown.costs().items():
        shares = values / getattr(shown.budget, name)
        cost.plot(shown.coefficients, shares, marker=".", label=name.replace("_", " "))
    cost.axhline(1.0, color="black", linestyle="--", linewidth=1, label="budget")
    cost.set(xlabel="coefficient c", ylabel="cost as a share of its budget", title="Coherence")
    cost.set_ylim(-0.5, 3)
    cost.legend(fontsize=8)
    for axes in (effect, cost):
        shade_outside(axes, shown)
    return figure


def _draw_dose(axes: "Axes", report: EvalReport, name: str, own: str | None) -> None:
    drawn = [index for index, c in enumerate(report.coefficients) if abs(c) <= SHOWN]
    c = [report.coefficients[index] for index in drawn]
    low, high = (bound[drawn] for bound in report.band())
    (line,) = axes.plot(c, report.log_odds[drawn].mean(dim=1), marker=".", label=name, **_style(name, own))
    axes.fill_between(c, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def shade_outside(axes: "Axes", report: EvalReport) -> None:
    """Grey out the coefficients outside the budget, each as far as half-way to its neighbours."""
    c, spent = report.coefficients, report.spent().tolist()
    edges = [c[0], *((a + b) / 2 for a, b in itertools.pairwise(c)), c[-1]]
    for index, share in enumerate(spent):
        if share > 1 and abs(c[index]) <= SHOWN:
            axes.axvspan(edges[index], edges[index + 1], color="0.88", linewidth=0, zorder=0)


def pareto(reports: Mapping[str, EvalReport], own: str | None = None) -> "Figure":
    """Effect against coherence: what each arm of each method gains over how much of the budget it has spent."""
    figure = new_figure(11, 4.2)
    for axes, sign, title in zip(figure.subplots(1, 2), (+1, -1), ("+ arm", "− arm"), strict=True):
        for name, report in reports.items():
            spent, means = report.spent().clamp(0, 3), report.log_odds.mean(dim=1)
            order = sorted(
                (index for index, c in enumerate(report.coefficients) if c * sign >= 0),
                key=lambda index, r=report: abs(r.coefficients[index]),
            )
            gains = sign * (means - means[report.at(0.0)])
            axes.plot(spent[order], gains[order], marker=".", label=name, **_style(name, own))
        axes.axvspan(1.0, 3.0, color="0.9", linewidth=0, zorder=0)
        axes.set(xlabel="budget spent", ylabel="gain in mean log-odds, nats", title=title, xlim=(0, 3))
    figure.axes[0].legend(fontsize=8)
    return figure


def by_group(reports: Mapping[str, EvalReport], own: str | None = None) -> "Figure | None":
    """Range of each group of target questions, a bar a method; None where there are no groups."""
    names = sorted(set(next(iter(reports.values())).groups) - {""})
    if not names:
        return None
    figure = new_figure(11, 3.6)
    axes = figure.subplots()
    width = 0.8 / len(reports)
    for index, (name, report) in enumerate(reports.items()):
        places = [place + (index - (len(reports) - 1) / 2) * width for place in range(len(names))]
        heights = [report.group(group).range for group in names]
        axes.bar(places, heights, 0.92 * width, label=name, alpha=1.0 if name == own else 0.65)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="range inside the budget, nats", title="Groups of questions")
    axes.legend(fontsize=8)
    return figure
