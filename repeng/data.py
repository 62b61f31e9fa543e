"""Contrast pairs: prompts that differ in the persona word only and end where the next word depends on it."""

import difflib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "{persona}"


@dataclass(frozen=True)
class ContrastPair:
    """Two prompts toward and away from a behaviour, and the beginning of an answer that both share.

    With a chat template the prompts are user turns and `suffix` opens the assistant's turn; without one they are plain
    text, continued by `suffix`. Without a suffix the tokens that both prompts end with are the shared part.
    """

    chosen: str
    rejected: str
    suffix: str = ""


class PairProblem(NamedTuple):
    """What `check_pairs` found: the pair's index, a short name of the problem, and what to do."""

    index: int
    problem: str
    advice: str


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
) -> Encoded:
    """The one tokenisation of training, extraction, evaluation and generation.

    A prompt becomes a user turn with the generation prompt of the chat template (`thinking` off), if there is one; an
    empty prompt leaves `suffix` as plain text. Over `max_length` tokens the prompt loses its beginning (after a first
    special token), never the suffix.

    Raises:
        ValueError: there is nothing to encode, or the suffix alone is longer than `max_length`.
    """
    if prompt and tokenizer.chat_template:
        prompt_ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            enable_thinking=thinking,
            return_dict=False,
        )
        suffix_ids = tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
    else:
        # The text is encoded apart from the special tokens: some tokenizers would append an end-of-text token.
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        prompt_ids = bos + (tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else [])
        joined = f" {suffix}" if prompt and suffix else suffix
        suffix_ids = tokenizer(joined, add_special_tokens=False)["input_ids"] if suffix else []
    if not prompt_ids + suffix_ids:
        raise ValueError("nothing to encode: prompt and suffix are both empty")
    excess = 0 if max_length is None else len(prompt_ids) + len(suffix_ids) - max_length
    if excess > 0:
        keep = int(bool(prompt_ids) and prompt_ids[0] in tokenizer.all_special_ids)
        if excess > len(prompt_ids) - keep:
            raise ValueError(f"the suffix {suffix[:60]!r} has {len(suffix_ids)} tokens, over max_length={max_length}")
        prompt_ids = prompt_ids[:keep] + prompt_ids[keep + excess :]
    return Encoded(list(prompt_ids), list(suffix_ids))


