"""What the frozen base gives on the training examples: computed once, since the base never changes."""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.control import steer
from repeng.data import PairCollator, label_mask, last_tokens
from repeng.logprob import next_token_logp
from repeng.sites import capture, site_module


@torch.no_grad()
def add_reference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    *,
    site: str,
    layer: int,
    last_n: int,
    batch_size: int,
) -> list[dict]:
    """The examples with `ref_hs (2 n d)`, `ref_mask (2 n)` and `ref_logp` (three 1-d tensors), at c = 0."""
    collate, module = PairCollator(tokenizer), site_module(model, layer, site)
    was_training, done = model.training, []
    model.eval()
    try:
        with steer(model, 0.0):
            for start in tqdm(range(0, len(examples), batch_size), desc="reference", leave=False):
                chunk = examples[start : start + batch_size]
                batch = {name: tensor.to(model.device) for name, tensor in collate(chunk).items()}
                with capture([module]) as outputs:
                    logits = model(**batch, use_cache=False).logits
                mask = batch["attention_mask"]
                index, exists = last_tokens(mask[: 2 * len(chunk)], last_n)
                hs = gather_tokens(outputs[0][: 2 * len(chunk)], index).float()
                hs, exists = (rearrange(x, "(p b) ... -> b p ...", p=2).cpu() for x in (hs, exists))
                logp, labels = next_token_logp(logits, batch["input_ids"]).cpu(), label_mask(mask).cpu()
                for i, example in enumerate(chunk):
                    rows = range(i, 3 * len(chunk), len(chunk))
                    kept = [logp[row][labels[row]] for row in rows]
                    done.append({**example, "ref_hs": hs[i], "ref_mask": exists[i], "ref_logp": kept})
    finally:
        model.train(was_training)
    return done


def gather_tokens(hs: Tensor, index: Tensor) -> Tensor:
    """Hidden states `(b n d)` at token indices `(b n)` of `hs (b t d)`."""
    return hs[torch.arange(hs.shape[0], device=hs.device)[:, None], index.to(hs.device)]


def preference_direction(examples: Sequence[dict], k: int) -> tuple[Tensor, Tensor]:
    """Directions `(d k)`, signed toward chosen, and the mean distance `(k)` of the two sides along them.

    The right singular vectors of dHS `(b d)`: chosen minus rejected hidden states of the base, each the mean over the
    last tokens of a prompt, stacked over the pairs.

    Raises:
        ValueError: more directions than pairs or than the width of the site.
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
