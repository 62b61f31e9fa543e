"""What each part of the training loss is worth: `python -m benchmarks.loss_forms --config smollm2 mood`.

Every run trains the default adapter with another loss, at the same learning rate, and measures its effect at equal
cost, as `python -m benchmarks.rivals` does. Adds the figures of one model to docs/results/loss_forms.json.
`python docs/draw_loss_geometry.py` writes them into docs/loss_geometry.md.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from benchmarks.rivals import Bench
from repeng._command import command
from repeng.data.files import write_json
from repeng.eval.compare import PLAIN_COST, PROMPTS
from repeng.eval.curves import methods_of
from repeng.eval.measure import prompt_dial
from repeng.train.inner_contrastive_loss import (
    InnerContrastiveLoss,
    inner_contrastive_loss,
    signed_shift,
    where,
)

FILE = Path(__file__).parent.parent / "docs" / "results" / "loss_forms.json"


def position(hs: Tensor, mask: Tensor, direction: Tensor, scale: Tensor) -> Tensor:
    """`s (… b k)`: mean projection of the counted tokens, in units."""
    along = einsum(where(mask[..., None], hs), direction, "... t d, d k -> ... t k") / scale
    return along.sum(dim=-2) / mask.sum(dim=-1, keepdim=True).clamp(min=1)


def symlog(x: Tensor) -> Tensor:
    """`sign(x) log(1 + |x|)` with its derivative, 1, also at 0, where training starts and abs() has none."""
    sign = torch.where(x < 0, -1.0, 1.0)
    return sign * (sign * x).log1p()


def without_separation(**inputs) -> InnerContrastiveLoss:
    """The default without the separation term: a constant 1 remains, which has no gradient."""
    hs_ref = inputs["hs_ref"]
    return inner_contrastive_loss(**{**inputs, "hs_pi": hs_ref.expand(2, *hs_ref.shape)})


def with_separation(separation: Callable[[dict], Tensor]) -> Callable[..., InnerContrastiveLoss]:
    """The default loss with another separation term `(b)`."""

    def loss(**inputs) -> InnerContrastiveLoss:
        rest, term = without_separation(**inputs), separation(inputs)
        return InnerContrastiveLoss(rest.loss - 1 + term.mean(), {**rest.terms, "separation": term.detach()})

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
    """Policy − reference on both sides, −symlog(Δ) instead of a target."""
    delta = signed_shift(inputs["hs_pi"], inputs["hs_ref"], inputs["hs_mask"], inputs["direction"], inputs["scale"])
    return reduce(-symlog(delta), "c p b k -> b", "mean")


def gap(inputs: dict) -> Tensor:
    """The change of the chosen − rejected gap: wider at +1, narrower at −1, unbounded."""
    pi, ref = geometry(inputs)
    change = (pi[:, 0] - pi[:, 1]) - (ref[0] - ref[1])
    sign = torch.tensor([1.0, -1.0], device=change.device)
    return reduce(-symlog(rearrange(sign, "c -> c 1 1") * change), "c b k -> b", "mean")


def coherence_of_the_mean(**inputs) -> InnerContrastiveLoss:
    """The default with the margin on the mean over tokens, so that gains pay for losses."""

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


def without_neutral(**inputs) -> InnerContrastiveLoss:
    """The default without the neutral texts."""
    return inner_contrastive_loss(**{**inputs, "neutral_logp_pi": inputs["neutral_logp_ref"].expand(2, -1, -1)})


@dataclass(frozen=True)
class Form:
    """A loss, and the keys that it needs."""

    loss: Callable[..., InnerContrastiveLoss]
    argv: tuple[str, ...] = ()


RATE = "1e-3"  # for all forms: the rate that is found follows separation_target. SmolLM2: 9.8e-4 is found
FORMS: dict[str, Form] = {
    "default": Form(inner_contrastive_loss),
    "no separation": Form(without_separation),
    "no order": Form(inner_contrastive_loss, ("--order_weight", "0")),
    "no coherence, no neutral": Form(inner_contrastive_loss, ("--coherence_weight", "0")),
    "no neutral": Form(without_neutral),
    "margin on the mean over tokens": Form(coherence_of_the_mean),
    "separation on the last token only": Form(inner_contrastive_loss, ("--last_n_tokens", "1")),
    "separation without a target": Form(with_separation(unbounded)),
    "separation target 1": Form(inner_contrastive_loss, ("--separation_target", "1")),
    "policy chosen − reference rejected": Form(
        with_separation(policy_chosen_reference_rejected), ("--separation_target", "4")
    ),
    "distance chosen − rejected, without a target": Form(with_separation(gap)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["tiny"], help="as in train.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--rate", default=RATE, help="learning rate of all forms")
    parser.add_argument("--out", type=Path, default=FILE, help="file of figures; those of other runs are kept")
    options = parser.parse_args()
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    found = known.setdefault(options.config[0], {})
    bench = Bench(options.config, Path("outputs") / "loss_forms")
    assert bench.task.personas is not None
    prompts = bench.tracer.discrete(prompt_dial(*bench.task.personas))
    bench.tracer.set_yardstick(prompts)
    costs = bench.tracer.costs
    yardstick = tuple(torch.tensor([costs[sign]], dtype=torch.float64) for sign in (1, -1))
    for name in options.forms:
        form = FORMS[name]
        for seed in options.seeds:
            start = time.process_time()
            flags = ("--learning_rate", options.rate, *form.argv)
            rival = bench.trained(seed, flags, loss_func=form.loss)
            report = bench.measured(rival)
            tokens = bench.meter.neutral_tokens.sum()
            method = methods_of({PROMPTS: [prompts], name: [report]}, 0)[name]
            row = {
                "at_prompts_cost": method.both_at((yardstick[0], yardstick[1])).item(),
                f"at_{PLAIN_COST:g}": method.both_at(PLAIN_COST).item(),
                "cost_at_1": [(bench.meter.at(rival.dial, c).texts.kl.sum() / tokens).item() for c in (1.0, -1.0)],
                "wrong_way": report.wrong_way,
            }
            found.setdefault(name, {})[str(seed)] = row
            write_json(options.out, known)
            print(f"{name}, seed {seed}: {row}, {time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    with command():
        main()
