"""The training loss: separation of hidden states and of next-token probabilities, inside a region of coherence.

Shapes: `b` pairs, `t` tokens, `d` width of the site, `k` preference directions, `p` prompt (chosen, rejected, the same
without a persona), `c` coefficient side (plus, minus). The derivation and drawings are in docs/loss_geometry.md.
"""

from typing import Any, NamedTuple

import torch
from einops import einsum, reduce
from torch import Tensor

# From research_notes.md. `Recipe` states these values again, without importing torch; a test holds them equal.
SEPARATION_TARGET = 3.0
ORDER_TARGET = 1.5
ORDER_WEIGHT = 10.0
COHERENCE_MARGIN = 0.4
COHERENCE_WEIGHT = 10.0


class InnerContrastiveLoss(NamedTuple):
    """`loss`, a scalar with its graph, and `terms`, detached `(b)` tensors with the contribution of each pair."""

    loss: Tensor
    terms: dict[str, Tensor]


def inner_contrastive_loss(
    *,
    hs_pi: Tensor,
    hs_ref: Tensor,
    hs_mask: Tensor,
    logp_pi: Tensor,
    logp_ref: Tensor,
    logp_mask: Tensor,
    neutral_logp_pi: Tensor,
    neutral_logp_ref: Tensor,
    neutral_mask: Tensor,
    direction: Tensor,
    scale: Tensor,
    gap_pi: Tensor,
    gap_ref: Tensor,
    gap_weight: Tensor,
    gap_unit: float,
    separation_target: float = SEPARATION_TARGET,
    order_target: float = ORDER_TARGET,
    order_weight: float = ORDER_WEIGHT,
    coherence_margin: float = COHERENCE_MARGIN,
    coherence_weight: float = COHERENCE_WEIGHT,
) -> InnerContrastiveLoss:
    """The mean over pairs of `separation + order_weight · order + coherence_weight · (coherence + neutral)`.

    With `s = (hs · direction) / scale`, averaged over the masked tokens, and `Δ = s_plus − s_ref` at c = +1,
    `Δ = s_ref − s_minus` at c = −1:

    - separation: `relu(target − Δ) / target`, mean over both coefficient sides, the prompts and the directions;
    - order: the same for the gap in log-probability between the next tokens of the two personas, `Γ = gap_plus −
      gap_ref` at c = +1 and `gap_ref − gap_minus` at c = −1, in units of the change that the personas make:
      `gap_weight · relu(target − Γ) / target`, mean over coefficient sides and prompts;
    - coherence: with `v = relu(logp_ref − margin − logp_pi)` for each token, the token mean of `v + v²`.

    Args:
        hs_pi: `(c p b t d)` hidden states of the policy, plus and minus.
        hs_ref: `(p b t d)` hidden states of the reference on the same tokens.
        hs_mask: `(p b t)` which hidden states count.
        logp_pi: `(c b t)` next-token log-probabilities of the policy: the chosen text at plus, the rejected at minus.
        logp_ref: `(c b t)` log-probabilities of the reference on the same texts.
        logp_mask: `(c b t)` which tokens are real.
        neutral_logp_pi: `(c b t)` log-probabilities of the policy on one neutral text per pair, plus and minus.
        neutral_logp_ref: `(b t)` log-probabilities of the reference on the neutral texts.
        neutral_mask: `(b t)` which tokens are real.
        direction: `(d k)` preference directions, signed so that + is toward chosen.
        scale: `(k)` length of one unit along each direction.
        gap_pi: `(c p b)` gap of the policy at the end of each prompt, plus and minus, in nats.
        gap_ref: `(p b)` gap of the reference, in nats.
        gap_weight: `(b)` how far the two personas disagree on the next token, relative to the mean pair.
        gap_unit: how much the personas change the gap, in nats.
        separation_target: shift to reach, in units of `scale`.
        order_target: change of the gap to reach, in units of `gap_unit`.
        order_weight: weight of the order term against separation.
        coherence_margin: log-probability, in nats, that a token may lose at no cost.
        coherence_weight: weight of the coherence terms against separation.

    Raises:
        ValueError: the shape of a tensor does not fit the others.
    """
    _check_shapes(
        hs_pi,
        hs_ref,
        hs_mask,
        logp_pi,
        logp_ref,
        logp_mask,
        neutral_logp_pi,
        neutral_logp_ref,
        neutral_mask,
        gap_pi,
        gap_ref,
        gap_weight,
    )
    delta = signed_shift(hs_pi, hs_ref, hs_mask, direction, scale)  # (c p b k)
    separation = reduce((separation_target - delta).relu() / separation_target, "c p b k -> b", "mean")
    gain = _signs(gap_pi, 3) * (gap_pi - gap_ref) / gap_unit  # (c p b)
    order = gap_weight * reduce((order_target - gain).relu() / order_target, "c p b -> b", "mean")
    coherence = reduce(violation(logp_pi, logp_ref, logp_mask, coherence_margin), "c b -> b", "mean")
    neutral = reduce(
        violation(neutral_logp_pi, neutral_logp_ref[None], neutral_mask[None], coherence_margin), "c b -> b", "mean"
    )
    total = separation + order_weight * order + coherence_weight * (coherence + neutral)
    terms = {
        "separation": separation,
        "order": order,
        "coherence": coherence,
        "neutral": neutral,
        "shift_plus": reduce(delta[0], "p b k -> b", "mean"),
        "shift_minus": reduce(delta[1], "p b k -> b", "mean"),
        "gap_plus": reduce(gain[0], "p b -> b", "mean"),
        "gap_minus": reduce(gain[1], "p b -> b", "mean"),
    }
    return InnerContrastiveLoss(total.mean(), {name: term.detach() for name, term in terms.items()})


