"""Rows of token ids packed as trees: a common beginning is computed once, and there is no padding between rows."""

import itertools
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from repeng.model.logprob import kl_divergence
from repeng.model.tokens import pad_rows

LONGEST = 512  # tokens per packed row; the cost of attention grows with the square
SAME = 1e-3  # nats per token by which packing may change the predictions; kernels and precisions change them less
MASKED = ("eager", "sdpa")  # attention implementations that accept any mask
PACKED = "packed_"  # prefix of the names of the packed tensors in a batch
INPUTS = ("input_ids", "attention_mask", "position_ids")
SLOTS = ("window_size", "attention_chunk_size")  # keys of models whose windows count indices, not position ids


class Packing(NamedTuple):
    """How rows are packed for a model.

    Attributes:
        longest: maximum tokens per packed row; a row that is longer is packed alone.
        window: the number of tokens to which each token attends, itself included; None for all.
    """

    longest: int = LONGEST
    window: int | None = None


def pack(rows: Sequence[Sequence[int]], packing: Packing) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Pack rows, and tell where the tokens of each row are in the packed rows.

    A packed row is a tree of tokens. Each row is a path from a root, and each token attends only to its own path.

    Args:
        rows: token ids.
        packing: limits of the packed rows.

    Returns:
        `input_ids (n t)`, `position_ids (n t)` (the depths in the tree) and `attention_mask (n 1 t t)`, bool; and for
        each row the indices of its tokens in the flattened `(n t)`.
    """
    trees: list[dict[tuple[int, int], int]] = [{}]  # (parent, token) → node; a parent comes before its children
    paths: dict[int, tuple[int, list[int]]] = {}
    for index in sorted(range(len(rows)), key=lambda i: list(rows[i])):  # rows with a common beginning are neighbours
        row = rows[index]
        new, path = _grown(trees[-1], row)
        if trees[-1] and len(new) > max(packing.longest, len(trees[-1])):
            trees.append({})
            new, path = _grown(trees[-1], row)
        trees[-1] = new
        paths[index] = len(trees) - 1, path
    width = max(map(len, trees))
    ids, positions = torch.zeros(2, len(trees), width, dtype=torch.long)
    reads = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1, 1)  # a mask row without True would give NaN
    for tree, path in paths.values():
        nodes = torch.tensor(path)
        positions[tree, nodes] = torch.arange(len(path))
        distance = torch.arange(len(path))[:, None] - torch.arange(len(path))
        reads[tree, 0, nodes[:, None], nodes] |= (distance >= 0) & (distance < (packing.window or len(path)))
    for index, tree in enumerate(trees):
        ids[index, : len(tree)] = torch.tensor([token for _, token in tree])
    where = [[tree * width + node for node in path] for tree, path in (paths[i] for i in range(len(rows)))]
    return {"input_ids": ids, "attention_mask": reads, "position_ids": positions}, where


def _grown(tree: dict[tuple[int, int], int], row: Sequence[int]) -> tuple[dict[tuple[int, int], int], list[int]]:
    """A copy of the tree with a row added, and the nodes of the row."""
    grown, path = dict(tree), [-1]
    for token in row:
        path.append(grown.setdefault((path[-1], token), len(grown)))
    return grown, path[1:]


def batch_rows(
    rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, packing: Packing | None
) -> dict[str, Tensor]:
    """Rows padded to `(b t)`, and with `packing` also the packed rows.

    `model_inputs` selects the rows that the model reads. `where (b t)` maps each token of the padded rows to its index
    in the flattened rows that the model reads; with `packing` it is 0 for padding.
    """
    batch = pad_rows(rows, tokenizer)
    where = torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"])
    if packing is not None:
        packed, paths = pack(rows, packing)
        batch |= {PACKED + name: tensor for name, tensor in packed.items()}
        where = torch.zeros_like(where)
        where[batch["attention_mask"].bool()] = torch.tensor([node for path in paths for node in path])
    return {**batch, "where": where}


def rows_read(batch: dict[str, Tensor]) -> int:
    """The number of rows that the model reads for a batch of `batch_rows`."""
    return batch.get(PACKED + INPUTS[0], batch[INPUTS[0]]).shape[0]


def model_inputs(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's inputs from a batch of `batch_rows`; `dtype` is the model's, for the mask of packed rows."""
    if PACKED + INPUTS[0] not in batch:
        return {name: batch[name] for name in INPUTS}
    inputs = {name: batch[PACKED + name] for name in INPUTS}
    return {**inputs, "attention_mask": additive(inputs["attention_mask"], dtype)}


def shared_tokens(rows: Sequence[Sequence[int]]) -> int:
    """The number of tokens that packing all rows together saves."""
    return sum(common_beginning(one, other) for one, other in itertools.pairwise(sorted(map(list, rows))))


def common_beginning(left: Sequence[int], right: Sequence[int]) -> int:
    """The length of the common beginning of two rows, in tokens."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask to add to the attention scores: 0 where a token attends, the least number of the dtype elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


@torch.no_grad()
def packing_for(model: nn.Module, rows: Sequence[Sequence[int]], longest: int) -> Packing | None:
    """The packing with which the model predicts rows as it does alone; None if rows cannot be packed.

    Packing is impossible if a layer processes tokens in sequence (recurrence, convolution), if the attention takes no
    mask, or if only some layers have a sliding window and it is shorter than a row.

    Args:
        model: causal language model.
        rows: some rows of token ids with a common beginning, for a trial.
        longest: tokens of the longest row to be packed.
    """
    config = cast(Any, model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    mixed = len(set(getattr(config, "layer_types", None) or ())) > 1
    slots = [getattr(config, name, None) for name in SLOTS]
    if config._attn_implementation not in MASKED or (mixed and window and longest > window) or any(slots):
        return None
    packing = Packing(window=None if mixed else window)
    device, dtype = next(model.parameters()).device, cast(Any, model).dtype
    batch, where = pack(rows, packing)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    batch["attention_mask"] = additive(batch["attention_mask"], dtype)
    try:
        packed = model(**batch, use_cache=False).logits.flatten(0, 1)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None  # the model does not accept masks or positions of this form
    for row, path in zip(rows, where, strict=True):
        alone = model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0]
        if not kl_divergence(alone.float(), packed[path].float()).mean() < SAME:
            return None
    return packing
