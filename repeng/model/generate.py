"""Generating from token ids: continuations, bounded thinking, and samples with what can be counted about them."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from repeng.model.sharded import is_sharded
from repeng.model.tokens import pad_rows
from repeng.model.types import CausalLM

THINK_CLOSE = "</think>"


@contextmanager
def _bare_generation(model: CausalLM) -> Iterator[None]:
    """Inside the context, `generate` knows only which tokens end and pad a text.

    A model's own settings, such as a repetition penalty, would otherwise fill in whatever is not said, and hide what
    steering does.
    """
    base_of_adapters = getattr(model, "get_base_model", None)
    owners: list[Any] = [model] if base_of_adapters is None else [model, base_of_adapters()]
    before = [owner.generation_config for owner in owners]
    settings = before[0]
    bare = GenerationConfig(
        bos_token_id=settings.bos_token_id, eos_token_id=settings.eos_token_id, pad_token_id=settings.pad_token_id
    )
    try:
        for owner in owners:
            owner.generation_config = bare
        yield
    finally:
        for owner, config in zip(owners, before, strict=True):
            owner.generation_config = config


@torch.no_grad()
def continuations(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 128,
    *,
    stop: str | None = None,
    seed: int | None = None,
) -> list[tuple[list[int], int | None]]:
    """What follows each row of ids; with each, the token that ended it before the limit, if one did.

    Args:
        model, tokenizer: what generates.
        rows: token ids.
        max_new_tokens: the longest continuation, its end included.
        batch_size: rows a forward.
        stop: a text behind which a row may end as well; it is then followed by padding.
        seed: draws at temperature 1 from it; None is greedy.
    """
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    settings = {"do_sample": seed is not None, "pad_token_id": pad, "max_new_tokens": max_new_tokens}
    if is_sharded(model):
        settings["synced_gpus"] = True  # a process that ends earlier would leave the others waiting
    if seed is not None:
        settings |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if stop is not None:
        tag = tokenizer(stop, add_special_tokens=False)["input_ids"]
        # Strings are searched for in the vocabulary, which not every tokenizer allows, and slower.
        if len(tag) == 1:
            settings["eos_token_id"] = [*ends, *tag]
        else:
            settings |= {"stop_strings": [stop], "tokenizer": tokenizer}
    generate = cast(Callable[..., Tensor], model.generate)
    followed = []
    for start in range(0, len(rows), batch_size):
        batch = pad_rows(rows[start : start + batch_size], tokenizer, model.device, side="left")
        width = batch["input_ids"].shape[1]
        del batch["position_ids"]  # `generate` derives them from the mask
        with _bare_generation(model), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed + start)
            out = generate(**batch, **settings)
        for row in out[:, width:].tolist():
            length = next((index for index, token in enumerate(row) if token in ends), None)
            followed.append((row[:length], None if length is None else row[length]))
    return followed


def think(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[list[list[int]], list[bool]]:
    """Each row with the thinking that follows it, closed, and whether the model closed it by itself."""
    thoughts = continuations(model, tokenizer, rows, max_new_tokens, len(rows), stop=THINK_CLOSE)
    whole, closed = [], []
    for row, (ids, _) in zip(rows, thoughts, strict=True):
        # Batched generation pads what has ended, and a token may reach beyond the tag.
        lengths = range(len(ids) + 1)
        until = bisect_left(lengths, True, key=lambda n, ids=ids: THINK_CLOSE in tokenizer.decode(ids[:n]))
        closed.append(until in lengths)
        ending = "\n\n" if closed[-1] else f"{THINK_CLOSE}\n\n"
        whole.append([*row, *ids[:until], *tokenizer(ending, add_special_tokens=False)["input_ids"]])
    return whole, closed
