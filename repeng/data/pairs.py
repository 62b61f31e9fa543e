"""Contrast pairs: two prompts that differ only in the persona, and end where the next word depends on it."""

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
CONTENT = "\N{WHITE SQUARE}"  # prompt with which a chat template is tried
ANSWER = re.compile(r"\(?([A-Z]|\d|[Yy]es|[Nn]o|[Tt]rue|[Ff]alse)[).]*")


@dataclass(frozen=True)
class ContrastPair:
    """A prompt toward a behaviour, a prompt away from it, and the beginning of an answer to both.

    With a chat template the prompts are user turns and `suffix` begins the assistant's turn. Without a template they
    are plain text, which `suffix` continues. If `suffix` is empty, the shared part is the tokens at the end that both
    prompts have in common.
    """

    chosen: str
    rejected: str
    suffix: str = ""


@dataclass(frozen=True)
class PairProblem:
    """A problem that `check_pairs` found: the pair's index, a short name for the problem, and advice."""

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
    """Draw `n` different pairs from all combinations of a template and a suffix.

    Args:
        positive: persona word of the chosen prompts.
        negative: persona word of the rejected prompts.
        templates: prompts with a `{persona}` placeholder.
        suffixes: incomplete answers.
        tokenizer: tokenizer with which the pairs are checked.
        n: number of pairs.
        seed: seed of the random draw.

    Raises:
        ValueError: a template lacks the placeholder, there are fewer than `n` combinations, or `check_pairs` finds a
            problem.
    """
    pairs = draw_pairs(positive, negative, templates=templates, suffixes=suffixes, n=n, seed=seed)
    require_sound(pairs, tokenizer)
    return pairs


def draw_pairs(
    positive: str, negative: str, *, templates: Sequence[str], suffixes: Sequence[str], n: int, seed: int
) -> list[ContrastPair]:
    """Do as `make_pairs`, without the check with a tokenizer."""
    if not positive.strip() or not negative.strip() or positive == negative:
        raise ValueError(f"positive and negative must be two different words; got {positive!r} and {negative!r}")
    for template in templates:
        if PLACEHOLDER not in template:
            raise ValueError(f"template {template!r} lacks the placeholder {PLACEHOLDER}")
    combinations = [(template, suffix) for template in templates for suffix in suffixes]
    if n > len(combinations):
        raise ValueError(
            f"{n} pairs were requested, but {len(templates)} templates and {len(suffixes)} suffixes make "
            f"{len(combinations)}; add suffixes or request fewer pairs"
        )
    return [
        ContrastPair(template.replace(PLACEHOLDER, positive), template.replace(PLACEHOLDER, negative), suffix)
        for template, suffix in random.Random(seed).sample(combinations, n)
    ]


def load_pairs(path: str | Path) -> list[ContrastPair]:
    """Pairs from JSON Lines or a JSON list: objects with `chosen`, `rejected` and, optionally, `suffix`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty or not JSON, or a row (numbered from 1) is not an object with these keys.
    """
    pairs = []
    for where, row in read_json_rows(path, read_text(path), EXAMPLE):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, such as {EXAMPLE}; got {shown(row)}")
        given = checked_keys(hints_of(ContrastPair), row, where)
        for key in ("chosen", "rejected"):
            if not visible(given.get(key, "")):
                raise ValueError(f"{where}: {key!r} is missing or has no visible characters; write {EXAMPLE}")
        if given.get("suffix") and not visible(given["suffix"]):
            raise ValueError(
                f"{where}: 'suffix' is blank: {given['suffix']!r}; write the beginning of an answer, or leave it out"
            )
        pairs.append(ContrastPair(**given))
    if not pairs:
        raise ValueError(f"{path} has no rows; write one pair per line, such as {EXAMPLE}")
    return pairs


