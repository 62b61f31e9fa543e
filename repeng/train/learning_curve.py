"""The learning curve of a training run, as a figure. It needs the extra `plot`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from repeng.eval.report.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS_TERMS = ("separation", "order", "coherence", "neutral")
REACHED = ("shift_plus", "shift_minus", "gap_plus", "gap_minus")


def learning_curve(log: Sequence[Mapping[str, float]]) -> "Figure | None":
    """Terms of the loss, and shift and gap of both sides, per optimizer step; None if no step was logged."""
    rows = [row for row in log if "separation" in row]
    if not rows:
        return None
    figure = new_figure(11, 3.6)
    terms, reached = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    for axes, names in ((terms, LOSS_TERMS), (reached, REACHED)):
        for name in (name for name in names if name in rows[0]):
            axes.plot(steps, [row[name] for row in rows], marker=".", label=name.replace("_", " "))
        axes.set(xlabel="optimizer step")
    measured = [row for row in log if "eval_range" in row]
    if measured:
        held_back = [row["eval_range"] for row in measured]
        reached.plot([row["step"] for row in measured], held_back, "k--", label="range, held-back pairs")
    for axes in (terms, reached):
        axes.legend(fontsize=8)
    terms.set(title="Terms of the loss")
    reached.set(title="Shift and gap in units, range in nats")
    return figure
