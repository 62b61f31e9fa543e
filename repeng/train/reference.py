"""Outputs of the frozen base model on the training examples. They are computed once, since the base never changes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from einops import einsum, rearrange, reduce
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.control.steer import steer
from repeng.model.activations import Tap, collect
from repeng.model.logprob import has_plain_head, head_logp_at, read_vocabulary
from repeng.model.packing import model_inputs
from repeng.model.sites import capture, decoder_layers, eval_mode, layers_of, site_module
from repeng.model.tokens import label_mask, last_tokens, special_id
from repeng.model.types import CausalLM
from repeng.train.collator import PROMPTS, SIDES, Example, PairCollator, ReferencedExample
from repeng.tuner.config import SvdSteeringConfig
from repeng.tuner.targets import is_linear

LEAST_GAP, LEAST_WEIGHT = 0.1, 0.01
NEXT_TOKENS = 32  # tokens per persona in the gap: the rest of the vocabulary hardly matters


@torch.no_grad()
def add_reference(
    model: CausalLM,
    collate: PairCollator,
    examples: Sequence[Example],
    *,
    site: str,
    layer: int,
    last_n: int,
    batch_size: int,
    steer_fn: Callable[[nn.Module, float], AbstractContextManager[None]] = steer,
) -> list[ReferencedExample]:
    """Add the outputs of the base model, at c = 0, to the examples.

    `ref_hs (3 n d)` and `ref_mask (3 n)` belong to the prompts, `ref_logp` is four 1-d tensors, and `next_ids (k)`,
    `next_weight (k)`, `ref_gap (3)` and `gap_weight ()` belong to the token that follows the prompts.
    """
    module, bos = site_module(model, layer, site), special_id(collate.tokenizer, "bos")
    plain = has_plain_head(model, examples[0]["chosen_ids"])
    order = sorted(range(len(examples)), key=lambda i: examples[i]["neutral_ids"])  # equal texts share a batch
    done: dict[int, ReferencedExample] = {}
    with eval_mode(model), steer_fn(model, 0.0):
        for start in tqdm(range(0, len(examples), batch_size), desc="reference", leave=False):
            members = order[start : start + batch_size]
            part = [examples[i] for i in members]
            batch = {name: tensor.to(model.device) for name, tensor in collate(part).items()}
            references = _batch_reference(model, module, batch, last_n=last_n, plain=plain, bos=bos)
            for i, of_it in zip(members, references, strict=True):
                done[i] = cast(ReferencedExample, {**examples[i], **of_it})
    return [done[i] for i in range(len(examples))]


def _batch_reference(
    model: CausalLM, module: nn.Module, batch: dict[str, Tensor], *, last_n: int, plain: bool, bos: list[int]
) -> list[dict[str, Any]]:
    """The tensors that `add_reference` adds to each example of a collated batch, on the CPU."""
    mask, where = batch["attention_mask"], batch["where"]
    n, prompts = mask.shape[0] // len(SIDES), len(PROMPTS)
    labels, (ends, _), (index, exists) = (
        label_mask(mask),
        last_tokens(mask[: prompts * n], 1),
        last_tokens(mask[: prompts * n], last_n),
    )
    said: dict[str, Tensor] = {}

    def read(states: Tensor, head: Callable[[Tensor], Tensor]) -> list[Tensor]:
        states = states.flatten(0, 1)
        last = head(states[where[: prompts * n].gather(1, ends)]).float()
        said.update(_next_token_disagreement(rearrange(last, "(p b) 1 v -> p b v", p=prompts)))
        return [head_logp_at(states, head, where[:, :-1][labels], batch["input_ids"][:, 1:][labels])]

    with capture([module]) as outputs:
        (logp,) = read_vocabulary(model, model_inputs(batch, model.dtype), read, plain=plain)
    hs = cast(Tensor, outputs[0]).flatten(0, 1)
    hs = hs[where[: prompts * n].gather(1, index).to(hs.device)].float()
    for token in bos:  # an attention sink: its hidden state does not depend on the text
        exists = exists & (batch["input_ids"][: prompts * n].gather(1, index) != token)
    hs, exists = (rearrange(x, "(p b) ... -> b p ...", p=prompts).cpu() for x in (hs, exists))
    rows = logp.cpu().split(labels.sum(dim=1).tolist())
    said = {name: tensor.cpu() for name, tensor in said.items()}
    return [
        {
            "ref_hs": hs[i],
            "ref_mask": exists[i],
            "ref_logp": [*rows[i::n]],
            **{name: tensor[i] for name, tensor in said.items()},
        }
        for i in range(n)
    ]


def _next_token_disagreement(logits: Tensor) -> dict[str, Tensor]:
    """Next tokens that tell chosen and rejected apart, from the base model's logits `(p b v)` after the prompts.

    Let `d = softmax(chosen) − softmax(rejected)`. `next_ids (b k)` are the `NEXT_TOKENS` tokens with the largest d and
    as many with the smallest. `next_weight (b k)` is d at these tokens, scaled to sum to 1 over the former and to −1
    over the latter. A gap is `Σ weight · logit`: the mean log-probability of the tokens that chosen makes likelier,
    minus that of the tokens that rejected makes likelier. `ref_gap (b p)` is the gap of the base model. `gap_weight
    (b)` is the total variation `Σ |d| / 2`, from 0 to 1.
    """
    chosen, rejected = logits[:2].softmax(dim=-1)
    difference = chosen - rejected
    n = min(NEXT_TOKENS, difference.shape[-1] // 2)
    ids, weights, tiny = [], [], torch.finfo(difference.dtype).tiny
    for sign in (1, -1):  # separately: else a concentrated side would take all tokens from a diffuse one
        top = (sign * difference).clamp(min=0).topk(n, dim=-1)
        ids.append(top.indices)
        weights.append(sign * top.values / top.values.sum(-1, keepdim=True).clamp_min(tiny))
    next_ids, weight = torch.cat(ids, dim=-1), torch.cat(weights, dim=-1)
    ref_gap = gap(rearrange(logits, "p b v -> b p v"), next_ids, weight)
    return {
        "next_ids": next_ids,
        "next_weight": weight,
        "ref_gap": ref_gap,
        "gap_weight": difference.abs().sum(-1) / 2,
    }


def gap(logits: Tensor, next_ids: Tensor, next_weight: Tensor) -> Tensor:
    """`Σ_k weight · logit` of logits `(b … v)` at `next_ids (b k)`; a constant added to the logits cancels out."""
    between = [1] * (logits.ndim - 2)
    index = next_ids.reshape(next_ids.shape[0], *between, -1).expand(*logits.shape[:-1], -1)
    return (logits.gather(-1, index) * next_weight.reshape(next_weight.shape[0], *between, -1)).sum(dim=-1)


def preference_direction(examples: Sequence[ReferencedExample], k: int) -> tuple[Tensor, Tensor]:
    """Directions `(d k)`, signed toward chosen, and the mean distance `(k)` between the two sides along them.

    The directions are the leading right singular vectors of dHS `(b d)`: chosen minus rejected hidden states of the
    base model, averaged over the last tokens of a prompt, one row per pair.

    Raises:
        ValueError: `k` is larger than the number of pairs or than the width of the site.
    """
    hs = torch.stack([example["ref_hs"] for example in examples])  # (b p n d)
    weight = torch.stack([example["ref_mask"] for example in examples]).float()  # (b p n)
    means = einsum(hs, weight, "b p n d, b p n -> b p d") / reduce(weight, "b p n -> b p 1", "sum")
    dhs = means[:, 0] - means[:, 1]
    if k > min(dhs.shape):
        raise ValueError(f"num_directions={k} is above {min(dhs.shape)}, the rank that {len(examples)} pairs can have")
    direction = torch.linalg.svd(dhs, full_matrices=False).Vh[:k].mT.contiguous()
    along = dhs @ direction
    sign = torch.where(along.mean(dim=0) < 0, -1.0, 1.0)
    return direction * sign, along.abs().mean(dim=0)


def persona_gap(examples: Sequence[ReferencedExample]) -> tuple[float, float]:
    """How far the gap of the chosen prompt is above that of the rejected prompt, in nats, and the mean `gap_weight`.

    The first is a mean over the pairs, weighted by `gap_weight`. Both have a lower bound: where the personas hardly
    act, noise must not become the target.
    """
    weight = torch.stack([example["gap_weight"] for example in examples])
    gaps = torch.stack([example["ref_gap"][0] - example["ref_gap"][1] for example in examples])
    nats = (weight * gaps).sum() / weight.sum().clamp_min(1e-6)
    return max(nats.item(), LEAST_GAP), max(weight.mean().item(), LEAST_WEIGHT)


def pair_differences(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], last_n: int
) -> dict[str, Tensor]:
    """Chosen minus rejected activations `(b d)` of the base model for each adapted module, by name.

    The activation is the input of a linear module or the output of a decoder layer, averaged over the last tokens of a
    prompt.
    """
    config = cast(SvdSteeringConfig, model.peft_config[cast(str, model.active_adapter)])
    names = config.resolved_modules or []
    base = cast(PreTrainedModel, model.get_base_model())
    modules = [base.get_submodule(name) for name in names]
    taps = [Tap(module, "input" if is_linear(module) else "output") for module in modules]
    rows = [example[side] for side in ("chosen_ids", "rejected_ids") for example in examples]
    layers = decoder_layers(base)
    deepest = layers[max(layers_of(base, modules), default=len(layers) - 1)]
    with steer(model, 0.0):
        read = collect(base, tokenizer, rows, taps, deepest, tokens=last_n)
    return {name: states[: len(examples)] - states[len(examples) :] for name, states in zip(names, read, strict=True)}
