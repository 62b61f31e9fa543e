"""Compare forms of the training loss at equal budget over seeds: `python -m benchmarks.loss_forms --seeds 0 1 2`.

Each run trains the adapter of configs/tiny.yaml with a different loss and measures its range on held-out entities, in
nats inside the budget of the main job. Writes one JSON line per run and prints a Markdown table.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from benchmarks.training import ranges_row, trained_report
from repeng._command import command
from repeng.eval.report.tables import markdown, percent
from repeng.train.inner_contrastive_loss import (
    InnerContrastiveLoss,
    inner_contrastive_loss,
    signed_shift,
    violation,
    where,
)


def position(hs: Tensor, mask: Tensor, direction: Tensor, scale: Tensor) -> Tensor:
    """`s (… b k)`: mean projection of the counted tokens onto each direction, in units of `scale`."""
    along = einsum(where(mask[..., None], hs), direction, "... t d, d k -> ... t k") / scale
    return along.sum(dim=-2) / mask.sum(dim=-1, keepdim=True).clamp(min=1)


def symlog(x: Tensor) -> Tensor:
    """`sign(x) log(1 + |x|)` with the derivative 1 at 0. Training starts at 0, where abs() has no derivative."""
    sign = torch.where(x < 0, -1.0, 1.0)
    return sign * (sign * x).log1p()


def coherence_terms(inputs: dict) -> tuple[Tensor, Tensor]:
    """The coherence and the neutral term of the default loss, `(b)` each."""
    margin = inputs["coherence_margin"]
    pair = violation(inputs["logp_pi"], inputs["logp_ref"], inputs["logp_mask"], margin)
    neutral = violation(
        inputs["neutral_logp_pi"], inputs["neutral_logp_ref"][None], inputs["neutral_mask"][None], margin
    )
    return pair.mean(dim=0), neutral.mean(dim=0)


def with_separation(separation: Callable[[dict], Tensor]) -> Callable[..., InnerContrastiveLoss]:
    """The default loss with a different separation term `(b)`."""

    def loss(**inputs) -> InnerContrastiveLoss:
        term = separation(inputs)
        coherence, neutral = coherence_terms(inputs)
        total = term + inputs["coherence_weight"] * (coherence + neutral)
        terms = {"separation": term, "coherence": coherence, "neutral": neutral}
        return InnerContrastiveLoss(total.mean(), {name: value.detach() for name, value in terms.items()})

    return loss


def geometry(inputs: dict) -> tuple[Tensor, Tensor]:
    """Positions of the policy `(c p b k)` and of the reference `(p b k)`."""
    mask, u, scale = inputs["hs_mask"], inputs["direction"], inputs["scale"]
    return position(inputs["hs_pi"], mask.expand(2, *mask.shape), u, scale), position(inputs["hs_ref"], mask, u, scale)


def policy_chosen_reference_rejected(inputs: dict) -> Tensor:
    """dHS: policy chosen − reference rejected at +1, reference chosen − policy rejected at −1, bounded."""
    pi, ref = geometry(inputs)
    delta = torch.stack([pi[0, 0] - ref[1], ref[0] - pi[1, 1]])
    target = inputs["separation_target"]
    return reduce((target - delta).relu() / target, "c b k -> b", "mean")


def unbounded(inputs: dict) -> Tensor:
    """Policy − reference on both sides, with −symlog(Δ) instead of a target."""
    delta = signed_shift(inputs["hs_pi"], inputs["hs_ref"], inputs["hs_mask"], inputs["direction"], inputs["scale"])
    return reduce(-symlog(delta), "c p b k -> b", "mean")


def gap(inputs: dict) -> Tensor:
    """Change of the gap chosen − rejected, unbounded: it should widen at +1 and narrow at −1."""
    pi, ref = geometry(inputs)
    change = (pi[:, 0] - pi[:, 1]) - (ref[0] - ref[1])
    sign = torch.tensor([1.0, -1.0], device=change.device)
    return reduce(-symlog(rearrange(sign, "c -> c 1 1") * change), "c b k -> b", "mean")


def coherence_of_the_mean(**inputs) -> InnerContrastiveLoss:
    """The default loss with the margin on the mean over tokens, where gains at some tokens offset losses at others."""

    def averaged(logp: Tensor, mask: Tensor) -> Tensor:
        return where(mask, logp).sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp(min=1)

    ones = torch.ones_like(inputs["logp_mask"][..., :1])
    pair, neutral = inputs["logp_mask"], inputs["neutral_mask"]
    return inner_contrastive_loss(
        **{
            **inputs,
            "logp_pi": averaged(inputs["logp_pi"], pair),
            "logp_ref": averaged(inputs["logp_ref"], pair),
            "logp_mask": ones,
            "neutral_logp_pi": averaged(inputs["neutral_logp_pi"], neutral.expand_as(inputs["neutral_logp_pi"])),
            "neutral_logp_ref": averaged(inputs["neutral_logp_ref"], neutral),
            "neutral_mask": ones[0],
        }
    )


@dataclass(frozen=True)
class Form:
    """A loss and its command-line arguments."""

    loss: Callable[..., InnerContrastiveLoss]
    argv: tuple[str, ...] = ()


RATE = "2e-3"  # fixed for all forms: the automatic learning rate depends on separation_target
FORMS: dict[str, Form] = {
    "default": Form(inner_contrastive_loss),
    "no order term": Form(inner_contrastive_loss, ("--order_weight", "0")),
    "order term alone": Form(inner_contrastive_loss, ("--separation_target", "1e-3")),
    "target 1": Form(inner_contrastive_loss, ("--separation_target", "1")),
    "policy chosen − reference rejected, target 4": Form(
        with_separation(policy_chosen_reference_rejected), ("--separation_target", "4")
    ),
    "unbounded": Form(with_separation(unbounded)),
    "gap, unbounded": Form(with_separation(gap)),
    "no coherence term": Form(inner_contrastive_loss, ("--coherence_weight", "0")),
    "coherence of the mean over tokens": Form(coherence_of_the_mean),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--output", type=Path, default=Path("outputs/loss_forms.jsonl"))
    options, extra = parser.parse_known_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name in options.forms:
        form = FORMS[name]
        argv = ["--learning_rate", RATE, *form.argv, *extra]
        reports = [trained_report(seed, argv, loss_func=form.loss) for seed in options.seeds]
        with options.output.open("a", encoding="utf-8") as file:
            for seed, report in zip(options.seeds, reports, strict=True):
                file.write(json.dumps({"form": name, "seed": seed, "argv": extra, **report.to_dict()}) + "\n")
        rows[name] = {**ranges_row(reports), "wrong way": percent(mean(report.wrong_way for report in reports))}
    print(markdown(rows, "form"))


if __name__ == "__main__":
    with command():
        main()
