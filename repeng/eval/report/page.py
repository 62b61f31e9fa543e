"""One self-contained HTML page: verdict, table, pictures, and generations side by side."""

import base64
import html
from collections.abc import Mapping
from pathlib import Path

from repeng.data.files import write_text
from repeng.eval.eval_report import EvalReport
from repeng.eval.evaluate import SAMPLED
from repeng.eval.report import figures
from repeng.eval.report.tables import number, summary

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --ink: #16202a; --page: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe6ec; --page: #14191e; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.35rem 0.6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child, .samples td, .samples th { text-align: left; }
tr.own td { font-weight: 600; background: var(--soft); }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: 0.5rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: #333; font-size: 0.85rem; padding: 0.3rem; }
.samples td { width: 25%; } .samples em { opacity: 0.65; font-style: normal; }
footer { margin-top: 3rem; font-size: 0.85rem; opacity: 0.75; }
"""

CAPTIONS = {
    "dose_response": "Dose and response, with 95 % bands over items; grey: outside the budget of the method in bold.",
    "pareto": "Effect against coherence: the further up before the grey, the more a method does for its budget.",
    "by_group": "The range inside the budget for each group of questions.",
}


def write_page(
    reports: Mapping[str, EvalReport], path: str | Path, *, title: str, verdict: str, own: str | None = None
) -> None:
    """Write the page whole or not at all; pictures are left out, and the page says so, without matplotlib.

    Args:
        reports: by method.
        path: of the HTML file.
        title: heading, plain text.
        verdict: one sentence, plain text.
        own: the method whose row, curve and generations stand out; the first by default.
    """
    own = own or next(iter(reports))
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p id="verdict">{html.escape(verdict)}</p>',
        _method_table(reports, own),
    ]
    if figures.available():
        for name, caption in CAPTIONS.items():
            drawn = getattr(figures, name)(reports, own)
            if drawn is not None:
                parts.append(_picture(figures.svg(drawn), caption, name))
    else:
        parts.append("<p>Pictures need matplotlib: <code>pip install 'repeng[plot]'</code>.</p>")
    parts.append(_sample_table(reports[own], own))
    dropped = reports[own].dropped
    if dropped:
        listed = "".join(f"<li>{html.escape(reason)}</li>" for reason in dropped)
        parts.append(f"<h2>Questions that could not be asked: {len(dropped)}</h2><ul>{listed}</ul>")
    parts.append(
        "<footer>Range: how far mean log-odds move over c &gt; 0 plus over c &lt; 0, inside the budget. Intervals: "
        "95&nbsp;%, bootstrap over items. Flips, F1 (arXiv 2601.07473) and SI: at each arm's best coefficient inside "
        "the budget.</footer>"
    )
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(part for part in parts if part)}\n</body></html>\n"
    )
    write_text(path, text)


def _method_table(reports: Mapping[str, EvalReport], own: str) -> str:
    rows = {name: summary(report) for name, report in reports.items()}
    head = "".join(f"<th>{html.escape(column)}</th>" for column in ("", *next(iter(rows.values()))))
    body = "".join(
        f"<tr{' class=own' if name == own else ''}><td>{html.escape(name)}</td>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.values())
        + "</tr>"
        for name, row in rows.items()
    )
    return f'<div class="scroll"><table id="methods"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(drawing: str, caption: str, name: str) -> str:
    # As an image of its own: the ids inside several drawings on one page would collide.
    data = base64.b64encode(drawing.encode()).decode()
    return (
        f'<figure id="{name}"><img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _sample_table(report: EvalReport, name: str) -> str:
    """Generations at −1, 0 and +1 side by side, a row a prompt; nothing without samples."""
    columns = [c for c in SAMPLED if report.samples_at(c)]
    if not columns:
        return ""
    head = "<th>prompt</th>" + "".join(f"<th>c = {c:+g}</th>" if c else "<th>base, c = 0</th>" for c in columns)
    rows = []
    for prompt in dict.fromkeys(sample.prompt for sample in report.samples):
        cells = [f"<td><em>{html.escape(prompt)}</em></td>"]
        for c in columns:
            text = next(sample.text for sample in report.samples_at(c) if sample.prompt == prompt)
            cells.append(f"<td>{html.escape(text)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    counts = "; ".join(
        f"c = {c:+g}: repetition {number(report.repetition(c), 2)}, finished {number(report.finish_rate(c), 2)}, "
        f"sentences that parse {number(report.parse_rate(c), 2)}"
        for c in columns
    )
    return (
        f"<h2>What it says: {html.escape(name)}</h2>"
        f'<div class="scroll"><table class="samples" id="samples"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><p>{html.escape(counts)}</p>"
    )
