"""Draw docs/loss_geometry.png from the real loss and a real training run of the embedded model."""

import tempfile
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from repeng import evaluate, steer, tiny
from repeng.eval.evaluate import ADAPTER_COEFFICIENTS
from repeng.eval.report.figures import shade_outside
from repeng.train.arguments import SteeringArguments, parse_arguments
from repeng.train.build import build
from repeng.train.inner_contrastive_loss import inner_contrastive_loss
from repeng.train.trainer import SteeringTrainer

HERE = Path(__file__).parent


def loss_at(shift: float, lost: float, args: SteeringArguments) -> float:
    """The loss of a pair whose sides have moved by `shift` units and whose tokens have each lost `lost` nats."""
    ones = torch.ones(1, 1, dtype=torch.bool)
    hs = torch.tensor([shift, -shift])[:, None, None, None, None].expand(2, 2, 1, 1, 1)
    logp = torch.full((2, 1, 1), -lost)
    return inner_contrastive_loss(
        hs_pi=hs,
        hs_ref=torch.zeros(2, 1, 1, 1),
        hs_mask=ones.expand(2, 1, 1),
        logp_pi=logp,
        logp_ref=torch.zeros(2, 1, 1),
        logp_mask=ones.expand(2, 1, 1),
        neutral_logp_pi=torch.zeros(2, 1, 1),
        neutral_logp_ref=torch.zeros(1, 1),
        neutral_mask=ones,
        direction=torch.ones(1, 1),
        scale=torch.ones(1),
        gap_pi=torch.zeros(2, 2, 1),
        gap_ref=torch.zeros(2, 1),
        gap_weight=torch.zeros(1),
        separation_target=args.separation_target,
        coherence_margin=args.coherence_margin,
        coherence_weight=args.coherence_weight,
    ).loss.item()


def train() -> tuple[SteeringArguments, list[dict], object]:
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
    return args, [row for row in trainer.state.log_history if "separation" in row], report


def draw() -> None:
    args, path, report = train()
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    token, plane, dose = figure.subplots(1, 3)

    lost = torch.linspace(-0.5, 1.0, 200)
    base = loss_at(args.separation_target, 0.0, args)
    token.plot(
        lost, [(loss_at(args.separation_target, x, args) - base) / args.coherence_weight for x in lost.tolist()]
    )
    token.axvspan(-0.5, args.coherence_margin, color="tab:green", alpha=0.12, label="free: gains and the margin")
    token.set(xlabel="log-probability lost by a token, nats", ylabel="v + v²", title="One token")
    token.legend(fontsize=8)

    top = 1.5 * max([args.separation_target, *(max(r["shift_plus"], r["shift_minus"]) for r in path)])
    xs, ys = torch.linspace(-0.1, top, 60), torch.linspace(0, args.coherence_margin + 0.15, 60)
    grid = [[loss_at(x, y, args) for x in xs.tolist()] for y in ys.tolist()]
    contours = plane.contourf(xs, ys, grid, levels=20, cmap="Greys")
    figure.colorbar(contours, ax=plane, label="loss of a pair")
    plane.axvline(args.separation_target, color="tab:blue", linestyle="--", label="target")
    plane.axhline(args.coherence_margin, color="tab:green", linestyle="--", label="margin of coherence")
    # The loss of a token whose penalty is the run's mean penalty: the solution of v + v² = penalty, beyond the margin.
    # A run without a penalty lies on the margin or anywhere below it.
    penalty = torch.tensor([row["coherence"] + row["neutral"] for row in path])
    equivalent = args.coherence_margin + ((1 + 4 * penalty).sqrt() - 1) / 2
    shift = [(row["shift_plus"] + row["shift_minus"]) / 2 for row in path]
    plane.plot(shift, equivalent, color="tab:red", linewidth=0.8)
    plane.scatter(shift, equivalent, c=range(len(path)), cmap="autumn", s=9, label="training", zorder=3)
    plane.set(xlabel="Δ, units along the preference direction", ylabel="lost by each token, nats", title="One pair")
    plane.legend(fontsize=8, loc="upper right")

    shade_outside(dose, report)
    dose.plot(report.coefficients, [report.mean_log_odds(c) for c in report.coefficients], marker="o")
    dose.set(xlabel="coefficient c", ylabel="log-odds of truth on held-out entities, nats", title="Dose and response")
    figure.savefig(HERE / "loss_geometry.png", dpi=110)


if __name__ == "__main__":
    draw()
