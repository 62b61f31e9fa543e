"""Draw docs/loss_geometry.png from a run of the embedded model, and write the table of docs/loss_geometry.md."""

import json
import tempfile
from pathlib import Path

import torch
from matplotlib.axes import Axes

from benchmarks.marked import between
from repeng import EvalReport, evaluate, steer, tiny
from repeng.data.files import write_text
from repeng.eval.evaluate import ADAPTER_COEFFICIENTS
from repeng.eval.report.figures import new_figure
from repeng.eval.report.tables import markdown
from repeng.model.activations import hidden_states
from repeng.train.arguments import SteeringArguments, parse_arguments
from repeng.train.build import build
from repeng.train.collator import PROMPTS
from repeng.train.inner_contrastive_loss import inner_contrastive_loss
from repeng.train.trainer import SteeringTrainer

HERE = Path(__file__).parent
PAGE, FIGURES = HERE / "loss_geometry.md", HERE / "results" / "loss_forms.json"
ARMS = ("plus", "minus")
SHOWN = 40  # pairs
BEGIN, END = "<!-- loss: written by docs/draw_loss_geometry.py -->", "<!-- end of loss -->"


def loss_at(args: SteeringArguments, *, shift: float = 0.0, gap: float = 0.0, lost: float = 0.0) -> float:
    """The loss of a pair.

    Args:
        args: targets, weights and margin.
        shift: how far both sides have moved, in units.
        gap: how far the gap in log-probability has changed at both sides, in units.
        lost: what each token of the pair has lost, in nats.
    """
    ones = torch.ones(1, 1, dtype=torch.bool)
    signs = torch.tensor([1.0, -1.0])
    return inner_contrastive_loss(
        hs_pi=shift * signs[:, None, None, None, None].expand(2, 2, 1, 1, 1),
        hs_ref=torch.zeros(2, 1, 1, 1),
        hs_mask=ones.expand(2, 1, 1),
        logp_pi=torch.full((2, 1, 1), -lost),
        logp_ref=torch.zeros(2, 1, 1),
        logp_mask=ones.expand(2, 1, 1),
        neutral_logp_pi=torch.zeros(2, 1, 1),
        neutral_logp_ref=torch.zeros(1, 1),
        neutral_mask=ones,
        direction=torch.ones(1, 1),
        scale=torch.ones(1),
        gap_pi=gap * signs[:, None, None].expand(2, 2, 1),
        gap_ref=torch.zeros(2, 1),
        gap_weight=torch.ones(1),
        gap_unit=1.0,
        separation_target=args.separation_target,
        order_target=args.order_target,
        order_weight=args.order_weight,
        coherence_margin=args.coherence_margin,
        coherence_weight=args.coherence_weight,
    ).loss.item()


