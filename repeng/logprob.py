"""Log-probabilities of given tokens without a full log-softmax."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 22  # logits upcast at a time


def next_token_logp(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Log-probability `(b t−1)`, float32, of each token given those before it: gather − logsumexp, in chunks of rows.

    Args:
        logits: `(b t v)`.
        input_ids: `(b t)`.
    """
    rows = max(1, CHUNK // (logits.shape[1] * logits.shape[2]))
    parts = []
    for part, ids in zip(logits[:, :-1].split(rows), input_ids[:, 1:].split(rows), strict=True):
        part = part.float()
        parts.append(part.gather(-1, ids[..., None]).squeeze(-1) - part.logsumexp(dim=-1))
    return torch.cat(parts)


def head_logp(hs: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk: int) -> Tensor:
    """Log-probability `(n)`, float32, of the `targets (n)` that `head` gives from final hidden states `hs (n d)`.

    Logits exist for `chunk` tokens at a time and are computed again in backward, so that memory does not grow with the
    number of tokens times the vocabulary.
    """

    def some(states: Tensor, ids: Tensor) -> Tensor:
        logits = head(states).float()
        return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)

    parts = [
        checkpoint(some, states, ids, use_reentrant=False) if states.requires_grad else some(states, ids)
        for states, ids in zip(hs.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(parts)
