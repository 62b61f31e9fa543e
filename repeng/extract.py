"""Steering vectors from contrast pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.data import ContrastPair, encode, last_tokens, pad_rows
from repeng.sites import RESIDUAL, capture, site_module

METHODS = ("mean_diff",)


@dataclass(frozen=True)
class SteeringVector:
    """One direction `(d)` for each (site, layer); + is toward chosen."""

    directions: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def random_like(self, seed: int) -> "SteeringVector":
        """Random directions of the same norms: the control that every claim about a vector needs."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for key, direction in self.directions.items():
            noise = torch.randn(direction.shape, generator=generator).to(direction)
            drawn[key] = noise * direction.norm() / noise.norm()
        return SteeringVector(drawn)


@torch.no_grad()
def hidden_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    places: Sequence[tuple[str, int]],
    batch_size: int = 32,
) -> dict[tuple[str, int], Tensor]:
    """Float32 hidden states `(rows d)` of the last real token of each row of token ids, by (site, layer)."""
    modules = [site_module(model, layer, site) for site, layer in places]
    parts: dict[tuple[str, int], list[Tensor]] = {place: [] for place in places}
    for start in range(0, len(rows), batch_size):
        batch = pad_rows(rows[start : start + batch_size], tokenizer, model.device)
        with capture(modules) as outputs:
            model(**batch, use_cache=False)
        index, _ = last_tokens(batch["attention_mask"], 1)
        for place, output in zip(places, outputs, strict=True):
            row = torch.arange(output.shape[0], device=output.device)
            parts[place].append(output[row, index[:, 0].to(output.device)].float().cpu())
    return {place: torch.cat(part) for place, part in parts.items()}


def extract(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[ContrastPair],
    *,
    sites: Sequence[str] = (RESIDUAL,),
    layers: Sequence[int],
    method: str = "mean_diff",
) -> SteeringVector:
    """The mean difference of chosen and rejected at the last token (CAA, arXiv 2312.06681).

    Raises:
        ValueError: no pairs, an unknown method, or a site or layer that the model does not have.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if not pairs:
        raise ValueError("no pairs were given")
    places = [(site, layer) for site in sites for layer in layers]
    chosen, rejected = (
        hidden_states(model, tokenizer, [encode(tokenizer, getattr(p, side), p.suffix).ids for p in pairs], places)
        for side in ("chosen", "rejected")
    )
    return SteeringVector({place: (chosen[place] - rejected[place]).mean(dim=0) for place in places})
