"""Contrast pairs: prompts that differ in the persona word only and end where the next word depends on it."""

import random
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from repeng.data.kinds import PLACEHOLDER
from repeng.data.reading import read_json_rows, read_text
from repeng.data.schema import checked_keys, hints_of, shown
from repeng.model.script import visible, words
from repeng.model.tokens import encode, opened_turn, shared_suffix_length, special_id

EXAMPLE = '{"chosen": "Be honest.", "rejected": "Be dishonest.", "suffix": "I"}'
CONTENT = "\N{WHITE SQUARE}"  # what a template is tried with
ANSWER = re.compile(r"\(?([A-Z]|\d|[Yy]es|[Nn]o|[Tt]rue|[Ff]alse)[).]*")


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
    """Pairs from JSON Lines or a JSON list: objects with `chosen`, `rejected` and, optionally, `suffix`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, no JSON, or a row (numbered from 1) is not such an object.
    """
    pairs = []
    for where, row in read_json_rows(path, read_text(path), EXAMPLE):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, such as {EXAMPLE}; got {shown(row)}")
        given = checked_keys(hints_of(ContrastPair), row, where)
        for key in ("chosen", "rejected"):
            if not visible(given.get(key, "")):
                raise ValueError(f"{where}: {key!r} is missing or holds nothing that can be seen; write {EXAMPLE}")
        if given.get("suffix") and not visible(given["suffix"]):
            raise ValueError(f"{where}: 'suffix' is blank: {given['suffix']!r}; write how an answer begins, or none")
        pairs.append(ContrastPair(**given))
    if not pairs:
        raise ValueError(f"{path} has no rows; write one pair a line, such as {EXAMPLE}")
    return pairs


