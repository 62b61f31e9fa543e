"""The one tokenisation of prompts, padding, and masks."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """Token ids of a prompt, special tokens included, and of the suffix that follows it."""

    prompt: list[int]
    suffix: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.suffix


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    suffix: str = "",
    max_length: int | None = None,
    thinking: bool = False,
    history: Sequence[str] = (),
) -> Encoded:
    """The one tokenisation of training, extraction, evaluation and generation.

    A prompt becomes a user turn with the generation prompt of the chat template (`thinking` off), if there is one; an
    empty prompt leaves `suffix` as plain text. `history` are turns before it, the user's first; without a template
    they are text before the prompt. Over `max_length` tokens the prompt loses its beginning (after a first
    special token), never the suffix.

    Raises:
        ValueError: there is nothing to encode, a turn of the assistant is missing, or the suffix alone is longer than
            `max_length`.
    """
    if prompt and tokenizer.chat_template:
        if len(history) % 2:
            raise ValueError(f"history holds {len(history)} turns; it must end with one of the assistant")
        turn = tokenizer.apply_chat_template(
            [
                {"role": ("user", "assistant")[index % 2], "content": text}
                for index, text in enumerate([*history, prompt])
            ],
            add_generation_prompt=True,
            enable_thinking=thinking,
            return_dict=False,
        )
        prompt_ids, suffix_ids = list(cast(list[int], turn)), plain_ids(tokenizer, suffix)
    else:
        prompt = " ".join(filter(None, [*history, prompt]))
        # The text is encoded apart from the special tokens: some tokenizers would append an end-of-text token.
        prompt_ids = [*special_id(tokenizer, "bos"), *plain_ids(tokenizer, prompt)]
        suffix_ids = plain_ids(tokenizer, f" {suffix}" if prompt and suffix else suffix)
    if not prompt_ids + suffix_ids:
        raise ValueError("nothing to encode: prompt and suffix are both empty")
    excess = 0 if max_length is None else len(prompt_ids) + len(suffix_ids) - max_length
    if excess > 0:
        keep = int(bool(prompt_ids) and prompt_ids[0] in tokenizer.all_special_ids)
        if excess > len(prompt_ids) - keep:
            raise ValueError(f"the suffix {suffix[:60]!r} has {len(suffix_ids)} tokens, over max_length={max_length}")
        prompt_ids = prompt_ids[:keep] + prompt_ids[keep + excess :]
    return Encoded(prompt_ids, suffix_ids)


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> Encoded:
    """A prompt as `encode` makes it, and a text whose own tokens are the same whatever stands before it.

    `encode` puts a space between a prompt and its suffix, and none where there is no prompt; the two may differ in
    their number of tokens.
    """
    if not prompt and not tokenizer.chat_template:
        return Encoded(special_id(tokenizer, "bos"), plain_ids(tokenizer, f" {text}"))
    before = encode(tokenizer, prompt).ids if prompt else []
    return Encoded(before, plain_ids(tokenizer, text if tokenizer.chat_template else f" {text}"))


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text without special tokens."""
    return list(cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])) if text else []


def special_id(tokenizer: PreTrainedTokenizerBase, *names: str) -> list[int]:
    """The id of the first special token among `names` ("bos", "eos", "pad") that the tokenizer has; else nothing."""
    ids = (getattr(tokenizer, f"{name}_token_id") for name in names)
    return next(([token] for token in ids if token is not None), [])


def shared_suffix_length(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """How many token ids two sequences have in common at their ends."""
    length = 0
    for left, right in zip(reversed(chosen), reversed(rejected), strict=False):
        if left != right:
            break
        length += 1
    return length


def pad_rows(
    rows: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str = "cpu",
    side: str | None = None,
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and mask-derived `position_ids`, each `(b t)`, padded on `side`."""
    side = side or tokenizer.padding_side
    (pad,) = special_id(tokenizer, "pad", "eos") or [0]
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, span] = torch.tensor(row)
        mask[index, span] = 1
    # Models derive positions from the mask in `generate` only; a bare forward would count the padding.
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def label_mask(attention_mask: Tensor) -> Tensor:
    """Which of the `t − 1` next-token predictions `(b t−1)` go from a real token to a real token."""
    return (attention_mask[:, 1:] * attention_mask[:, :-1]).bool()


def last_tokens(attention_mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Indices `(b n)` of the last `n` real tokens of each row, in order, and which of them exist `(b n)`."""
    t = attention_mask.shape[1]
    last = t - 1 - attention_mask.flip(dims=(1,)).argmax(dim=1)
    index = last[:, None] - torch.arange(n - 1, -1, -1, device=attention_mask.device)
    exists = index >= t - attention_mask.flip(dims=(1,)).argmax(dim=1)[:, None] - attention_mask.sum(dim=1)[:, None]
    return index.clamp(min=0), exists
