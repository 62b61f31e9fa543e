"""Hidden states of many prompts at many sites, collected in one pass, and gradients of a loss with respect to them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Literal, NamedTuple

import torch
from einops import reduce
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from repeng.model.logprob import kl_divergence
from repeng.model.packing import batch_rows, model_inputs, packing_for, shared_tokens
from repeng.model.sites import Place, decoder_layers, edit_outputs, eval_mode, site_modules
from repeng.model.tokens import last_tokens, pad_rows
from repeng.model.types import CausalLM

TRIED = 4  # rows for the trial whether a model accepts packed rows
SAVED = 4096  # least number of saved tokens for which the trial pays
Tokens = int | str
Loss = Callable[[Tensor, Tensor], Tensor]


class _Deepest(Exception):
    """Ends a forward pass after the deepest layer that is read: the later layers are not needed."""


class Tap(NamedTuple):
    """A module, and the end at which it is read: its first input or its output."""

    module: nn.Module
    end: Literal["input", "output"]


@dataclass(frozen=True)
class Gradients:
    """Gradients `(2b d)` by place.

    Attributes:
        descent: minus the gradient of the loss.
        scores: random scores whose covariance is the Fisher information matrix.
    """

    descent: dict[Place, Tensor]
    scores: dict[Place, Tensor]


def token_weights(attention_mask: Tensor, tokens: Tokens) -> Tensor:
    """Weights `(b t)` of the tokens that are read; each row sums to 1.

    Args:
        attention_mask: mask `(b t)` of the real tokens.
        tokens: "last" for the last token, n for the last n tokens, or "mean" for all tokens.

    Raises:
        ValueError: `tokens` has another value.
    """
    if tokens == "mean":
        return attention_mask / attention_mask.sum(dim=1, keepdim=True)
    n = 1 if tokens == "last" else tokens
    if isinstance(n, str) or not isinstance(n, int | Integral) or n < 1:
        raise ValueError(f"tokens must be 'last', 'mean', or the number of last tokens to read; got {tokens!r}")
    index, exists = last_tokens(attention_mask, int(n))
    weights = torch.zeros(attention_mask.shape, device=attention_mask.device)
    return weights.scatter_add_(1, index, exists / exists.sum(dim=1, keepdim=True))


def _read(output: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of `output (b t d)` over tokens, `(b d)` float32; a token of weight 0 may be NaN."""
    weights = weights.to(output.device)[..., None]
    return reduce(torch.where(weights > 0, output.float() * weights, 0.0), "b t d -> b d", "sum")


