"""Reading the predictions for many rows of token ids. A beginning that rows share is computed once."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from repeng.model.logprob import read_vocabulary
from repeng.model.packing import common_beginning
from repeng.model.sharded import is_sharded
from repeng.model.tokens import pad_rows
from repeng.model.types import CausalLM

SHORTEST = 8  # least number of shared tokens for which a separate forward pass pays
Span = tuple[int, int]  # first and last + 1 of the token positions of a row at which predictions are read
Read = Callable[[Tensor, Callable[[Tensor], Tensor], list[int]], Tensor]


class Group(NamedTuple):
    """Indices of rows that begin with the same `shared` tokens."""

    members: list[int]
    shared: int


def read_rows(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    spans: Sequence[Span],
    read: Read,
    *,
    plain: bool,
    share: bool = True,
    batch_size: int = 128,
) -> list[Tensor]:
    """Apply `read` to the next-token predictions at `spans`; the result has one tensor per row.

    Args:
        model: causal language model.
        tokenizer: tokenizer whose padding token is used.
        rows: token ids.
        spans: for each row, the token positions at which the predictions are read.
        read: function of the final hidden states `(n d)` at the positions of several rows, the function that maps
            states to logits, and the indices of these rows. It returns `(n …)`, float32.
        plain: whether the logits are the head's output for the final states, see `has_plain_head`; otherwise `read`
            gets the logits and the identity.
        share: whether a common beginning of rows is computed once; see `can_share`.
        batch_size: rows per forward pass.
    """
    parts: dict[int, Tensor] = {}
    for group in _groups(rows, spans, batch_size, share=share and not is_sharded(model)):
        prefix = rows[group.members[0]][: group.shared]
        cache = _cache_of(model, prefix, len(group.members)) if prefix else None
        start = len(prefix) if cache is not None else 0
        batch: dict[str, Any] = pad_rows(
            [rows[i][start:] for i in group.members], tokenizer, model.device, side="right"
        )
        mask = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        for line, i in enumerate(group.members):
            mask[line, spans[i][0] - start : spans[i][1] - start] = True
        if cache is not None:
            ones = batch["attention_mask"].new_ones(len(group.members), start)
            batch["attention_mask"] = torch.cat([ones, batch["attention_mask"]], dim=1)
            batch["position_ids"] = batch["position_ids"] + start
            batch |= {_cache_argument(model): cache, "use_cache": True}
        (values,) = read_vocabulary(
            model, batch, lambda hs, head, m=mask, g=group: [read(hs[m.to(hs.device)], head, g.members)], plain=plain
        )
        lengths = [spans[i][1] - spans[i][0] for i in group.members]
        parts |= dict(zip(group.members, values.cpu().split(lengths), strict=True))
    return [parts[i] for i in range(len(rows))]


def _groups(rows: Sequence[Sequence[int]], spans: Sequence[Span], batch_size: int, *, share: bool) -> list[Group]:
    """Batches of at most `batch_size` rows. Rows with a common beginning form one batch if that saves tokens."""
    order = sorted(range(len(rows)), key=lambda i: list(rows[i]))
    found: list[Group] = []
    for i in order if share else ():
        if found:
            members, shared = found[-1]
            common = common_beginning(rows[members[0]][:shared], rows[i][: spans[i][0]])
            saved = shared * (len(members) - 1)
            if common >= SHORTEST and common * len(members) >= saved and len(members) < batch_size:
                found[-1] = Group([*members, i], common)
                continue
        found.append(Group([i], spans[i][0]))
    together = [group for group in found if len(group.members) > 1]
    joined = {i for group in together for i in group.members}
    alone = [i for i in order if i not in joined]
    return together + [Group(alone[at : at + batch_size], 0) for at in range(0, len(alone), batch_size)]


@torch.no_grad()
def can_share(model: CausalLM, ids: Sequence[int]) -> bool:
    """Whether the prediction after `ids` is the same if all tokens but the last come from a key-value cache.

    The model is tested with the steering that is active. The result is False if steering depends on how a text is
    split into forward passes.
    """
    if len(ids) < 2 or is_sharded(model):
        return False
    cache = _cache_of(model, ids[:-1], 1)
    if cache is None:
        return False
    forward = cast(Any, model)
    row, last = torch.tensor([ids], device=model.device), torch.tensor([ids[-1:]], device=model.device)
    behind = {_cache_argument(model): cache, "use_cache": True, "attention_mask": torch.ones_like(row)}
    whole = forward(input_ids=row, use_cache=False).logits[0, -1].float()
    cut = forward(input_ids=last, position_ids=torch.full_like(last, len(ids) - 1), **behind).logits[0, -1].float()
    return torch.allclose(whole, cut, rtol=1e-3, atol=1e-2)


def _cache_argument(model: CausalLM) -> str:
    """The name of the key-value cache among the arguments of this model's forward pass."""
    base = getattr(model, "get_base_model", lambda: model)()
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def _cache_of(model: CausalLM, prefix: Sequence[int], n: int) -> Cache | None:
    """The key-value cache of a beginning, repeated for `n` rows; None if the model keeps another kind of state."""
    ids = torch.tensor([prefix], device=model.device)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True, "logits_to_keep": 1}
    output = cast(Any, model)(**whole)
    cache = output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)
    if type(cache) is not DynamicCache or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return None
    cache.batch_repeat_interleave(n)
    return cache
