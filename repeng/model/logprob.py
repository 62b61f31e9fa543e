"""Log-probabilities of given tokens, computed without a full log-softmax and without the logits of all tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repeng.model.sites import trunk

CHUNK = 1 << 22  # number of logits that are converted to float32 at a time


def head_logp(hs: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk: int | None = None) -> Tensor:
    """Log-probabilities `(n)`, float32, of `targets (n)` under `head`, from final hidden states `hs (n d)`.

    Logits are computed for `chunk` tokens at a time, by default as many as `CHUNK` allows, and recomputed in the
    backward pass. So memory does not grow with the number of tokens times the vocabulary size.
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
    """`head_logp` of the states at indices `where (n)` of `hs (m d)`. Repeated (state, target) are computed once."""
    once, back = torch.unique(torch.stack([where, targets]), dim=1, return_inverse=True)
    return head_logp(hs[once[0]], head, once[1])[back]


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """`KL(p ‖ q)` in nats, `(…)`, of distributions with logits `p` and `q`, `(… v)`; exactly 0 for equal logits."""
    logp, logq = p.log_softmax(dim=-1), q.log_softmax(dim=-1)
    return (logp.exp() * (logp - logq)).sum(dim=-1)


@torch.no_grad()
def tokens_at_once(hs: Tensor, head: Callable[[Tensor], Tensor]) -> int:
    """The number of tokens whose logits fit into `CHUNK`, for final hidden states `hs (n d)`."""
    return max(1, CHUNK // head(hs[:1]).shape[-1])


def read_vocabulary(
    model: nn.Module,
    batch: dict[str, Any],
    read: Callable[[Tensor, Callable[[Tensor], Tensor]], Sequence[Tensor]],
    *,
    plain: bool,
    forward: Callable[..., Any] | None = None,
) -> list[Tensor]:
    """Run one forward pass and return the results of `read(states, head)` in it.

    `read` gets the final hidden states `(b t d)` and the function that maps states to logits. It runs inside the
    model's forward pass, in place of the head. Its results are returned as the model's output, because under FSDP the
    head's weights are gathered only inside forward and backward. If the logits are not simply the head's output
    (`plain` False), the model computes the full logits, and `read` gets these and the identity as head.

    Args:
        model: causal language model, with or without PEFT.
        batch: inputs of the model, with a key-value cache if the rows continue from it.
        read: function that returns float32 tensors of any shapes.
        plain: whether the logits are the head's output for the final states; see `has_plain_head`.
        forward: the callable that runs the forward pass, if `model` is wrapped (DDP); None for `model` itself.
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
        # The hook runs before the hooks of a sharding wrapper, so these see its output as the output of the head.
        hook = cast(nn.Module, _head(model)).register_forward_hook(instead, prepend=True)
        try:
            packed = forward(**{"use_cache": False, "logits_to_keep": 1, **batch}).logits
        finally:
            hook.remove()
    parts = packed.flatten().split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _head(model: nn.Module) -> nn.Module | None:
    """The output embeddings; None if the model has none."""
    return getattr(model, "get_output_embeddings", lambda: None)()


@contextmanager
def _final_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the context, each forward pass appends the head's input states `(b t d)` to the yielded list."""
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
    """Whether the logits are the output embeddings applied to the final states, without a later soft-cap or factor."""
    head = _head(model)
    if head is None or any(True for _ in head.children()):
        return False  # no head, or a head with an adapter, which depends on the coefficient
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
        return False  # the model uses the weights of its head without calling the module
    # A wrapper may return its output in another precision.
    pairs = zip(made[0], (seen[0], logits), strict=True)
    return all(a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3) for a, b in pairs)
