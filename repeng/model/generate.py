"""Generation from token ids: continuations, and thinking of limited length."""

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
def bare_generation(model: CausalLM) -> Iterator[None]:
    """Inside the context, the generation config of the model holds only its special tokens.

    Otherwise the model's own settings, such as a repetition penalty, would apply as defaults and hide the effect of
    steering.
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


def ends_and_pad(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> tuple[set[int], int]:
    """The tokens that end a text, and the token that fills a row after its end."""
    given: Any = model.generation_config.eos_token_id
    ends = set(given if isinstance(given, list) else [given]) - {None}
    pad = cast(int | None, tokenizer.pad_token_id)
    return ends, min(ends, default=0) if pad is None else pad


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
    """The continuation of each row, and the token that ended it before the limit (None if no token did).

    Args:
        model: model that generates.
        tokenizer: its tokenizer.
        rows: token ids.
        max_new_tokens: maximum length of a continuation, including the token that ends it.
        batch_size: rows per forward pass.
        stop: a text after which a row may also end; padding then follows it in the continuation.
        seed: seed for sampling at temperature 1; None for greedy decoding.
    """
    ends, pad = ends_and_pad(model, tokenizer)
    settings = {"do_sample": seed is not None, "pad_token_id": pad, "max_new_tokens": max_new_tokens}
    if is_sharded(model):
        settings["synced_gpus"] = True  # otherwise the other processes would wait for a process that ends earlier
    if seed is not None:
        settings |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if stop is not None:
        tag = tokenizer(stop, add_special_tokens=False)["input_ids"]
        # `stop_strings` is slower, and needs a search in the vocabulary that not every tokenizer allows.
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
        with bare_generation(model), torch.random.fork_rng(enabled=seed is not None):
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
    """Each row with the thinking that follows it, closed by the tag, and whether the model itself closed it."""
    thoughts = continuations(model, tokenizer, rows, max_new_tokens, len(rows), stop=THINK_CLOSE)
    whole, closed = [], []
    for row, (ids, _) in zip(rows, thoughts, strict=True):
        # In a batch, padding follows a row that has ended, and a token may extend beyond the tag.
        lengths = range(len(ids) + 1)
        until = bisect_left(lengths, True, key=lambda n, ids=ids: THINK_CLOSE in tokenizer.decode(ids[:n]))
        closed.append(until in lengths)
        ending = "\n\n" if closed[-1] else f"{THINK_CLOSE}\n\n"
        whole.append([*row, *ids[:until], *tokenizer(ending, add_special_tokens=False)["input_ids"]])
    return whole, closed
