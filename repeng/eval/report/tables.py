"""Reports as tables for a terminal, a CSV file or Markdown."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from repeng.data.files import written_whole
from repeng.eval.comparison import Comparison
from repeng.eval.curves import FIXED_COSTS, Estimate
from repeng.eval.eval_report import ARMS, EvalReport


def summary(comparison: Comparison, name: str) -> dict[str, str]:
    """The figures of one method as text, by column."""
    figures, reports = comparison.figures(name), comparison.reports[name]

    def mean(value: Callable[[EvalReport], float]) -> float:
        return sum(map(value, reports)) / len(reports)

    row = {f"effect at {comparison.where}": interval(figures["effect"])}
    for arm, sign in ARMS:
        row[f"{'−+'[sign > 0]} arm"] = number(figures[f"effect_{arm}"].value, 2)
    for cost in FIXED_COSTS:
        row[f"at {cost:g}"] = number(figures[f"effect_at_{cost:g}"].value, 2)
    if comparison.prompts is not None:
        costs = [figures[f"cost_at_prompt_effect_{arm}"].value for arm, _ in ARMS]
        row["cost at prompts' effect"] = " / ".join(never(cost) for cost in costs)
    return row | {
        "range": number(mean(lambda r: r.range), 2),
        "wrong way": percent(mean(lambda r: r.wrong_way)),
        "flips right / wrong": " / ".join(
            f"{mean(lambda r, w=way: sum(r.flips(sign)[w] for _, sign in ARMS) / 2):.0%}" for way in (0, 1)
        ),
        "controls flipped": percent(mean(lambda r: r.arbitrary_flips)),
        "sel_gated": number(mean(lambda r: r.selectivity_gated), 2),
        "si_flips": number(mean(lambda r: r.si_flips), 2),
        "F1": number(mean(lambda r: r.steering_f1), 0),
        "SI": number(mean(lambda r: r.surgical_informedness), 0),
    }


SHORT = ("range", "wrong way", "sel_gated", "si_flips")  # the columns after the effects that fit into a terminal


def print_table(comparison: Comparison, title: str = "Effect at equal cost, nats") -> None:
    """Print one row per method; the own method is last and bold."""
    table = Table(title=title)
    table.add_column("")
    rows = {name: summary(comparison, name) for name in comparison.reports}
    columns = [c for c in next(iter(rows.values())) if c in SHORT or "arm" in c or "at" in c.split()]
    for column in columns:
        table.add_column(column, justify="right")
    for name in sorted(rows, key=lambda name: name == comparison.own):
        bold = "bold" if name == comparison.own else None
        table.add_row(name, *(rows[name][column] for column in columns), style=bold)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 170)  # do not wrap cells in a log file
    console.print(table)


def print_doses(report: EvalReport, title: str) -> None:
    """Print the measurements of one dial at each coefficient, and whether they are inside the budget."""
    table = Table(title=title)
    rows = [report.row(c) for c in report.coefficients]
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        cells = [("yes" if v else "no") if isinstance(v, bool) else number(v, 3) for v in row.values()]
        table.add_row(*cells, style=None if row["inside_budget"] else "dim")
    Console().print(table)


def write_csv(comparison: Comparison, path: str | Path) -> None:
    """Write one line per method, seed and coefficient."""
    rows = [
        {"method": name, "seed": seed, **report.row(c)}
        for name, reports in comparison.reports.items()
        for seed, report in enumerate(reports)
        for c in report.coefficients
    ]
    names: list[str] = []
    for row in rows:
        names += [name for name in row if name not in names]
    with written_whole(path) as place, place.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Mapping[str, Mapping[str, str]], first: str = "") -> str:
    """A Markdown table of named rows that have the same columns."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {' | '.join([first, *columns])} |", "|" + "---|" * (len(columns) + 1)]
    return "\n".join(lines + [f"| {' | '.join([name, *row.values()])} |" for name, row in rows.items()])


def number(value: float | None, digits: int) -> str:
    """A number as text; a dash for None or NaN."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """A share in per cent; a dash for NaN."""
    return "–" if value != value else f"{value:.1%}"


def interval(figure: Estimate) -> str:
    """A figure with its 95 % interval; a dash for NaN."""
    if figure.value != figure.value:
        return "–"
    return f"{figure.value:.2f} [{number(figure.low, 2)}, {number(figure.high, 2)}]"


def never(cost: float) -> str:
    """A cost in nats per token, or "never" for an infinite one."""
    return "never" if cost == float("inf") else number(cost, 3)
