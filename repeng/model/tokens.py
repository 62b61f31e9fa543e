"""Tokenisation of prompts, shared by the whole package; padding and masks."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from repeng.model.script import joined, joint

# An opening tag of thinking at the end of a text: bracket, name, bracket.
OPEN_THINKING = re.compile(r"([<\[◁])(\w*think\w*|thoughts?|reason\w*)([>\]▷])\s*$", re.IGNORECASE)


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
    """Encode a prompt and a suffix. Training, extraction, evaluation and generation all use this function.

    With a chat template, a prompt becomes a user turn followed by the generation prompt of the template, by default
    with thinking disabled; if the prompt is empty, `suffix` is plain text. `history` holds the earlier turns, the
    user's first; without a template they are text before the prompt. The suffix has the same tokens as in the joined
    text, unless joining would change the tokens of the prompt. If the result is longer than `max_length` tokens, the
    beginning of the prompt is cut (after a first special token), never the suffix.

    Raises:
        ValueError: there is nothing to encode, a turn of the assistant is missing, the chat template fails, or the
            suffix alone is longer than `max_length`.
    """
    if prompt and tokenizer.chat_template:
        text, gap = _opened_turn(tokenizer, prompt, history, thinking=thinking)
        prompt_ids = plain_ids(tokenizer, text)
        suffix_ids = following_ids(tokenizer, _generation_prompt(text, prompt), gap, suffix)
    else:
        prompt = joined(*history, prompt)
        # The text is encoded apart from the special tokens: some tokenizers would append an end-of-text token.
        prompt_ids = [*special_id(tokenizer, "bos"), *plain_ids(tokenizer, prompt)]
        suffix_ids = following_ids(tokenizer, prompt, joint(prompt, suffix), suffix)
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
    """Encode a prompt as `encode` does, and a text whose tokens do not depend on the prompt.

    `encode` puts a space between a prompt and its suffix, but no space if the prompt is empty. With and without the
    space, the text may have different numbers of tokens.
    """
    if prompt and tokenizer.chat_template:
        return encode(tokenizer, prompt, text)
    before = encode(tokenizer, prompt).ids if prompt else special_id(tokenizer, "bos")
    if tokenizer.chat_template:
        return Encoded([], ids_apart(tokenizer, "", text))
    return Encoded(before, ids_apart(tokenizer, joint("a", text), text))


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, suffix: str, answers: Sequence[str]
) -> list[list[int]]:
    """Token ids of each answer as a continuation of a prompt and a suffix; see `following_ids`.

    An answer at the beginning of the assistant's turn has no space before it.

    Raises:
        ValueError: the suffix ends in a space that the tokenizer joins with the first token of an answer.
    """
    if prompt and tokenizer.chat_template and not suffix:
        text, gap = _opened_turn(tokenizer, prompt, ())
        before = _generation_prompt(text, prompt)
        return [following_ids(tokenizer, before, gap, answer.lstrip()) for answer in answers]
    before = suffix or prompt
    begun = plain_ids(tokenizer, before)
    found = []
    for answer in answers:
        gap = joint(before, answer)
        ids = _ids_behind(tokenizer, before, begun, gap + answer)
        if ids is None and before[-1:].isspace():
            raise ValueError(
                f"this tokenizer joins the answer {answer!r} and the space at the end of {before[-40:]!r} into one "
                "token; leave that space out"
            )
        found.append(ids_apart(tokenizer, gap, answer) if ids is None else ids)
    return found


def following_ids(tokenizer: PreTrainedTokenizerBase, before: str, gap: str, text: str) -> list[int]:
    """Token ids of `text` after `before` and `gap`, as in the joined text.

    A continuation cannot change the tokens of the text before it. So if joining changes the tokens of `before`, the
    ids of `text` after a neutral beginning are returned instead; see `ids_apart`.
    """
    if not text:
        return []
    ids = _ids_behind(tokenizer, before, plain_ids(tokenizer, before), gap + text)
    return ids_apart(tokenizer, gap, text) if ids is None else ids


def _ids_behind(tokenizer: PreTrainedTokenizerBase, before: str, begun: Sequence[int], text: str) -> list[int] | None:
    """The tokens of the joined text after the tokens `begun` of `before`; None if it does not begin with `begun`."""
    whole = plain_ids(tokenizer, before + text)
    if whole[: len(begun)] != list(begun):
        return None
    if begun and begun[-1] == tokenizer.unk_token_id and tokenizer.is_fast:  # the token may reach beyond `before`
        offsets = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if cast(list[tuple[int, int]], offsets)[len(begun) - 1][1] > len(before):
            return None
    return whole[len(begun) :]


def ids_apart(tokenizer: PreTrainedTokenizerBase, gap: str, text: str) -> list[int]:
    """Token ids of a text in the middle of another text, independent of that text and without a beginning mark."""
    if not text:
        return []
    before = "a" if gap else "\n"
    ids = _ids_behind(tokenizer, before, plain_ids(tokenizer, before), gap + text)
    return plain_ids(tokenizer, gap + text) if ids is None else ids


def opened_turn(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The text of a user turn with the generation prompt of the chat template.

    Raises:
        ValueError: the template fails.
    """
    return _opened_turn(tokenizer, prompt, ())[0]


