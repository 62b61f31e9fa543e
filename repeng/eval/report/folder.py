"""A report as files in a folder."""

from pathlib import Path
from typing import Any

from repeng.data.files import write_json, written_whole
from repeng.eval.compare import ADAPTER, shortcomings, verdict
from repeng.eval.eval_report import EvalReport
from repeng.eval.report import figures
from repeng.eval.report.page import write_page
from repeng.eval.report.tables import write_csv


def write_report(
    reports: dict[str, EvalReport],
    folder: Path,
    *,
    title: str,
    name: str = ADAPTER,
    about: dict[str, Any] | None = None,
) -> None:
    """report.json, report.csv, report.html and, with matplotlib, report.png; `about` goes into the first."""
    sentence = verdict(reports, name)
    rows = {key: report.to_dict() for key, report in reports.items()}
    result = {"verdict": sentence, "shortcomings": shortcomings(reports, name), **(about or {}), "rows": rows}
    write_json(folder / "report.json", result)
    write_csv(reports, folder / "report.csv")
    if figures.available():
        with written_whole(folder / "report.png") as place:
            figures.dose_response(reports, name).savefig(place, dpi=130)
    else:
        print("report.png was not drawn: matplotlib is not installed (pip install 'repeng[plot]')")
    write_page(reports, folder / "report.html", title=title, verdict=f"{sentence}.", own=name)