@torch.no_grad()
def collect(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    taps: Sequence[Tap],
    deepest: nn.Module,
    *,
    tokens: Tokens,
    batch_size: int = 32,
) -> list[Tensor]:
    """The input or output of each tapped module, averaged over tokens by `token_weights`: `(rows d)`, float32, CPU.

    Common beginnings of rows are computed once if they are long and the model accepts packed rows; otherwise rows of
    similar length share a batch. The forward pass ends after `deepest`, so no logits are computed. The tensor of a
    module that does not run on text is empty.
    """
    parts: list[list[Tensor]] = [[] for _ in taps]
    weights = where = torch.empty(0)

    def keep(part: list[Tensor], states: Tensor) -> Tensor:
        part.append(_read(states.flatten(0, 1)[where.to(states.device)], weights).cpu())
        return states

    def before(part: list[Tensor], _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        keep(part, args[0])

    def stop(_output: Tensor) -> Tensor:
        raise _Deepest

    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        packing = None
        if shared_tokens(rows) > SAVED:
            some = sorted(map(list, rows))[:TRIED]
            packing = packing_for(model, [max(rows, key=len), *some], max(map(len, rows)))
        for (module, end), part in zip(taps, parts, strict=True):
            if end == "input":
                stack.callback(module.register_forward_pre_hook(partial(before, part)).remove)
            else:
                stack.enter_context(edit_outputs([(module, partial(keep, part))]))
        stack.enter_context(edit_outputs([(deepest, stop)]))
        together = len if packing is None else list
        order = sorted(range(len(rows)), key=lambda i: together(rows[i]), reverse=True)
        for start in tqdm(range(0, len(rows), batch_size), desc="hidden states", leave=False, delay=1):
            chunk = [rows[i] for i in order[start : start + batch_size]]
            batch = {name: x.to(model.device) for name, x in batch_rows(chunk, tokenizer, packing).items()}
            weights, where = token_weights(batch["attention_mask"], tokens), batch["where"]
            try:
                model(**model_inputs(batch, model.dtype), use_cache=False)
            except _Deepest:
                pass
    back = torch.tensor(order).argsort()
    return [torch.cat(part)[back] if part else torch.empty(0, 0) for part in parts]


def hidden_states(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    places: Sequence[Place],
    *,
    tokens: Tokens = "last",
    batch_size: int = 32,
) -> dict[Place, Tensor]:
    """Hidden states `(rows d)` by (site, layer), read by `collect`. Sites that do not run on text are left out."""
    taps = [Tap(module, "output") for module in site_modules(model, places)]
    deepest = decoder_layers(model)[max(layer for _, layer in places)]
    states = collect(model, tokenizer, rows, taps, deepest, tokens=tokens, batch_size=batch_size)
    return {place: rows for place, rows in zip(places, states, strict=True) if rows.numel()}


def persona_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """`KL(p_chosen ‖ p_rejected) − KL(p_rejected ‖ p_chosen)` `(b)` of next-token logits `(b v)`.

    No gradient flows through the first argument of each KL. Lowering the loss makes the model continue the rejected
    prompt more like the chosen one, and the chosen prompt less like the rejected one.
    """
    return kl_divergence(chosen.detach(), rejected) - kl_divergence(rejected.detach(), chosen)


def _checked(loss: Tensor, b: int) -> Tensor:
    """Return the loss if it has one value per pair, else raise ValueError: a mean would weigh pairs by batch size."""
    if not isinstance(loss, Tensor) or loss.shape != (b,) or not loss.requires_grad:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must return one value with gradient per pair, shape ({b},); got {what}")
    return loss


def fisher_noise(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Random vectors `(b v)` with covariance `diag p − p pᵀ`, where p is the softmax of each row."""
    root = logits.softmax(dim=-1).sqrt()
    scaled = root * torch.randn(logits.shape, generator=generator).to(logits.device)
    return scaled - root.square() * scaled.sum(dim=-1, keepdim=True)


def gradients(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    places: Sequence[Place],
    *,
    loss: Loss = persona_loss,
    tokens: Tokens = "last",
    batch_size: int = 16,
    seed: int = 0,
) -> Gradients:
    """Gradients of `loss` and of random scores at the sites, `(2b d)` in rows `[chosen ; rejected]`.

    `loss` takes the next-token logits `(b v)` of both sides and returns `(b)`. A score is `Jᵀ a`, where J is the
    derivative of the logits and `a = √p ∘ z − p (√p·z)` with z standard normal. Its covariance `Jᵀ (diag p − p pᵀ) J`
    is the Fisher information of the activation. The estimate has less variance than gradients of log p of sampled
    tokens. Parameters get no gradients.
    """
    modules = site_modules(model, places)
    seen: list[Tensor] = [torch.empty(0)] * len(places)
    generator = torch.Generator().manual_seed(seed)

    def keeper(index: int) -> Callable[[Tensor], Tensor]:
        def keep(output: Tensor) -> Tensor:
            seen[index] = output if output.requires_grad else output.detach().requires_grad_()
            return seen[index]

        return keep

    descent: list[list[list[Tensor]]] = [[[], []] for _ in places]
    scores: list[list[list[Tensor]]] = [[[], []] for _ in places]
    edits = [(module, keeper(index)) for index, module in enumerate(modules)]
    frozen = [p for p in model.parameters() if p.requires_grad]
    with eval_mode(model), torch.inference_mode(False), torch.enable_grad(), edit_outputs(edits):
        for p in frozen:
            p.requires_grad_(False)
        try:
            for start in tqdm(range(0, len(pairs), batch_size), desc="gradients", leave=False, delay=1):
                chunk = pairs[start : start + batch_size]
                ids = [pair[side] for side in (0, 1) for pair in chunk]
                batch = pad_rows(ids, tokenizer, model.device, side="left")
                weights = token_weights(batch["attention_mask"], tokens)
                logits = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].float()
                chosen, rejected = logits.chunk(2)
                noise = fisher_noise(logits.detach(), generator)
                down = torch.autograd.grad(
                    -_checked(loss(chosen, rejected), len(chunk)).sum(), seen, retain_graph=True
                )
                up = torch.autograd.grad((logits * noise).sum(), seen)
                for into, computed in ((descent, down), (scores, up)):
                    for sides, gradient in zip(into, computed, strict=True):
                        # The gradient for one shift of all tokens that are read: the sum over these tokens.
                        counted = (weights > 0).to(gradient.device)[..., None]
                        rows = torch.where(counted, gradient.float(), 0.0).sum(dim=1).cpu()
                        for side, part in zip(sides, rows.chunk(2), strict=True):
                            side.append(part)
        finally:
            for p in frozen:
                p.requires_grad_(True)
    return Gradients(
        *(
            {place: torch.cat([torch.cat(side) for side in sides]) for place, sides in zip(places, parts, strict=True)}
            for parts in (descent, scores)
        )
    )
