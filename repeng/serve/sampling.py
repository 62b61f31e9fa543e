"""Draw the next token of a text."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GREEDY_BELOW = 0.01  # below this temperature take the most likely token: the division would overflow


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one request.

    Attributes:
        temperature: divisor of the logits; with 0, the most likely token is taken.
        top_p: tokens are drawn only from the most likely tokens that together have this probability.
        top_k: tokens are drawn only from this many most likely tokens; None = from all tokens.
        seed: seed of the random numbers; None = a random seed.
        logprobs: number of most likely tokens to report with each drawn token; None = no log-probabilities.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    logprobs: int | None = None


class Drawn(NamedTuple):
    """A drawn token, its log-probability, and the most likely tokens with theirs, all at temperature 1."""

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
        """Scores `(v,)` whose argmax is a draw from the logits `(v,)`; the logits themselves if sampling is greedy.

        With Gumbel noise g, the argmax of `logits / T + g` has the distribution `softmax(logits / T)` (Maddison et
        al., arXiv 1411.0030). Tokens that `top_k` or `top_p` exclude have the score −∞.
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
            before = probability.cumsum(-1) - probability  # of all likelier tokens; the likeliest token is always kept
            scores = scores.masked_fill(
                torch.zeros_like(order, dtype=torch.bool).scatter(0, order, before >= sampling.top_p), -math.inf
            )
        noise = torch.empty_like(scores).exponential_(generator=self._generator)
        return scores - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()

    def told(self, logits: Tensor, scores: Tensor) -> Drawn | None:
        """The log-probabilities that the request asks for; None if it asks for none."""
        if self._sampling.logprobs is None:
            return None
        logp, token = logits.log_softmax(-1), int(scores.argmax())
        top = logp.topk(self._sampling.logprobs)
        return Drawn(token, logp[token].item(), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
