"""Rows of token ids as trees: what rows begin with together is computed once, and nothing is padded between them."""

import itertools
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from repeng.model.logprob import kl_divergence
from repeng.model.tokens import pad_rows

LONGEST = 512  # tokens of a packed row: attention costs their square
SAME = 1e-3  # nats a token by which packed rows may be predicted otherwise; kernels and precisions differ in less
MASKED = ("eager", "sdpa")  # kinds of attention that take a mask of any form
PACKED = "packed_"  # begins the names of what is packed in a batch
INPUTS = ("input_ids", "attention_mask", "position_ids")
SLOTS = ("window_size", "attention_chunk_size")  # in configurations of models that count places, not positions


class Packing(NamedTuple):
    """How rows are packed for a model.

    Attributes:
        longest: tokens of a packed row; a longer row is alone.
        window: how many tokens each token reads, itself among them; None for all.
    """

    longest: int = LONGEST
    window: int | None = None


def pack(rows: Sequence[Sequence[int]], packing: Packing) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Packed rows, and where in them the tokens of each row lie.

    A packed row is a tree of tokens: each row is a path from a root, and each token reads its own path only.

    Args:
        rows: token ids.
        packing: how.

    Returns:
        `input_ids (n t)`, `position_ids (n t)`, the depths in the tree, and `attention_mask (n 1 t t)`, bool; and for
        each row the index of each of its tokens in the flattened `(n t)`.
    """
    trees: list[dict[tuple[int, int], int]] = [{}]  # (parent, token) → node; parents come first
    paths: dict[int, tuple[int, list[int]]] = {}
    for index in sorted(range(len(rows)), key=lambda i: list(rows[i])):  # what begins alike is together
        row = rows[index]
        new, path = _grown(trees[-1], row)
        if trees[-1] and len(new) > max(packing.longest, len(trees[-1])):
            trees.append({})
            new, path = _grown(trees[-1], row)
        trees[-1] = new
        paths[index] = len(trees) - 1, path
    width = max(map(len, trees))
    ids, positions = torch.zeros(2, len(trees), width, dtype=torch.long)
    reads = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1, 1)  # a row without any entry would be NaN
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
    """The tree with a row, and the nodes of the row."""
    grown, path = dict(tree), [-1]
    for token in row:
        path.append(grown.setdefault((path[-1], token), len(grown)))
    return grown, path[1:]


def batch_rows(
    rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, packing: Packing | None
) -> dict[str, Tensor]:
    """Rows padded to `(b t)`, and, with `packing`, packed beside that.

    `where (b t)` says which token of what the model reads, all its rows behind each other, is which token of the
    padded rows; 0 for padding that is not read. `model_inputs` are what the model reads.
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
    """How many rows the model reads of a batch of `batch_rows`."""
    return batch.get(PACKED + INPUTS[0], batch[INPUTS[0]]).shape[0]


def model_inputs(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What the model reads of a batch of `batch_rows`, with its `dtype` for the mask of packed rows."""
    if PACKED + INPUTS[0] not in batch:
        return {name: batch[name] for name in INPUTS}
    inputs = {name: batch[PACKED + name] for name in INPUTS}
    return {**inputs, "attention_mask": additive(inputs["attention_mask"], dtype)}


def shared_tokens(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens need not be computed when all rows are packed together."""
    return sum(common_beginning(one, other) for one, other in itertools.pairwise(sorted(map(list, rows))))


def common_beginning(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two rows begin with together."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as it is added to the scores of attention: 0 where a token reads, the least number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


@torch.no_grad()
def packing_for(model: nn.Module, rows: Sequence[Sequence[int]], longest: int) -> Packing | None:
    """How rows can be packed so that the model predicts them as it does each of them alone; None if they cannot be.

    They cannot be where a layer goes through tokens in their order (recurrent ones, convolutions), where attention
    takes no mask, or where some layers read less far back than others and less than a row.

    Args:
        model: causal language model.
        rows: some rows of token ids that begin alike, to try it with.
        longest: tokens of the longest row that will be packed.
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
        return None  # the mask or the positions do not have the form that this model wants
    for row, path in zip(rows, where, strict=True):
        alone = model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0]
        if not kl_divergence(alone.float(), packed[path].float()).mean() < SAME:
            return None
    return packing
