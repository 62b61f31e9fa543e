"""Log-probabilities of given tokens without a full log-softmax."""

import torch
from torch import Tensor

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