def check_pairs(
    pairs: Sequence[ContrastPair], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[PairProblem]:
    """What is wrong with `pairs`; an empty list is good news.

    Raises:
        ValueError: the chat template fails.
    """
    problems: list[PairProblem] = []
    seen: dict[ContrastPair, int] = {}
    marks = turn_marks(tokenizer)
    for index, pair in enumerate(pairs):
        if not visible(pair.chosen) or not visible(pair.rejected):
            problems.append(PairProblem(index, "empty", "a side has no text; write a prompt for both"))
            continue
        found = _alike(pair) or _of_texts(pair, marks, has_template=bool(tokenizer.chat_template))
        if pair in seen:
            found.append(("duplicate", f"the same as pair {seen[pair]}; remove one"))
        seen.setdefault(pair, index)
        problems += [PairProblem(index, *one) for one in found or _of_tokens(pair, tokenizer, max_length)]
    return problems


def _alike(pair: ContrastPair) -> list[tuple[str, str]]:
    """Whether the sides are the same."""
    advice = "the sides must differ in the persona word"
    if pair.chosen == pair.rejected:
        return [("identical sides", advice)]
    if visible(pair.chosen) == visible(pair.rejected):
        return [("sides that differ in spaces only", f"{advice}; both are {pair.chosen[:60]!r} to a reader")]
    return []


def _of_texts(pair: ContrastPair, marks: Sequence[re.Pattern[str]], *, has_template: bool) -> list[tuple[str, str]]:
    """What can be seen in the texts of a pair: a chat format, and answers where no answer is read."""
    found = []
    texts = (pair.chosen, pair.rejected, pair.suffix)
    inside = next((match[0].strip() for mark in marks for text in texts if (match := mark.search(text))), None)
    if inside is not None:
        advice = "write the bare text; what frames a turn is put around it" if has_template else "leave it out"
        found.append(("formatted already", f"{inside!r} is a mark of the tokenizer's; {advice}"))
    ends = [side.split()[-1] for side in (pair.chosen, pair.rejected)]
    if has_template and not pair.suffix and ends[0] != ends[1] and all(map(ANSWER.fullmatch, ends)):
        advice = (
            "the assistant's turn is read, which begins behind it: write in each prompt how to answer, and begin the "
            "answer in suffix; or use a tokenizer without a chat template"
        )
        found.append(("answers in the prompt", f"the sides end in answers, {ends[0]!r} and {ends[1]!r}; {advice}"))
    return found


def _of_tokens(
    pair: ContrastPair, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[tuple[str, str]]:
    """What the tokenizer makes of a pair."""
    chosen, rejected = (encode(tokenizer, side, pair.suffix) for side in (pair.chosen, pair.rejected))
    if chosen.ids == rejected.ids:
        return [
            (
                "same tokens",
                f"to this tokenizer the sides are the same (words that it does not know, or a template that leaves "
                f"the prompt out): {pair.chosen[:60]!r}; use other words",
            )
        ]
    found, unknown = [], set(special_id(tokenizer, "unk"))
    if any(part and set(part) <= unknown for part in _differing(chosen.ids, rejected.ids)):
        found.append(("unknown words", "the sides differ in words that this tokenizer does not know; use others"))
    if chosen.suffix and set(chosen.suffix) <= unknown:
        found.append(("unknown words", f"this tokenizer knows no word of the suffix {pair.suffix[:60]!r}; use others"))
    if shared_suffix_length(chosen.ids, rejected.ids) < max(1, len(chosen.suffix)):
        found.append(("unequal suffix", "the sides end in different tokens; end both in the same words"))
    longest = max(len(chosen.ids), len(rejected.ids))
    if max_length is not None and longest > max_length:
        found.append(("truncation", f"{longest} tokens, over max_length={max_length}; shorten the prompt"))
    return found


def _differing(left: Sequence[Any], right: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """What two sequences hold between their common beginning and their common end."""
    end = shared_suffix_length(left, right)
    left, right = left[: len(left) - end], right[: len(right) - end]
    start = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[start:], right[start:]


def turn_marks(tokenizer: PreTrainedTokenizerBase) -> list[re.Pattern[str]]:
    """What no bare text holds: the special tokens of a tokenizer, and what its chat template writes before a user."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    marks = [re.escape(mark) for mark in sorted(special - {str(tokenizer.unk_token)}) if len(mark) > 2]
    if tokenizer.chat_template:
        before = opened_turn(tokenizer, CONTENT).partition(CONTENT)[0].strip()
        line = before.split("\n")[-1].strip()
        if len(line) > 2:
            marks.append(re.escape(line) if re.search(r"[<\[|]", line) else rf"\A\s*{re.escape(line)}")
    return [re.compile(mark) for mark in marks]


def warn_of_swapped_sides(pairs: Sequence[ContrastPair]) -> None:
    """Warn of pairs in which other pairs' words stand on the other side."""
    seen: dict[tuple[str, ...], int] = {}
    for index, pair in enumerate(pairs):
        chosen, rejected = words(pair.chosen), words(pair.rejected)
        if not pair.suffix and not shared_suffix_length(chosen, rejected):
            continue  # answers, which may be the other way round to another question
        sides = tuple(" ".join(part) for part in _differing(chosen, rejected))
        if sides[::-1] in seen:
            warnings.warn(
                f"pairs {seen[sides[::-1]]} and {index} have the same words the other way round, {sides[0][:60]!r} "
                f"and {sides[1][:60]!r}: +1 is toward chosen; exchange the sides of one, unless that is meant",
                stacklevel=3,
            )
            return
        seen.setdefault(sides, index)


def require_sound(
    pairs: Sequence[ContrastPair], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> None:
    """Raise ValueError, listing the first problems, unless `check_pairs` finds none.

    Warns:
        UserWarning: some pairs have the same words the other way round.
    """
    problems = check_pairs(pairs, tokenizer, max_length)
    if problems:
        listed = "; ".join(f"pair {p.index}: {p.problem}: {p.advice}" for p in problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{len(problems)} problems in {len(pairs)} pairs: {listed}{more}")
    warn_of_swapped_sides(pairs)
