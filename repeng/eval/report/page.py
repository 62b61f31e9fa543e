"""One self-contained HTML page: verdict, table, figures, and generated texts side by side."""

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path

from repeng._extras import install_command
from repeng.data.files import write_text
from repeng.eval.comparison import Comparison
from repeng.eval.eval_report import EvalReport
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
.samples em { opacity: 0.65; font-style: normal; }
footer { margin-top: 3rem; font-size: 0.85rem; opacity: 0.75; }
"""

CAPTIONS = {
    "effect_and_cost": "Effect over cost: at the same cost, higher is better. A star is a persona prompt, which has "
    "no coefficient. Methods are compared at the dashed line. The cost axis has a square-root scale.",
    "probes": "Effect of each method at equal cost on the behaviour itself, on other behaviours, which should not "
    "change, and on the behaviour in other circumstances, which should change as well.",
    "dose_response": "Log-odds and cost of the method in bold over its coefficient, with 95 % bands over items. "
    "Methods are compared at the dashed lines.",
    "by_group": "The effect on each group of questions at equal cost.",
}


def write_page(comparison: Comparison, path: str | Path, *, title: str) -> None:
    """Write the page, whole or not at all. Without matplotlib it has no figures, and a sentence says so.

    Args:
        comparison: the comparison to show.
        path: path of the HTML file.
        title: heading, as plain text.
    """
    own = comparison.reports[comparison.own][0]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p id="verdict">{html.escape(comparison.verdict)}.</p>',
        _method_table(comparison),
    ]
    if figures.available():
        for name, caption in CAPTIONS.items():
            drawn = getattr(figures, name)(comparison)
            if drawn is not None:
                parts.append(_picture(figures.svg(drawn), caption, name))
    else:
        parts.append(f"<p>Figures need matplotlib: <code>{html.escape(install_command('plot'))}</code>.</p>")
    parts += [_sample_table(comparison), _sample_counts(comparison)]
    if own.dropped:
        listed = "".join(f"<li>{html.escape(reason)}</li>" for reason in own.dropped)
        parts.append(f"<h2>Questions that could not be asked: {len(own.dropped)}</h2><ul>{listed}</ul>")
    parts.append(
        "<footer>Effect: how far the mean log-odds move in the direction of an arm, in nats; the sum of both arms if "
        "no arm is named. Cost: KL divergence from the base, exact over the vocabulary, mean over tokens of neutral "
        "texts. Intervals: 95&nbsp;%, bootstrap over questions, texts and seeds. Range: the largest effect inside the "
        "budget of answer mass, neutral text and controls. Flips, F1 (arXiv 2601.07473), SI, sel_gated and si_flips "
        "(moral-maps) are measured at the cost at which methods are compared.</footer>"
    )
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(part for part in parts if part)}\n</body></html>\n"
    )
    write_text(path, text)


def _method_table(comparison: Comparison) -> str:
    rows = {name: summary(comparison, name) for name in comparison.reports}
    body = [(name, list(row.values()), "own" if name == comparison.own else None) for name, row in rows.items()]
    return _table("methods", ["", *next(iter(rows.values()))], body)


def _table(
    name: str, head: Sequence[str], rows: Sequence[tuple[str, Sequence[str], str | None]], kind: str = ""
) -> str:
    """An HTML table of plain texts. A row is its first cell, its other cells, and its CSS class or None."""
    top = "".join(f"<th>{html.escape(column)}</th>" for column in head)
    body = "".join(
        f"<tr{f' class={css}' if css else ''}><td>{html.escape(first)}</td>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, cells, css in rows
    )
    attributes = f'id="{name}"' + (f' class="{kind}"' if kind else "")
    return f'<div class="scroll"><table {attributes}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(drawing: str, caption: str, name: str) -> str:
    # A separate image per figure: the ids inside several inline SVG drawings would collide.
    data = base64.b64encode(drawing.encode()).decode()
    return (
        f'<figure id="{name}"><img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _sampled(comparison: Comparison) -> list[tuple[str, EvalReport, float]]:
    """The columns of generated texts: the − and + coefficients of each method with samples, the own method first."""
    order = sorted(comparison.reports, key=lambda name: name != comparison.own)
    return [
        (name, comparison.reports[name][0], c)
        for name in order
        for c in sorted({sample.coefficient for sample in comparison.reports[name][0].samples} - {0.0})
    ]


def _sample_table(comparison: Comparison) -> str:
    """Generated texts at equal cost side by side, one row per prompt; empty without samples."""
    columns = _sampled(comparison)
    if not columns:
        return ""
    own = comparison.reports[comparison.own][0]
    base = {sample.prompt: sample.text for sample in own.samples_at(0.0)}
    texts = [{sample.prompt: sample.text for sample in report.samples_at(c)} for _, report, c in columns]
    prompts = dict.fromkeys(prompt for column in (base, *texts) for prompt in column)
    head = ["prompt", "base, c = 0", *(f"{name}, c = {c:+.3g}" for name, _, c in columns)]
    body = [(prompt, [column.get(prompt, "") for column in (base, *texts)], None) for prompt in prompts]
    return "<h2>Generated text at equal cost</h2>" + _table("samples", head, body, "samples")


def _sample_counts(comparison: Comparison) -> str:
    """Statistics of these generated texts."""
    own = comparison.reports[comparison.own][0]
    columns = [("base", own, 0.0), *_sampled(comparison)]
    if len(columns) == 1:
        return ""
    head = ["", "cost", "repetition", "finished", "NLL under the base", "sentences that parse"]
    body = []
    for name, report, c in columns:
        values = (
            report.kl[report.at(c)].item() if c in report.coefficients else math.nan,
            *(figure(c) for figure in (report.repetition, report.finish_rate, report.base_nll, report.parse_rate)),
        )
        body.append((name if c == 0 else f"{name}, c = {c:+.3g}", [number(value, 2) for value in values], None))
    return _table("counts", head, body)