def train() -> tuple[SteeringTrainer, EvalReport]:
    """One run with every step logged, and its evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--output_dir", folder, "--save_strategy", "no", "--logging_steps", "1"]
        task_args, args = parse_arguments(["--config", "tiny", *argv])
        run = build(task_args, args, tiny.task(task_args, args.seed))
        trainer = SteeringTrainer(run.model, args, run.examples, run.tokenizer)
        trainer.train()
    report = evaluate(
        run.model,
        run.tokenizer,
        run.task.questions,
        lambda c: steer(run.model, c),
        ADAPTER_COEFFICIENTS,
        neutral_texts=run.task.unseen_neutral_texts,
    )
    return trainer, report


def draw_states(axes: Axes, trainer: SteeringTrainer) -> None:
    """Hidden states of some prompts at c = −1, 0 and +1, along the preference direction and across it."""
    examples = trainer.train_dataset[:SHOWN]
    place = (trainer.args.loss_site, trainer.loss_layer)
    states = {}  # (coefficient, prompt): (b d)
    for c in (-1.0, 0.0, 1.0):
        for prompt in PROMPTS:
            rows = [example[prompt] for example in examples]
            with steer(trainer.model, c):
                read = hidden_states(
                    trainer.model, trainer.processing_class, rows, [place], tokens=trainer.args.last_n_tokens
                )
            states[c, prompt] = read[place]
    u, unit = trainer.direction[:, 0].cpu(), trainer.scale[0].item()
    base = torch.cat([states[0.0, prompt] for prompt in PROMPTS])
    centre = base.mean(dim=0)
    rest = base - centre
    across = torch.linalg.svd(rest - torch.outer(rest @ u, u), full_matrices=False).Vh[0]
    for c, colour in ((0.0, "0.55"), (1.0, "tab:orange"), (-1.0, "tab:cyan")):
        for prompt, marker in zip(PROMPTS, ("^", "v", "o"), strict=True):
            x, y = (((states[c, prompt] - centre) @ axis / unit).tolist() for axis in (u, across))
            label = f"{prompt.removesuffix('_ids')}, c = {c:+.0f}" if c else f"{prompt.removesuffix('_ids')}, base"
            axes.scatter(x, y, s=14, marker=marker, color=colour, alpha=0.7, linewidth=0, label=label)
    for sign, colour in ((1, "tab:orange"), (-1, "tab:cyan")):
        axes.axvline(sign * trainer.args.separation_target, color=colour, linestyle="--", linewidth=1)
    axes.annotate(
        "u", xy=(1, 0.04), xytext=(0, 0.04), xycoords=("data", "axes fraction"), arrowprops={"arrowstyle": "->"}
    )
    axes.set(
        xlabel="along u, units (0 = mean of the base's prompts)",
        ylabel="across u, units",
        title="Hidden states of prompts; dashed: targets of the mean",
    )
    axes.legend(fontsize=6, ncol=3)


def draw_token(axes: Axes, args: SteeringArguments) -> None:
    """The penalty of one token."""
    lost = torch.linspace(-0.5, 1.0, 200).tolist()
    untouched = loss_at(args)
    axes.plot(lost, [(loss_at(args, lost=x) - untouched) / args.coherence_weight for x in lost])
    axes.axvspan(-0.5, args.coherence_margin, color="tab:green", alpha=0.12, label="free: gains and the margin")
    axes.set(xlabel="log-probability lost by a token, nats", ylabel="v + v²", title="One token: coherence")
    axes.legend(fontsize=8)


def draw_plane(axes: Axes, args: SteeringArguments, rows: list[dict[str, float]]) -> None:
    """The loss of a pair over separation and order, and the path of both arms in training."""
    furthest = {name: max(row[f"{name}_{arm}"] for row in rows for arm in ARMS) for name in ("shift", "gap")}
    xs = torch.linspace(-0.1, 1.1 * max(args.separation_target, furthest["shift"]), 60)
    ys = torch.linspace(-0.5, 1.1 * max(args.order_target, furthest["gap"]), 60)
    grid = [[loss_at(args, shift=x, gap=y) for x in xs.tolist()] for y in ys.tolist()]
    contours = axes.contourf(xs, ys, grid, levels=20, cmap="Greys")
    axes.figure.colorbar(contours, ax=axes, label=f"separation + {args.order_weight:g} · order")
    axes.axvline(args.separation_target, color="tab:blue", linestyle="--", label="target of separation")
    axes.axhline(args.order_target, color="tab:purple", linestyle="--", label="target of order")
    for arm, colour in zip(ARMS, ("tab:orange", "tab:cyan"), strict=True):
        path = [[row[f"{name}_{arm}"] for row in rows] for name in ("shift", "gap")]
        axes.plot(*path, color=colour, linewidth=0.8, marker=".", markersize=3, label=f"training, {arm} arm")
    axes.set(
        xlabel="Δ, units along the preference direction",
        ylabel="Γ, units",
        title="Mean pair: separation and order",
    )
    axes.legend(fontsize=8, loc="lower right")


def draw_dose(axes: Axes, report: EvalReport) -> None:
    """Log-odds over the coefficient; the region outside of the budget is grey."""
    spent = report.spent()
    inside = [c for c in report.coefficients if spent[report.at(c)] <= 1]
    for edge, end in ((min(inside), min(report.coefficients)), (max(inside), max(report.coefficients))):
        axes.axvspan(*sorted((edge, end)), color="grey", alpha=0.25, linewidth=0)
    axes.plot(report.coefficients, [report.mean_log_odds(c) for c in report.coefficients], marker="o")
    axes.set(xlabel="coefficient c", ylabel="log-odds of truth on held-out entities, nats", title="Dose and response")


def draw() -> None:
    trainer, report = train()
    figure = new_figure(12, 9)
    states, plane, token, dose = figure.subplots(2, 2).flat
    draw_states(states, trainer)
    draw_plane(plane, trainer.args, [row for row in trainer.state.log_history if "separation" in row])
    draw_token(token, trainer.args)
    draw_dose(dose, report)
    figure.savefig(HERE / "loss_geometry.png", dpi=100)


def ablations(figures: dict[str, dict[str, dict[str, dict]]]) -> str:
    """The table of what each part of the loss is worth, from docs/results/loss_forms.json."""
    names = list(dict.fromkeys(name for model in figures.values() for name in model))
    rows: dict[str, dict[str, str]] = {name: {} for name in names}
    for model, forms in figures.items():
        for name in names:
            seeds = [*forms.get(name, {}).values()]
            costs = [
                f"{sum(seed['cost_at_1'][side] for seed in seeds) / len(seeds):.3f}" if seeds else ""
                for side in (0, 1)
            ]
            for column, key in (("at the prompts' cost", "at_prompts_cost"), ("at 0.1", "at_0.1")):
                value = f"{sum(seed[key] for seed in seeds) / len(seeds):.2f}" if seeds else "–"
                rows[name][f"{model}: {column}"] = value
            rows[name][f"{model}: cost at c = ±1"] = " / ".join(costs) if seeds else "–"
    return markdown(rows, "loss")


def with_tables(text: str, figures: dict[str, dict[str, dict[str, dict]]]) -> str:
    """The page with its table filled."""
    return between(text, BEGIN, END, ablations(figures))


if __name__ == "__main__":
    measured = json.loads(FIGURES.read_text(encoding="utf-8"))
    write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), measured))
    draw()
