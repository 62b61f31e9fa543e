"""Draw docs/loss_geometry.png from the real loss and a real training run of the embedded model."""

import tempfile
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from repeng import EvalReport, evaluate, steer, tiny
from repeng.eval.evaluate import ADAPTER_COEFFICIENTS
from repeng.train.arguments import SteeringArguments, parse_arguments
from repeng.train.build import build
from repeng.train.inner_contrastive_loss import inner_contrastive_loss
from repeng.train.trainer import SteeringTrainer

HERE = Path(__file__).parent
ARMS = ("plus", "minus")


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


def train() -> tuple[SteeringArguments, list[dict[str, float]], EvalReport]:
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
    args, rows, report = train()
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    token, plane, dose = figure.subplots(1, 3)

    lost = torch.linspace(-0.5, 1.0, 200).tolist()
    untouched = loss_at(args)
    token.plot(lost, [(loss_at(args, lost=x) - untouched) / args.coherence_weight for x in lost])
    token.axvspan(-0.5, args.coherence_margin, color="tab:green", alpha=0.12, label="free: gains and the margin")
    token.set(xlabel="log-probability lost by a token, nats", ylabel="v + v²", title="One token: coherence")
    token.legend(fontsize=8)

    furthest = {name: max(row[f"{name}_{arm}"] for row in rows for arm in ARMS) for name in ("shift", "gap")}
    xs = torch.linspace(-0.1, 1.1 * max(args.separation_target, furthest["shift"]), 60)
    ys = torch.linspace(-0.5, 1.1 * max(args.order_target, furthest["gap"]), 60)
    grid = [[loss_at(args, shift=x, gap=y) for x in xs.tolist()] for y in ys.tolist()]
    contours = plane.contourf(xs, ys, grid, levels=20, cmap="Greys")
    figure.colorbar(contours, ax=plane, label=f"separation + {args.order_weight:g} · order")
    plane.axvline(args.separation_target, color="tab:blue", linestyle="--", label="target of separation")
    plane.axhline(args.order_target, color="tab:purple", linestyle="--", label="target of order")
    for arm, colour in zip(ARMS, ("tab:orange", "tab:cyan"), strict=True):
        path = [[row[f"{name}_{arm}"] for row in rows] for name in ("shift", "gap")]
        plane.plot(*path, color=colour, linewidth=0.8, marker=".", markersize=3, label=f"training, {arm} arm")
    plane.set(
        xlabel="Δ, units along the preference direction",
        ylabel="Γ, units",
        title="Mean pair: separation and order",
    )
    plane.legend(fontsize=8, loc="lower right")

    spent = report.spent()
    inside = [c for c in report.coefficients if spent[report.at(c)] <= 1]
    for edge, end in ((min(inside), min(report.coefficients)), (max(inside), max(report.coefficients))):
        dose.axvspan(*sorted((edge, end)), color="grey", alpha=0.25, linewidth=0)
    dose.plot(report.coefficients, [report.mean_log_odds(c) for c in report.coefficients], marker="o")
    dose.set(xlabel="coefficient c", ylabel="log-odds of truth on held-out entities, nats", title="Dose and response")
    figure.savefig(HERE / "loss_geometry.png", dpi=110)


if __name__ == "__main__":
    draw()
