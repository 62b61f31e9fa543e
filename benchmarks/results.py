"""Make the tables and figures of the documentation from files of reports: `python -m benchmarks.results`.

Reads `docs/results/*.safetensors`, which `python -m benchmarks.rivals` writes. Writes `docs/results.md`, one figure
per file, and the table of the README.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.marked import between
from repeng._command import command
from repeng.eval.compare import ADAPTER, MEAN_DIFF, PROMPTS, RANDOM
from repeng.eval.comparison import Comparison
from repeng.eval.curves import FIXED_COSTS
from repeng.eval.eval_report import EvalReport
from repeng.eval.report import figures
from repeng.eval.report.tables import interval, markdown, never, number
from repeng.eval.stored import load_reports

ROOT = Path(__file__).parent.parent
FOLDER, PAGE, README = ROOT / "docs" / "results", ROOT / "docs" / "results.md", ROOT / "README.md"
BEGIN, END = "<!-- results: written by benchmarks/results.py -->", "<!-- end of results on a real model -->"
IN_README = (ADAPTER, MEAN_DIFF, "PCA (vgel/repeng)", PROMPTS, RANDOM)
SEEDS = re.compile(r" \(\d+ seeds\)$")
NAMES = re.compile(r"(\S+) \([+−]1\)")
HEAD = """# Results

`python -m benchmarks.results` writes this page from the files in `docs/results`, which `python -m benchmarks.rivals`
measures. "This adapter" is trained with the package's own configuration. If `--layers` is given, all trained methods
are on those layers.

All methods are compared at the same cost. **Effect**: how far a method moves the log-odds of the answers that the
behaviour favours, in nats, both arms together. **Cost**: KL divergence from the base model on neutral texts, in nats
per token, exact over the vocabulary. Intervals are 95 % bootstrap intervals over questions, texts and training seeds.
Persona prompts have no coefficient: they are a single point, and the other methods are compared at their cost. Each
random direction counts with both signs, so its mean effect is 0: read the interval. Probes are questions on other
behaviours, and on the same behaviour in other circumstances.

| method | what it is |
|---|---|
| this adapter | the package's default: LoRA with the loss of this package |
| SVD, same loss; learned biases, same loss | the other two kinds of adapter |
| persona prompts | the persona sentence in front of the request, in the user's message |
| prompt: priorities, pretend, engineered, few-shot | other wordings; few-shot adds answers of the model |
| mean difference, PCA, SVD with k = 4 | vectors, each at its best layer |
| gradient, natural gradient | vectors from a backward pass, each at its best layer |
| mean difference, gated | the same with a coefficient for every token (arXiv 2605.03907) |
| LoRA, prompt distillation | two LoRAs that imitate the model behind each persona |
| contrastive weights | the difference of two fine-tunes (arXiv 2511.05408) |

| column | what it is |
|---|---|
| at prompts' cost | effect where the cost is that of the persona prompts; a dash: the prompt costs more |
| at 0.05, 0.1, 0.3 | effect at these costs, in nats per token |
| c, + / − | coefficients nearest to the prompts' cost |
| wrong way | share of the questions that move against an arm there; a run with `require_steering` allows 5 % |
| repetition, + / − | share of 3-grams of the generated text that occurred before in it |
| cost at prompts' effect | cost at which an arm has the effect of the persona prompts |
| own point | effect and costs of a prompt where it is |

Read the figures with four things in mind.

- Costs are means over few texts (16 or 24), and several questions share a frame but count as independent. So the
  intervals are somewhat too narrow.
- Training protects neutral texts of the same kind as those that measure the cost. This favours trained adapters over
  prompts and vectors.