def check_pairs(
    pairs: Sequence[ContrastPair], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[PairProblem]:
    """The problems of `pairs`; the list is empty if there are none.

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
    """A problem if the sides are the same."""
    advice = "the sides must differ in the persona word"
    if pair.chosen == pair.rejected:
        return [("identical sides", advice)]
    if visible(pair.chosen) == visible(pair.rejected):
        return [("sides that differ in spaces only", f"{advice}; a reader sees {pair.chosen[:60]!r} on both")]
    return []


def _of_texts(pair: ContrastPair, marks: Sequence[re.Pattern[str]], *, has_template: bool) -> list[tuple[str, str]]:
    """Problems visible in a pair's texts: marks of a chat format, and answers inside the user's turn."""
    found = []
    texts = (pair.chosen, pair.rejected, pair.suffix)
    inside = next((match[0].strip() for mark in marks for text in texts if (match := mark.search(text))), None)
    if inside is not None:
        advice = "write the bare text; the chat template adds such marks" if has_template else "leave it out"
        found.append(("formatted already", f"{inside!r} is a special mark of the tokenizer; {advice}"))
    ends = [side.split()[-1] for side in (pair.chosen, pair.rejected)]
    if has_template and not pair.suffix and ends[0] != ends[1] and all(map(ANSWER.fullmatch, ends)):
        advice = (
            "but only the assistant's turn after the prompt is read: write in each prompt how to answer, and begin "
            "the answer in suffix; or use a tokenizer without a chat template"
        )
        found.append(("answers in the prompt", f"the sides end in the answers {ends[0]!r} and {ends[1]!r}, {advice}"))
    return found


def _of_tokens(
    pair: ContrastPair, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[tuple[str, str]]:
    """Problems in the tokens of a pair."""
    chosen, rejected = (encode(tokenizer, side, pair.suffix) for side in (pair.chosen, pair.rejected))
    if chosen.ids == rejected.ids:
        return [
            (
                "same tokens",
                f"both sides have the same tokens (the tokenizer does not know the words, or its chat template leaves "
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
        found.append(("truncation", f"it has {longest} tokens, over max_length={max_length}; shorten the prompt"))
    return found


def _differing(left: Sequence[Any], right: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The parts of two sequences between their common beginning and their common end."""
    end = shared_suffix_length(left, right)
    left, right = left[: len(left) - end], right[: len(right) - end]
    start = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[start:], right[start:]


def turn_marks(tokenizer: PreTrainedTokenizerBase) -> list[re.Pattern[str]]:
    """Patterns of marks that no bare text holds: special tokens, and the chat template's opening of a user turn.

    If the opening has no bracket or bar, its pattern matches at the beginning of a text only.
    """
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
    """Warn if two pairs have the same differing words on opposite sides."""
    seen: dict[tuple[str, ...], int] = {}
    for index, pair in enumerate(pairs):
        chosen, rejected = words(pair.chosen), words(pair.rejected)
        if not pair.suffix and not shared_suffix_length(chosen, rejected):
            continue  # the sides end in answers, which may rightly be exchanged for another question
        sides = tuple(" ".join(part) for part in _differing(chosen, rejected))
        if sides[::-1] in seen:
            warnings.warn(
                f"pairs {seen[sides[::-1]]} and {index} have the words {sides[0][:60]!r} and {sides[1][:60]!r} on "
                "opposite sides. c = +1 is toward chosen: exchange the sides of one pair, unless this is intended",
                stacklevel=3,
            )
            return
        seen.setdefault(sides, index)


def require_sound(
    pairs: Sequence[ContrastPair], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> None:
    """Raise ValueError if `check_pairs` finds problems; the message lists the first ones.

    Warns:
        UserWarning: two pairs have the same words on opposite sides.
    """
    problems = check_pairs(pairs, tokenizer, max_length)
    if problems:
        listed = "; ".join(f"pair {p.index}: {p.problem}: {p.advice}" for p in problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{len(problems)} problems in {len(pairs)} pairs: {listed}{more}")
    warn_of_swapped_sides(pairs)
