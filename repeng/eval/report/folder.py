"""A report as files in a folder."""

from pathlib import Path
from typing import Any

from repeng.data.files import write_json, written_whole
from repeng.eval.comparison import Comparison
from repeng.eval.report import figures
from repeng.eval.report.page import write_page
from repeng.eval.report.tables import write_csv


def write_report(comparison: Comparison, folder: Path, *, title: str, about: dict[str, Any] | None = None) -> None:
    """report.json, report.csv, report.html and, with matplotlib, report.png; `about` goes into the first."""
    write_json(folder / "report.json", {**comparison.to_dict(), **(about or {})})
    write_csv(comparison, folder / "report.csv")
    if figures.available():
        with written_whole(folder / "report.png") as place:
            figures.effect_and_cost(comparison).savefig(place, dpi=130)
    else:
        print("report.png was not drawn: matplotlib is not installed (pip install 'repeng[plot]')")
    write_page(comparison, folder / "report.html", title=title)
