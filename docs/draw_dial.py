"""Draw docs/dial.png, a real model over the coefficient: `python docs/draw_dial.py outputs/smollm2`.

Reads the report of a run of `train.py --config smollm2 mood`, and lets its adapter answer two requests.
"""

import csv
import sys
import textwrap
from pathlib import Path

import torch
from peft import PeftModel

from repeng import load_model, steer
from repeng._command import command
from repeng.eval.compare import ADAPTER
from repeng.eval.report.figures import new_figure

HERE = Path(__file__).parent
REQUESTS = ("How was your day?", "What will the weather be like tomorrow?")
COLOURS = {-1.0: "tab:blue", 0.0: "0.35", 1.0: "tab:orange"}
TOKENS, WIDTH = 24, 66


def answers(folder: Path) -> dict[float, list[str]]:
    """By coefficient, the beginning of the greedy answer to each request."""
    base, tokenizer = load_model("smollm2")
    model = PeftModel.from_pretrained(base, folder)
    said: dict[float, list[str]] = {c: [] for c in COLOURS}
    for request in REQUESTS:
        turns = [{"role": "user", "content": request}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        for c, texts in said.items():
            with steer(model, c), torch.no_grad():
                output = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
            texts.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


def draw(folder: Path) -> None:
    with (folder / "report.csv").open(encoding="utf-8") as file:
        rows = sorted(
            (float(row["coefficient"]), float(row["log_odds"]), float(row["kl"]))
            for row in csv.DictReader(file)
            if row["method"] == ADAPTER and row["seed"] == "0"
        )
    said = answers(folder)
    figure = new_figure(11, 4)
    curve, texts = figure.subplots(1, 2, width_ratios=(1, 1.15))
    coefficients, log_odds, cost = zip(*rows, strict=True)
    curve.plot(coefficients, log_odds, color="black", marker="o", markersize=4)
    for c, colour in COLOURS.items():
        curve.plot([c], [log_odds[coefficients.index(c)]], marker="o", markersize=9, color=colour)
    curve.set(xlabel="coefficient c", ylabel="log-odds, cheerful over gloomy, nats")
    curve.grid(alpha=0.3)
    other = curve.twinx()
    other.plot(coefficients, cost, color="0.6", linestyle=":")
    other.set_ylabel("cost (dotted): KL, nats per token", color="0.4")
    texts.axis("off")
    y = 1.0
    for i, request in enumerate(REQUESTS):
        texts.text(0, y, f"“{request}”", fontsize=10, weight="bold", va="top", transform=texts.transAxes)
        y -= 0.08
        for c, colour in sorted(COLOURS.items()):
            lines = textwrap.wrap(f"c = {f'{c:+.0f}' if c else 0}:  {' '.join(said[c][i].split())} …", WIDTH)
            texts.text(0, y, "\n".join(lines), fontsize=9, color=colour, va="top", transform=texts.transAxes)
            y -= 0.065 * len(lines) + 0.02
        y -= 0.03
    figure.suptitle("SmolLM2-135M-Instruct with one adapter: cheerful (+1) and gloomy (−1)", fontsize=11)
    figure.savefig(HERE / "dial.png", dpi=110)


if __name__ == "__main__":
    with command():
        draw(Path(sys.argv[1]))
