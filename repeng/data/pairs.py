"""Contrast pairs: prompts that differ in the persona word only and end where the next word depends on it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from repeng.data.files import nearest, read_jsonl
from repeng.data.kinds import PLACEHOLDER
from repeng.model.tokens import encode, shared_suffix_length


@dataclass(frozen=True)
class ContrastPair:
    """Two prompts toward and away from a behaviour, and the beginning of an answer that both share.

    With a chat template the prompts are user turns and `suffix` opens the assistant's turn; without one they are plain
    text, continued by `suffix`. Without a suffix the tokens that both prompts end with are the shared part.
    """

    chosen: str
    rejected: str
    suffix: str = ""


@dataclass(frozen=True)
class PairProblem:
    """What `check_pairs` found: the pair's index, a short name of the problem, and what to do."""

    index: int
    problem: str
    advice: str


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