def shared_suffix_length(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """How many token ids two sequences have in common at their ends."""
    length = 0
    for left, right in zip(reversed(chosen), reversed(rejected), strict=False):
        if left != right:
            break
        length += 1
    return length


def make_pairs(
    positive: str,
    negative: str,
    *,
    templates: Sequence[str],
    suffixes: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int,
) -> list[ContrastPair]:
    """`n` different pairs from templates with a `{persona}` placeholder and incomplete answers, drawn by `seed`.

    Raises:
        ValueError: a template lacks the placeholder, there are fewer than `n` combinations, or `check_pairs` objects.
    """
    if not positive.strip() or not negative.strip() or positive == negative:
        raise ValueError(f"positive and negative must be two different words; got {positive!r} and {negative!r}")
    for template in templates:
        if PLACEHOLDER not in template:
            raise ValueError(f"template {template!r} lacks the placeholder {PLACEHOLDER}")
    combinations = [(template, suffix) for template in templates for suffix in suffixes]
    if n > len(combinations):
        raise ValueError(
            f"{n} pairs were asked for, but {len(templates)} templates and {len(suffixes)} suffixes make "
            f"{len(combinations)}; add suffixes or ask for fewer"
        )
    pairs = [
        ContrastPair(template.replace(PLACEHOLDER, positive), template.replace(PLACEHOLDER, negative), suffix)
        for template, suffix in random.Random(seed).sample(combinations, n)
    ]
    require_sound(pairs, tokenizer)
    return pairs


def load_pairs(path: str | Path) -> list[ContrastPair]:
    """Pairs from JSON Lines: objects with `chosen`, `rejected` and, optionally, `suffix`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, or a line (numbered from 1) is not such an object.
    """
    pairs = []
    allowed = [field.name for field in fields(ContrastPair)]
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        for key in row:
            if key not in allowed:
                raise ValueError(f"{where}: unknown key {key!r}{nearest(key, allowed)}; keys are {', '.join(allowed)}")
        for key in ("chosen", "rejected"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise ValueError(f"{where}: {key!r} is missing or is not a text; each line needs chosen and rejected")
        if not isinstance(row.get("suffix", ""), str):
            raise ValueError(f"{where}: 'suffix' is not a text")
        pairs.append(ContrastPair(**row))
    return pairs


def load_texts(path: str | Path) -> list[str]:
    """Texts from JSON Lines (strings, or objects with `text`) or, for any other file name, one text a line.

    Raises:
        FileNotFoundError, ValueError: as `load_pairs`.
    """
    if Path(path).suffix != ".jsonl":
        texts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        if not texts:
            raise ValueError(f"{path} is empty; write one text a line")
        return texts
    texts = []
    for number, row in read_jsonl(path, kinds=(dict, str)):
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}, line {number}: expected a string or an object with a 'text'")
        texts.append(text.strip())
    return texts


def read_jsonl(path: str | Path, kinds: tuple[type, ...] = (dict,)) -> Iterable[tuple[int, dict]]:
    """Line numbers and values of a JSON Lines file; blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no value, or a line is not JSON of one of `kinds`.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error.msg}): {line[:60]!r}") from error
        if not isinstance(value, kinds):
            raise ValueError(f"{path}, line {number}: expected an object, got {type(value).__name__}")
        rows.append((number, value))
    if not rows:
        raise ValueError(f"{path} is empty; write one JSON object a line")
    return rows


def check_pairs(
    pairs: Sequence[ContrastPair], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[PairProblem]:
    """What is wrong with `pairs`; an empty list is good news."""
    problems: list[PairProblem] = []
    seen: dict[ContrastPair, int] = {}
    for index, pair in enumerate(pairs):
        if not pair.chosen.strip() or not pair.rejected.strip():
            problems.append(PairProblem(index, "empty", "a side has no text; write a prompt for both"))
            continue
        if pair.chosen == pair.rejected:
            problems.append(PairProblem(index, "identical sides", "the sides must differ in the persona word"))
        if pair in seen:
            problems.append(PairProblem(index, "duplicate", f"the same as pair {seen[pair]}; remove one"))
        seen.setdefault(pair, index)
        chosen, rejected = (encode(tokenizer, side, pair.suffix) for side in (pair.chosen, pair.rejected))
        if shared_suffix_length(chosen.ids, rejected.ids) < max(1, len(chosen.suffix)):
            problems.append(
                PairProblem(index, "unequal suffix", "the sides end in different tokens; end both in the same words")
            )
        longest = max(len(chosen.ids), len(rejected.ids))
        if max_length is not None and longest > max_length:
            problems.append(
                PairProblem(index, "truncation", f"{longest} tokens, over max_length={max_length}; shorten the prompt")
            )
    return problems


def require_sound(
    pairs: Sequence[ContrastPair], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> None:
    """Raise ValueError, listing the first problems, unless `check_pairs` finds none."""
    problems = check_pairs(pairs, tokenizer, max_length)
    if problems:
        listed = "\n".join(f"  pair {p.index}: {p.problem}: {p.advice}" for p in problems[:5])
        more = f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{len(problems)} problems in {len(pairs)} pairs:\n{listed}{more}")


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A hint at the nearest allowed name, or nothing."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def pad_rows(
    rows: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str = "cpu",
    side: str | None = None,
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and mask-derived `position_ids`, each `(b t)`, padded on `side`."""
    side = side or tokenizer.padding_side
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
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


class PairCollator:
    """Rows `[chosen ; rejected ; neutral]` of a batch of `b` examples, with what the frozen base gives on them.

    An example holds `chosen_ids`, `rejected_ids`, `neutral_ids` and, from `repeng.train.reference`, `ref_hs (2 n d)`,
    `ref_logp`, one tensor of next-token log-probabilities for each of the three rows, and what is said next.

    Returns `input_ids`, `attention_mask`, `position_ids` `(3b t)`, `ref_hs (2 b n d)`, `ref_logp (3b t−1)`,
    `next_ids`, `next_weight` `(b k)`, `ref_gap (b 2)` and `gap_weight (b)`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, examples: Sequence[dict]) -> dict[str, Tensor]:
        sides = ("chosen_ids", "rejected_ids", "neutral_ids")
        batch = pad_rows([example[side] for side in sides for example in examples], self.tokenizer)
        if "ref_hs" in examples[0]:
            batch["ref_hs"] = torch.stack([example["ref_hs"] for example in examples], dim=1)
            mask = label_mask(batch["attention_mask"])
            logp = torch.zeros(mask.shape)
            logp[mask] = torch.cat([example["ref_logp"][row] for row in range(3) for example in examples])
            batch["ref_logp"] = logp
            for name in ("next_ids", "next_weight", "ref_gap", "gap_weight"):
                batch[name] = torch.stack([example[name] for example in examples])
        return batch