def as_reference(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the loss with the reference in place of the policy, for the loss of the base model."""
    sides = {"hs": given["hs_ref"], "neutral_logp": given["neutral_logp_ref"], "gap": given["gap_ref"]}
    both = {f"{name}_pi": torch.stack([tensor, tensor]) for name, tensor in sides.items()}
    return {**given, **both, "logp_pi": given["logp_ref"]}


def signed_shift(hs_pi: Tensor, hs_ref: Tensor, hs_mask: Tensor, direction: Tensor, scale: Tensor) -> Tensor:
    """Δ `(c p b k)`: how far each coefficient side is from the reference, in units; + is the wanted direction."""
    moved = where(hs_mask[..., None], hs_pi - hs_ref)
    along = einsum(moved, direction.to(moved.dtype), "c p b t d, d k -> c p b t k") / scale.to(moved.dtype)
    count = reduce(hs_mask.to(moved.dtype), "p b t -> p b 1", "sum").clamp(min=1)
    return _signs(moved, 4) * reduce(along, "c p b t k -> c p b k", "sum") / count


def _signs(like: Tensor, ndim: int) -> Tensor:
    """+1 and −1 along the first of `ndim` dimensions."""
    return torch.tensor([1.0, -1.0], dtype=like.dtype, device=like.device).reshape(2, *[1] * (ndim - 1))


def violation(logp_pi: Tensor, logp_ref: Tensor, mask: Tensor, margin: float) -> Tensor:
    """Token mean `(c b)` of `v + v²`, where `v` is what a token loses beyond the margin. Gains do not count."""
    v = where(mask, logp_ref - margin - logp_pi).relu()
    count = reduce(mask.to(v.dtype), "c b t -> c b", "sum").clamp(min=1)
    return reduce(v + v**2, "c b t -> c b", "sum") / count


def where(mask: Tensor, value: Tensor) -> Tensor:
    """`value` where the mask is true, else 0. A NaN outside the mask affects neither the value nor the gradient."""
    return torch.where(mask, value, torch.zeros((), dtype=value.dtype, device=value.device))


def _check_shapes(
    hs_pi: Tensor,
    hs_ref: Tensor,
    hs_mask: Tensor,
    logp_pi: Tensor,
    logp_ref: Tensor,
    logp_mask: Tensor,
    neutral_logp_pi: Tensor,
    neutral_logp_ref: Tensor,
    neutral_mask: Tensor,
    gap_pi: Tensor,
    gap_ref: Tensor,
    gap_weight: Tensor,
) -> None:
    """Raise ValueError, naming the tensor, if a shape is wrong. Broadcasting would hide such a mistake."""
    p, b, t, d = hs_ref.shape
    wanted = {
        "hs_pi": (hs_pi, (2, p, b, t, d)),
        "hs_mask": (hs_mask, (p, b, t)),
        "logp_pi": (logp_pi, (2, b, logp_pi.shape[-1])),
        "logp_ref": (logp_ref, logp_pi.shape),
        "logp_mask": (logp_mask, logp_pi.shape),
        "neutral_logp_pi": (neutral_logp_pi, (2, b, neutral_logp_pi.shape[-1])),
        "neutral_logp_ref": (neutral_logp_ref, neutral_logp_pi.shape[1:]),
        "neutral_mask": (neutral_mask, neutral_logp_pi.shape[1:]),
        "gap_pi": (gap_pi, (2, p, b)),
        "gap_ref": (gap_ref, (p, b)),
        "gap_weight": (gap_weight, (b,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != tuple(shape):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)} beside hs_ref {p, b, t, d}"
            )
