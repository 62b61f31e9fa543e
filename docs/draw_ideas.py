"""Draw the pictures of docs/ideas.md and write its tables. `python -m benchmarks.ideas` has measured the figures."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes

from benchmarks.marked import between
from repeng._command import command
from repeng.data.files import write_text
from repeng.eval.curves import Estimate
from repeng.eval.report.figures import new_figure
from repeng.eval.report.tables import interval, markdown

HERE = Path(__file__).parent
PAGE, FIGURES = HERE / "ideas.md", HERE / "results" / "ideas.json"
NAMES = {"mean_diff": "mean difference", "gradient": "gradient", "fisher": "natural gradient", "random": "random"}
COLOURS = {"mean_diff": "black", "gradient": "tab:red", "fisher": "tab:purple", "random": "0.6"}
NEXT, LATER = slice(0, 1), slice(1, None)  # of the tokens behind a prompt
READ = {"mean": "all", "padding": "index −1,\npadded"}


def with_interval(axes: Axes, effects: dict[str, dict[str, float]], **style: Any) -> None:
    """Effects with their 95 % intervals, over layers."""
    layers = sorted(map(int, effects))
    values = [effects[str(layer)] for layer in layers]
    axes.fill_between(
        layers, [v["low"] for v in values], [v["high"] for v in values], alpha=0.15, color=style["color"]
    )
    axes.plot(layers, [v["value"] for v in values], marker="o", markersize=4, **style)


def share(whole: list[float], left: list[float]) -> float:
    """How much of a difference goes, in percent."""
    return 100 * (1 - sum(left) / sum(whole))


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
    whole = carried["unchanged"]
    for name, colour in (("last token", "tab:red"), ("last six tokens", "tab:purple")):
        order = sorted(carried[name], key=int)
        for part, style, what in ((NEXT, "-", "next token"), (LATER, "--", f"the {len(whole) - 1} after it")):
            shares = [share(whole[part], carried[name][layer][part]) for layer in order]
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
    shares = [share([carried[0]], [carried[p]]) for p in places]
    first.bar([f"−{p}" for p in places], shares, color="tab:red")
    first.set(
        xlabel="position from the end of the prompt",
        ylabel="share of the difference at the next token, %",
        title=f"Which token holds the plan?\n(its state behind layer {found['layer']} is exchanged)",
    )
    effects = found["effect"]
    values = list(effects.values())
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


def best(effects: dict[str, dict[str, float]]) -> str:
    """The largest effect over layers, with its layer and interval."""
    layer = max(effects, key=lambda key: effects[key]["value"])
    return f"{interval(Estimate(**effects[layer]))}, layer {layer}"


def trajectory_rows(found: dict[str, Any]) -> dict[str, str]:
    rows = {}
    for name, values in found["correlation"].items():
        layer = max(range(len(values)), key=values.__getitem__)
        rows[f"largest rank correlation, {name}"] = f"{values[layer]:.2f}, layer {layer}"
        rows[f"mean rank correlation in the first third of the layers, {name}"] = (
            f"{mean(values[: len(values) // 3]):.2f}"
        )
    carried = found["carried"]
    whole = carried["unchanged"]
    for name in ("last token", "last six tokens"):
        last = max(map(int, carried[name]))  # behind the last layer the state is the output itself
        inner = [layer for layer in carried[name] if int(layer) < last]
        for what, part in (("of the next token", NEXT), (f"of the {len(whole) - 1} after it", LATER)):
            shares = {layer: share(whole[part], carried[name][layer][part]) for layer in inner}
            layer = max(shares, key=shares.__getitem__)
            rows[f"share that the {name} decide{'s' * (name == 'last token')}, {what}"] = (
                f"{shares[layer]:.0f} %, layer {layer}"
            )
    return rows


def tokens_rows(found: dict[str, Any]) -> dict[str, str]:
    carried, effects = found["carried"], found["effect"]
    names = {
        **{n: f"effect, last {n} tokens" for n in effects},
        "1": "effect, last token",
        "mean": "effect, all tokens",
    }
    names["padding"] = "effect, index −1 of padded rows"
    shown = {names[n]: interval(Estimate(**value)) for n, value in effects.items()}
    decided = {p: share([carried["0"]], [value]) for p, value in carried.items() if p != "0"}
    others = [value for p, value in decided.items() if p != "1"]
    rows = {"layer": str(found["layer"]), "the last position decides, of the next token": f"{decided['1']:.0f} %"}
    return rows | {"the most that an earlier position decides": f"{max(others):.0f} %"} | shown


def gradient_rows(found: dict[str, Any]) -> dict[str, str]:
    rows = {}
    for c in sorted({point["c"] for point in found["points"]}):
        some = [point for point in found["points"] if point["c"] == c]
        off = [abs(point["measured"] - point["predicted"]) for point in some]
        size = [abs(point["measured"]) for point in some]
        rows[f"error of the prediction at c = ±{c:g}, of the mean effect"] = f"{100 * sum(off) / sum(size):.0f} %"
    return rows | {f"best effect, {NAMES[name]}": best(effects) for name, effects in found["effect"].items()}


def layers_rows(found: dict[str, Any]) -> dict[str, str]:
    effects = found["effect"]
    ends = [str(min(map(int, effects))), str(max(map(int, effects)))]
    perfect = [layer for layer, value in zip(found["layers"], found["accuracy"], strict=True) if value == 1]
    return {
        "largest effect": best(effects),
        **{
            f"effect at the {which} measured layer": f"{effects[end]['value']:.2f}, layer {end}"
            for which, end in zip(("first", "last"), ends, strict=True)
        },
        "layers with a perfect probe": f"{len(perfect)} of {len(found['layers'])} measured",
    }


IDEAS = {
    "trajectory": (trajectory, trajectory_rows),
    "tokens": (tokens, tokens_rows),
    "gradient": (gradient, gradient_rows),
    "layers": (layers, layers_rows),
}


def draw(figures: dict[str, dict[str, Any]]) -> None:
    for name, (idea, _) in IDEAS.items():
        figure = new_figure(9.2, 4 * len(figures))
        parts = figure.subfigures(len(figures), 1)
        for part, (model, found) in zip(parts, figures.items(), strict=True):
            part.suptitle(f"{model}: {found['behaviour']}", fontsize=11)
            idea(found, *part.subplots(1, 2))
        figure.savefig(HERE / f"ideas_{name}.png", dpi=80)


def with_tables(text: str, figures: dict[str, dict[str, Any]]) -> str:
    """The page with its tables filled."""
    for name, (_, rows_of) in IDEAS.items():
        rows: dict[str, dict[str, str]] = {}
        for model, found in figures.items():
            for label, value in rows_of(found[name]).items():
                rows.setdefault(label, {})[model] = value
        filled = {label: {model: cells.get(model, "–") for model in figures} for label, cells in rows.items()}
        marks = f"<!-- {name}: written by docs/draw_ideas.py -->", f"<!-- end of {name} -->"
        text = between(text, *marks, markdown(filled, ""))
    return text


if __name__ == "__main__":
    with command():
        measured = json.loads(FIGURES.read_text(encoding="utf-8"))
        draw(measured)
        write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), measured))