def _opened_turn(
    tokenizer: PreTrainedTokenizerBase, prompt: str, history: Sequence[str], *, thinking: bool = False
) -> tuple[str, str]:
    """The text of a user turn with the generation prompt, and the space that the template puts before an answer.

    If `thinking` is off and the template opens thinking nevertheless, the text closes it.

    Raises:
        ValueError: a turn of the assistant is missing, or the template fails.
    """
    if len(history) % 2:
        raise ValueError(f"history holds {len(history)} turns; it must end with a turn of the assistant")
    turns = [
        {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate([*history, prompt])
    ]
    try:
        text = str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
        )
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the chat template of this tokenizer cannot be applied: {error}") from error
    opened = None if thinking else OPEN_THINKING.search(text)
    if opened:
        text = f"{text.rstrip()}\n\n{opened[1]}/{opened[2]}{opened[3]}\n\n"
    return text, _space_of(tokenizer, text, turns)


def _space_of(tokenizer: PreTrainedTokenizerBase, text: str, turns: list[dict[str, str]]) -> str:
    """A space if the template writes one between `text`, which ends in the generation prompt, and an answer."""
    try:
        answered = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "x"}], tokenize=False)
    except Exception:  # a template that accepts no answer writes no space before it
        return ""
    return " " if str(answered).startswith(f"{text} x") else ""


def _generation_prompt(text: str, prompt: str) -> str:
    """The text that a template writes after a prompt. The tokens of an answer depend on this text only."""
    _, found, rest = text.rpartition(prompt)
    return rest if found and rest else text


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text without special tokens."""
    return list(cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])) if text else []


def special_id(tokenizer: PreTrainedTokenizerBase, *names: str) -> list[int]:
    """A list with the id of the first special token in `names` (bos, eos, pad, unk) that exists, or an empty list."""
    ids = (getattr(tokenizer, f"{name}_token_id") for name in names)
    return next(([token] for token in ids if token is not None), [])


def shared_suffix_length(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """The number of token ids, or words, that two sequences have in common at their ends."""
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
    # Models derive positions from the mask only in `generate`; a plain forward pass would count the padding.
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def label_mask(attention_mask: Tensor) -> Tensor:
    """Mask `(b t−1)` of the next-token predictions whose source and target are both real tokens."""
    return (attention_mask[:, 1:] * attention_mask[:, :-1]).bool()


def last_tokens(attention_mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Indices `(b n)` of the last `n` real tokens of each row, in order, and a mask `(b n)` of those that exist."""
    t = attention_mask.shape[1]
    last = t - 1 - attention_mask.flip(dims=(1,)).argmax(dim=1)
    index = last[:, None] - torch.arange(n - 1, -1, -1, device=attention_mask.device)
    exists = index >= t - attention_mask.flip(dims=(1,)).argmax(dim=1)[:, None] - attention_mask.sum(dim=1)[:, None]
    return index.clamp(min=0), exists
