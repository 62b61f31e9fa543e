"""How the next token of one text is drawn."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GREEDY_BELOW = 0.01  # temperatures under it take the most likely token; dividing by them would overflow


@dataclass(frozen=True)
class Sampling:
    """What one request asks for.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: only the most likely tokens that together have this probability are drawn.
        top_k: only so many of the most likely tokens are drawn; None = all.
        seed: draws from it; None = from a random one.
        logprobs: how many of the most likely tokens are told beside each drawn one; None = nothing is told.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    logprobs: int | None = None


class Drawn(NamedTuple):
    """A drawn token, its log-probability, and those of the most likely tokens, by the model alone (temperature 1)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Sampler:
    """Draws the tokens of one text."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def noisy(self, logits: Tensor) -> Tensor:
        """Scores `(v,)` whose largest entry is a draw from the logits `(v,)`; in a greedy one, the logits themselves.

        Noise is added where a token may be drawn at all: the largest of `logits / T + g`, g Gumbel noise, has the
        probabilities of `softmax(logits / T)` (Maddison et al., arXiv 1411.0030).
        """
        sampling = self._sampling
        if sampling.temperature < GREEDY_BELOW:
            return logits
        scores = logits / sampling.temperature
        if sampling.top_k is not None and sampling.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -math.inf)
        if sampling.top_p < 1:
            sorted_scores, order = scores.sort(descending=True)
            probability = sorted_scores.softmax(-1)
            before = probability.cumsum(-1) - probability  # of the more likely ones; the first is always kept
            scores = scores.masked_fill(
                torch.zeros_like(order, dtype=torch.bool).scatter(0, order, before >= sampling.top_p), -math.inf
            )
        noise = torch.empty_like(scores).exponential_(generator=self._generator)
        return scores - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()

    def told(self, logits: Tensor, scores: Tensor) -> Drawn | None:
        """What the request wants to know of the draw, if anything."""
        if self._sampling.logprobs is None:
            return None
        logp, token = logits.log_softmax(-1), int(scores.argmax())
        top = logp.topk(self._sampling.logprobs)
        return Drawn(token, logp[token].item(), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
