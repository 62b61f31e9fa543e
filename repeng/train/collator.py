"""Training examples, and batches of them."""

import random
from collections.abc import Sequence
from typing import TypedDict, cast, get_type_hints

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from repeng.data.pairs import ContrastPair
from repeng.data.word_questions import NEUTRAL_REQUEST, without_persona
from repeng.model.packing import Packing, batch_rows
from repeng.model.tokens import encode, encode_text, label_mask, special_id

PROMPTS = ("chosen_ids", "rejected_ids", "bare_ids")  # the two prompts with a persona come first
SIDES = (*PROMPTS, "neutral_ids")


class Example(TypedDict):
    """Token ids of the two prompts of a pair, of the same prompt without a persona, and of a neutral text."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    bare_ids: list[int]
    neutral_ids: list[int]


class ReferencedExample(Example):
    """An example with the outputs of the frozen base model on it; see `repeng.train.reference`.

    Every tensor is stored in the reference files and stacked in a batch. A new loss term adds its tensors here.

    `ref_hs (3 n d)`, `ref_mask (3 n)`: hidden states of the prompts at the last n tokens, and which of them count.
    `ref_logp`: next-token log-probabilities, one 1-d tensor for each of the four texts.
    `next_ids (k)`, `next_weight (k)`, `ref_gap (3)`, `gap_weight ()`: the next tokens that tell the personas apart.
    """

    ref_hs: Tensor
    ref_mask: Tensor
    ref_logp: list[Tensor]
    next_ids: Tensor
    next_weight: Tensor
    ref_gap: Tensor
    gap_weight: Tensor


STACKED = tuple(name for name, kind in get_type_hints(ReferencedExample).items() if kind is Tensor)


class PairCollator:
    """Rows `[chosen ; rejected ; bare ; neutral]` of a batch of `b` examples, with the base model's outputs.

    Returns `input_ids`, `attention_mask`, `position_ids` `(4b t)` and, for examples with their reference,
    `ref_hs (3 b n d)`, `ref_mask (3 b n)`, `ref_logp (4b t−1)`, `next_ids (b k)`, `next_weight (b k)`, `ref_gap (b 3)`
    and `gap_weight (b)`. The inputs of the model are the `model_inputs` of a batch. `where (4b t)` maps each token of
    the rows to its index among the tokens that the model reads, flattened over rows.

    Args:
        tokenizer: the tokenizer, which pads the rows.
        packing: how the rows are packed for the model, see `repeng.model.packing`; None for padded rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, packing: Packing | None = None) -> None:
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.packing: Packing | None = packing

    def __call__(self, examples: Sequence[Example] | Sequence[ReferencedExample]) -> dict[str, Tensor]:
        batch = batch_rows([example[side] for side in SIDES for example in examples], self.tokenizer, self.packing)
        if "ref_hs" in examples[0]:
            references = cast(Sequence[ReferencedExample], examples)
            for name in STACKED:
                side_first = name in ("ref_hs", "ref_mask")
                batch[name] = torch.stack([cast(Tensor, example[name]) for example in references], dim=int(side_first))
            mask = label_mask(batch["attention_mask"])
            logp = torch.zeros(mask.shape)
            logp[mask] = torch.cat([example["ref_logp"][row] for row in range(len(SIDES)) for example in references])
            batch["ref_logp"] = logp
        return batch


def tokenize_examples(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[ContrastPair], neutral: Sequence[str], seed: int
) -> list[Example]:
    """One example per pair, each with a neutral text. All texts are used once before any is used again.

    With a chat template, the neutral text is the answer to a neutral request, as in an evaluation.
    """
    request = NEUTRAL_REQUEST if tokenizer.chat_template else ""
    rng = random.Random(seed)
    order = [text for _ in range(-(-len(pairs) // len(neutral))) for text in rng.sample(list(neutral), len(neutral))]
    return [
        {
            "chosen_ids": encode(tokenizer, pair.chosen, pair.suffix).ids,
            "rejected_ids": encode(tokenizer, pair.rejected, pair.suffix).ids,
            "bare_ids": _bare_ids(tokenizer, pair),
            "neutral_ids": encode_text(tokenizer, request, text).ids,
        }
        for pair, text in zip(pairs, order, strict=False)
    ]


def _bare_ids(tokenizer: PreTrainedTokenizerBase, pair: ContrastPair) -> list[int]:
    """The prompt without a persona; the special token that opens a text if the prompts have no words in common."""
    bare = without_persona(pair, has_template=bool(tokenizer.chat_template))
    if bare == pair.chosen and not pair.suffix:
        return special_id(tokenizer, "bos", "eos") or encode(tokenizer, bare).ids
    return encode(tokenizer, bare, pair.suffix).ids
