"""Write a report as files in a folder."""

from pathlib import Path
from typing import Any

from repeng._extras import install_command
from repeng._file_names import PAGE, PICTURE, REPORT, REPORT_FILES, TABLE
from repeng.data.files import staged, write_json, written_whole
from repeng.eval.comparison import Comparison
from repeng.eval.report import figures
from repeng.eval.report.page import write_page
from repeng.eval.report.tables import write_csv


def write_report(comparison: Comparison, folder: Path, *, title: str, about: dict[str, Any] | None = None) -> None:
    """Write report.json, report.csv, report.html and, if matplotlib is installed, report.png.

    The entries of `about` are added to report.json.

    Raises:
        WriteError: a file cannot be written; then no file is written.
    """
    with staged(folder, report_files(), stale=[folder / name for name in REPORT_FILES]) as place:
        write_json(place / REPORT, {**comparison.to_dict(), **(about or {})})
        write_csv(comparison, place / TABLE)
        write_page(comparison, place / PAGE, title=title)
        if figures.available():
            with written_whole(place / PICTURE) as picture:
                figures.effect_and_cost(comparison).savefig(picture, dpi=130)
    if not figures.available():
        print(f"{PICTURE} was not drawn, because matplotlib is missing: {install_command('plot')}")


def report_files() -> tuple[str, ...]:
    """Names of the files of a report; report.png is not among them if matplotlib is not installed."""
    return tuple(name for name in REPORT_FILES if figures.available() or not name.endswith(".png"))
