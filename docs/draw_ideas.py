"""Draw the pictures of docs/ideas.md from docs/results/ideas.json, which `python -m benchmarks.ideas` has written."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from repeng._command import command
from repeng.eval.report.figures import new_figure

HERE = Path(__file__).parent
NAMES = {"mean_diff": "mean difference", "gradient": "gradient", "fisher": "natural gradient", "random": "random"}
COLOURS = {"mean_diff": "black", "gradient": "tab:red", "fisher": "tab:purple", "random": "0.6"}
READ = {"mean": "all", "padding": "index −1,\npadded"}


def with_interval(axes: Axes, effects: dict[str, dict[str, float]], **style: Any) -> None:
    """Effects with their 95 % intervals, over layers."""
    layers = sorted(map(int, effects))
    values = [effects[str(layer)] for layer in layers]
    axes.fill_between(
        layers, [v["low"] for v in values], [v["high"] for v in values], alpha=0.15, color=style["color"]
    )
    axes.plot(layers, [v["value"] for v in values], marker="o", markersize=4, **style)


def trajectory(model: dict[str, Any], first: Axes, second: Axes) -> None:
    found = model["trajectory"]
    for (name, values), style in zip(found["correlation"].items(), ("-", "--"), strict=True):
        first.plot(range(len(values)), values, style, color="black", label=name)
    first.axhline(0, color="0.7", linewidth=0.8)
    first.set(
        xlabel="layer",
        ylabel="rank correlation",
        title="Do the ends of two prompts differ inside\nwhere their continuations differ?",
        ylim=(-1, 1),
    )
    first.legend(title="continuation", fontsize=8)
    carried = found["carried"]
    whole = [carried["unchanged"][:1], carried["unchanged"][1:]]
    for name, colour in (("last token", "tab:red"), ("last six tokens", "tab:purple")):
        order = sorted(carried[name], key=int)
        for part, style, what in ((0, "-", "next token"), (1, "--", f"the {len(whole[1])} after it")):
            left = [carried[name][layer][part : 1 if part == 0 else None] for layer in order]
            shares = [100 * (1 - sum(values) / sum(whole[part])) for values in left]
            second.plot([*map(int, order)], shares, style, color=colour, marker=".", label=f"{name}: {what}")
    second.axhline(0, color="0.7", linewidth=0.8)
    second.set(
        xlabel="layer behind which the state is exchanged",
        ylabel="share of the difference that goes, %",
        title="What do the last states decide?",
        ylim=(-30, 105),
    )
    second.legend(title="exchanged: decides on", fontsize=8)


def tokens(model: dict[str, Any], first: Axes, second: Axes) -> None:
    found = model["tokens"]
    carried = {int(p): value for p, value in found["carried"].items()}
    places = [p for p in sorted(carried, reverse=True) if p]
    shares = [100 * (1 - carried[p] / carried[0]) for p in places]
    first.bar([f"−{p}" for p in places], shares, color="tab:red")
    first.set(
        xlabel="position from the end of the prompt",
        ylabel="share of the difference at the next token, %",
        title=f"Which token holds the plan?\n(its state behind layer {found['layer']} is exchanged)",
    )
    effects = found["effect"]
    values = [effects[n] for n in effects]
    errors = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
    colours = ["tab:red" if n == "padding" else "black" for n in effects]
    second.bar([READ.get(n, n) for n in effects], [v["value"] for v in values], yerr=errors, color=colours, alpha=0.8)
    second.set(
        xlabel="number of last tokens that the extraction reads",
        ylabel="effect at 0.1 nats per token, nats",
        title="What a mean difference does\nthat was read there",
    )


def gradient(model: dict[str, Any], first: Axes, second: Axes) -> None:
    found = model["gradient"]
    points = found["points"]
    for c, marker in zip(sorted({p["c"] for p in points}), (".", "x"), strict=True):
        for name, label in NAMES.items():
            some = [p for p in points if p["c"] == c and p["vector"] == name]
            xs, ys = ([p[key] / c for p in some] for key in ("predicted", "measured"))
            first.scatter(xs, ys, marker=marker, color=COLOURS[name], label=f"{label}, c = ±{c:g}")
    ends = [min(p["predicted"] / p["c"] for p in points), max(p["predicted"] / p["c"] for p in points)]
    first.plot(ends, ends, color="0.7", linewidth=0.8, zorder=0)
    first.set(
        xlabel="predicted by one backward pass, nats per unit of c",
        ylabel="measured, nats per unit of c",
        title="A gradient foretells what a shift does",
    )
    first.legend(fontsize=6)
    for name, effects in found["effect"].items():
        with_interval(second, effects, color=COLOURS[name], label=NAMES[name])
    second.set(xlabel="layer", ylabel="effect at 0.1 nats per token, nats", title="Steering along it")
    second.legend(fontsize=8)


def layers(model: dict[str, Any], first: Axes, second: Axes) -> None:
    found = model["layers"]
    with_interval(first, found["effect"], color="black")
    first.set(xlabel="layer", ylabel="effect at 0.1 nats per token, nats", title="What a mean difference does")
    second.plot(found["layers"], [100 * value for value in found["accuracy"]], color="tab:green", marker="o")
    second.set(xlabel="layer", ylabel="held-out pairs told apart, %", ylim=(40, 103), title="What a probe sees there")


IDEAS = {"trajectory": trajectory, "tokens": tokens, "gradient": gradient, "layers": layers}


def draw(figures: dict[str, dict[str, Any]]) -> None:
    for name, idea in IDEAS.items():
        figure = new_figure(4.6 * 2 * len(figures), 4.2)
        parts = figure.subfigures(1, len(figures))
        for part, (model, found) in zip(parts, figures.items(), strict=True):
            part.suptitle(f"{model}: {found['behaviour']}", fontsize=11)
            idea(found, *part.subplots(1, 2))
        figure.savefig(HERE / f"ideas_{name}.png", dpi=90)


if __name__ == "__main__":
    with command():
        draw(json.loads((HERE / "results" / "ideas.json").read_text(encoding="utf-8")))
