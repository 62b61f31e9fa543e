"""Reports as a table for a terminal, as rows for a spreadsheet, and in one sentence."""

import csv
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from repeng.data.files import written_whole
from repeng.eval.eval_report import ARMS, EvalReport, bootstrap

Reports = Mapping[str, EvalReport]


def summary(report: EvalReport, resamples: int = 300) -> dict[str, str]:
    """The figures of one row, as text: the range with its 95 % interval, and what it cost."""
    low, high = bootstrap([report], lambda r: r.range, n=resamples)
    worst = max((report.spent()[report.at(report.endpoint(sign))].item() for _, sign in ARMS), default=0.0)
    return {
        "range, nats": f"{report.range:.2f} [{low:.2f}, {high:.2f}]",
        "+ arm": f"{report.arm(+1).gain:.2f}",
        "− arm": f"{report.arm(-1).gain:.2f}",
        "wrong way": percent(report.wrong_way),
        "flips right / wrong": " / ".join(
            f"{sum(report.flips(sign)[way] for _, sign in ARMS) / 2:.0%}" for way in (0, 1)
        ),
        "controls flipped": f"{report.arbitrary_flips:.1%}",
        "F1": number(report.steering_f1, 0),
        "SI": number(report.surgical_informedness, 0),
        "budget spent": f"{worst:.0%}",
    }


def print_table(reports: Reports, own: str | None = None, title: str = "Effect inside the budget") -> None:
    """One row a method, `own` last and bold. Flips, F1 and SI are at each arm's best coefficient inside the budget."""
    table = Table(title=title)
    table.add_column("")
    rows = {name: summary(report) for name, report in reports.items()}
    for column in next(iter(rows.values())):
        table.add_column(column, justify="right")
    for name in sorted(rows, key=lambda name: name == own):
        table.add_row(name, *rows[name].values(), style="bold" if name == own else None)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 170)  # a log file has no edge at which to break words
    console.print(table)


def print_doses(report: EvalReport, title: str) -> None:
    """What one dial does at each coefficient, and whether that is inside the budget."""
    table = Table(title=title)
    rows = [report.row(c) for c in report.coefficients]
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        cells = [("yes" if v else "no") if isinstance(v, bool) else number(v, 3) for v in row.values()]
        table.add_row(*cells, style=None if row["inside_budget"] else "dim")
    Console().print(table)


def write_csv(reports: Reports, path: str | Path) -> None:
    """One line a method and coefficient."""
    rows = [{"method": name, **report.row(c)} for name, report in reports.items() for c in report.coefficients]
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
    """A number, or a dash for none."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """A share in per cent, or a dash for none."""
    return "–" if value != value else f"{value:.1%}"