- Neutral texts are drawn per device, so the same prompts have other costs in another section.
- Probes and generated texts use the first seed, at the measured coefficient nearest to the cost.
"""


def comparison_in(path: Path) -> tuple[Comparison, dict[str, Any]]:
    """The comparison in a file of reports, and the other values in the file."""
    reports, more = load_reports(path)
    own = ADAPTER if ADAPTER in reports else more["untrained"]
    probes = {name: {key: (two[0], two[1]) for key, two in one.items()} for name, one in more["probes"].items()}
    return Comparison(reports, own, PROMPTS, RANDOM, more["untrained"], probes), more


def effect_rows(comparison: Comparison) -> dict[str, dict[str, str]]:
    """One row per method, the strongest at equal cost first."""
    rows = {}
    order = sorted(comparison.reports, key=lambda name: -_value(comparison.at_yardstick(name)[0].item()))
    for name in order:
        found = comparison.figures(name)
        seeds = len(comparison.reports[name])
        costs = [found[f"cost_at_prompt_effect_{arm}"].value for arm in ("plus", "minus")]
        ends = [[part[0].item() for part in comparison.methods[name].end(sign)] for sign in (1, -1)]
        point = comparison.reports[name][0].discrete
        rows[f"{name} ({seeds} seeds)" if seeds > 1 and name != RANDOM else name] = {
            "at prompts' cost": interval(found["effect"]),
            **{f"at {cost:g}": number(found[f"effect_at_{cost:g}"].value, 2) for cost in FIXED_COSTS},
            **_there(comparison, name),
            "cost at prompts' effect, + / −": " / ".join(map(never, costs)),
            "own point": f"{ends[0][0] + ends[1][0]:.2f} at {ends[0][1]:.3f} / {ends[1][1]:.3f}" if point else "–",
        }
    return rows


def _ends(reports: Sequence[EvalReport]) -> list[float]:
    """The coefficients at which a method is read, + and −: means over seeds."""
    return [mean(report.endpoint(sign) for report in reports) for sign in (1, -1)]


def _there(comparison: Comparison, name: str) -> dict[str, str]:
    """Where a method is read, and what happens there besides the effect: means over seeds; texts of the first seed."""
    reports = comparison.reports[name]
    ends = _ends(reports)
    first, shown = reports[0], "–"
    if first.samples:
        shown = " / ".join(number(first.repetition(first.endpoint(sign)), 2) for sign in (1, -1))
    return {
        "c, + / −": "–" if name == RANDOM else f"{ends[0]:+.1f} / {ends[1]:+.1f}",
        "wrong way": "–" if name == RANDOM else f"{100 * mean(report.wrong_way for report in reports):.0f} %",
        "repetition, + / −": shown,
    }


def remark(comparison: Comparison, column: str) -> str:
    """What the README says of this adapter besides its effect."""
    reports, first = comparison.reports[ADAPTER], comparison.reports[ADAPTER][0]
    ends = _ends(reports)
    at_one = mean(_interpolated(report, 1.0) - _interpolated(report, -1.0) for report in reports)
    wrong, prompts = (
        100 * mean(report.wrong_way for report in comparison.reports[name]) for name in (ADAPTER, PROMPTS)
    )
    repeated = mean(first.repetition(first.endpoint(sign)) for sign in (1, -1))
    return (
        f"- **{column}**: read at c = {ends[0]:+.1f} and {ends[1]:+.1f}; at c = ±1 the effect is {at_one:.1f} nats. "
        f"{wrong:.0f} % of the questions move the wrong way (prompts: {prompts:.0f} %). {100 * repeated:.0f} % of the "
        f"3-grams of its texts are repetitions (base: {100 * first.repetition(0.0):.0f} %)."
    )


def _interpolated(report: EvalReport, c: float) -> float:
    """Mean log-odds at a coefficient between measured ones."""
    return float(np.interp(c, report.coefficients, [report.mean_log_odds(known) for known in report.coefficients]))


def probe_rows(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Effects at the prompts' cost on other behaviours, and on the own behaviour in other circumstances."""
    columns = list(dict.fromkeys(probe for one in comparison.probes.values() for probe in one))
    return {
        name: {
            "itself": f"{_own(comparison, name):+.1f}",
            **{column: f"{sum(one[column]):+.1f}" if column in one else "–" for column in columns},
        }
        for name, one in comparison.probes.items()
    }


