"""Log-probabilities of given tokens without a full log-softmax, and without the logits of all tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repeng.model.sites import trunk

CHUNK = 1 << 22  # logits upcast at a time


def head_logp(hs: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk: int | None = None) -> Tensor:
    """Log-probability `(n)`, float32, of the `targets (n)` that `head` gives from final hidden states `hs (n d)`.

    Logits exist for `chunk` tokens at a time, by default as many as `CHUNK` allows, and are made again in backward, so
    that memory does not grow with the number of tokens times the vocabulary.
    """

    def some(states: Tensor, ids: Tensor) -> Tensor:
        logits = head(states).float()
        return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)

    chunk = chunk or tokens_at_once(hs, head)
    parts = [
        checkpoint(some, states, ids, use_reentrant=False) if states.requires_grad else some(states, ids)
        for states, ids in zip(hs.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def head_logp_at(hs: Tensor, head: Callable[[Tensor], Tensor], where: Tensor, targets: Tensor) -> Tensor:
    """`head_logp` of the states `where (n)` of `hs (m d)`: a state and a target that come several times count once."""
    once, back = torch.unique(torch.stack([where, targets]), dim=1, return_inverse=True)
    return head_logp(hs[once[0]], head, once[1])[back]


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """`KL(p ‖ q)` in nats, `(…)`, of the distributions with logits `p` and `q`, `(… v)`; exactly 0 of equal ones."""
    logp, logq = p.log_softmax(dim=-1), q.log_softmax(dim=-1)
    return (logp.exp() * (logp - logq)).sum(dim=-1)


@torch.no_grad()
def tokens_at_once(hs: Tensor, head: Callable[[Tensor], Tensor]) -> int:
    """How many tokens' logits `CHUNK` allows at a time, for final hidden states `hs (n d)`."""
    return max(1, CHUNK // head(hs[:1]).shape[-1])


def read_vocabulary(
    model: nn.Module,
    batch: dict[str, Any],
    read: Callable[[Tensor, Callable[[Tensor], Tensor]], Sequence[Tensor]],
    *,
    plain: bool,
    forward: Callable[..., Any] | None = None,
) -> list[Tensor]:
    """What `read(states, head)` gives in one forward: final hidden states `(b t d)` and what makes logits of them.

    `read` runs inside the model's forward, in place of the head, and its results leave as the forward's output: only
    there are the weights of a sharded head together, in backward too. A head with something behind it (`plain` False)
    gives whole logits, and `read` gets those with the identity for a head.

    Args:
        model: causal language model, PEFT or not.
        batch: its inputs, a key-value cache among them if the rows go on from one.
        read: gives float32 tensors of any shapes.
        plain: whether logits are the head of the final states; see `has_plain_head`.
        forward: what to call, if `model` is wrapped by something (DDP).
    """
    forward = forward or model
    if not plain:
        return list(read(forward(**{"use_cache": False, **batch}).logits, nn.Identity()))
    shapes: list[torch.Size] = []

    def instead(head: nn.Module, _args: Any, _output: Any) -> Tensor:
        parts = read(final[0], head.forward)
        shapes.extend(part.shape for part in parts)
        return torch.cat([part.reshape(1, 1, -1) for part in parts], dim=-1)

    with _final_states(model) as final:
        # First of the hooks, so that those of a sharding wrapper see this output as the head's.
        hook = cast(nn.Module, _head(model)).register_forward_hook(instead, prepend=True)
        try:
            packed = forward(**{"use_cache": False, "logits_to_keep": 1, **batch}).logits
        finally:
            hook.remove()
    parts = packed.flatten().split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _head(model: nn.Module) -> nn.Module | None:
    """The output embeddings, if the model has any."""
    return getattr(model, "get_output_embeddings", lambda: None)()


@contextmanager
def _final_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the context, the yielded list gets the hidden states `(b t d)` that the head reads, of each forward."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output[0])

    hook = trunk(model).register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def has_plain_head(model: nn.Module, ids: Sequence[int]) -> bool:
    """Whether logits are what the output embeddings make of the final states, without a cap or a factor behind."""
    head = _head(model)
    if head is None or any(True for _ in head.children()):
        return False  # none, or an adapted one, which is not the same at every coefficient
    row = torch.tensor([ids], device=next(model.parameters()).device)
    made: list[tuple[Tensor, Tensor]] = []

    def keep(_module: nn.Module, args: Any, output: Any) -> None:
        made.append((args[0], output))

    hook = head.register_forward_hook(keep)
    try:
        with _final_states(model) as seen:
            logits = model(input_ids=row, use_cache=False).logits
    finally:
        hook.remove()
    if not made:
        return False  # the model uses the weights of its head, not the module
    # The precision of what a wrapper hands out may be another.
    pairs = zip(made[0], (seen[0], logits), strict=True)
    return all(a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3) for a, b in pairs)