def _own(comparison: Comparison, name: str) -> float:
    report = comparison.reports[name][0]
    return sum(s * (report.mean_log_odds(report.endpoint(s)) - report.mean_log_odds(0.0)) for s in (1, -1))


def _value(value: float) -> float:
    return value if value == value else float("-inf")


def section(path: Path) -> str:
    """The section of the page for one file."""
    comparison, more = comparison_in(path)
    plus, minus = (cost[0].item() for cost in comparison.yardstick())
    runs = {name: len(seeds) for name, seeds in more["seeds"].items()}
    seconds = ", ".join(f"{name} {value / runs.get(name, 1):.0f} s" for name, value in more["seconds"].items())
    said = []
    report = comparison.reports[comparison.own][0]
    for prompt in list(dict.fromkeys(sample.prompt for sample in report.samples))[:3]:
        cells = {}
        for c in (report.endpoint(-1), 0.0, report.endpoint(+1)):
            text = next(s.text for s in report.samples_at(c) if s.prompt == prompt)
            cells[f"c = {c:+.2f}" if c else "base"] = " ".join(text.split()).replace("|", "/")
        said.append((" ".join(prompt.split()).replace("|", "/"), cells))
    effect = more.get("persona_effect")
    moved = "" if effect is None else f" The personas move the answers to these questions by {effect:.1f} nats."
    flags = more["config"]
    layers = f", layers {flags[flags.index('--layers') + 1]}" if "--layers" in flags else ""
    return (
        f"## {more['model']}: {more['behaviour']}{layers}\n\n`--config {' '.join(flags)}`, {more['questions']} "
        f"questions without a persona.{moved} Cost of the persona prompts: {plus:.3f} (+), {minus:.3f} (−).\n\n"
        f"{markdown(effect_rows(comparison), 'method')}\n\n![effect and cost](results/{path.stem}.png)\n\n"
        f"Effects on the behaviour itself and on the probes, at the prompts' cost, both arms together, in nats:\n\n"
        f"{markdown(probe_rows(comparison), 'method')}\n\n"
        f"Generated text with {comparison.own}, at the prompts' cost:\n\n{markdown(dict(said), 'prompt')}\n\n"
        f"Time per run for training, choice of a layer and measurement, on {more['device']}: {seconds}.\n"
    )


def page(paths: list[Path]) -> str:
    return "\n".join([HEAD, *(section(path) for path in paths)])


def readme_with_table(text: str, paths: list[Path]) -> str:
    """The README with the effects of five methods at the prompts' cost, one column per file without extra flags."""
    rows: dict[str, dict[str, str]] = {name: {} for name in IN_README}
    remarks: list[str] = []
    for path in paths:
        comparison, more = comparison_in(path)
        if comparison.own != ADAPTER or any(word.startswith("--") for word in more["config"]):
            continue  # nothing was trained, or not with the package's own configuration
        column = f"{more['model']}: {' / '.join(NAMES.findall(more['behaviour']))}"
        remarks.append(remark(comparison, column))
        for name in IN_README:
            key = comparison.untrained if name == MEAN_DIFF else name
            known = key in comparison.reports
            rows[name][column] = interval(comparison.figures(key)["effect"]) if known else "–"
    said = "\n".join(remarks)
    return between(text, BEGIN, END, f"{markdown(rows, 'method')}\n\n{said}")


def main() -> None:
    paths = sorted(FOLDER.glob("*.safetensors"))
    PAGE.write_text(page(paths), encoding="utf-8")
    README.write_text(readme_with_table(README.read_text(encoding="utf-8"), paths), encoding="utf-8")
    for path in paths:
        figures.effect_and_cost(comparison_in(path)[0]).savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    with command():
        main()
