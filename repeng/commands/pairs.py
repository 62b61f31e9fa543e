"""Make pairs of prompts, or check them with the tokenizer of a model."""

import itertools
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from repeng.commands.base import load_drafted_pairs, load_task_pairs
from repeng.data.arguments import TaskArguments
from repeng.data.behaviours import takes_an
from repeng.data.files import write_text
from repeng.data.folders import check_new, check_writable
from repeng.data.pairs import ContrastPair, check_pairs, warn_of_swapped_sides
from repeng.model.script import words

SHOWN = 3


def make(task_args: TaskArguments, output: str, seed: int) -> dict[str, Any]:
    """Write the pairs of a task as JSON Lines.

    Raises:
        ValueError: the pairs have problems.
        FileExistsError: the file exists already.
    """
    check_new(output)
    check_writable(Path(output).parent, "the folder of --output")
    _, pairs, _ = load_task_pairs(task_args, seed)
    write_text(output, "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs))
    _show(pairs)
    print(f"written: {output}, {len(pairs)} pairs")
    return {"written": output, "pairs": len(pairs), "warnings": _doubts(pairs)}


def check(task_args: TaskArguments, seed: int) -> dict[str, Any]:
    """List the problems of pairs from a file, or of the pairs that the keys of a task describe."""
    tokenizer, pairs = load_drafted_pairs(task_args, seed)
    problems = check_pairs(pairs, tokenizer)
    for problem in problems:
        print(f"pair {problem.index}: {problem.problem}: {problem.advice}")
    doubts = _doubts(pairs)
    _show(pairs)
    if not problems:
        print(f"{len(pairs)} pairs, no problem")
    return {"pairs": len(pairs), "problems": [asdict(problem) for problem in problems], "warnings": doubts}


def _doubts(pairs: list[ContrastPair]) -> list[str]:
    """What may be wrong with the pairs as a whole. The sentences are printed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_swapped_sides(pairs)
    doubts = [str(warning.message) for warning in caught]
    wrong = [phrase for pair in pairs for side in (pair.chosen, pair.rejected) for phrase in _wrong_articles(side)]
    if wrong:
        doubts.append(
            f"{wrong[0]!r} in {len(wrong)} prompts has the wrong article: use templates without one before the word, "
            'such as "Pretend you are {persona}."'
        )
    for doubt in doubts:
        print(f"warning: {doubt}")
    return doubts


def _wrong_articles(text: str) -> list[str]:
    """The phrases of an English article and the word after it that do not go together."""
    found = words(text)
    two = itertools.pairwise(found)
    return [f"{a} {b}" for a, b in two if a.lower() in ("a", "an") and (a.lower() == "an") != takes_an(b)]


def _show(pairs: list[ContrastPair]) -> None:
    for pair in pairs[:SHOWN]:
        print(f"  + {pair.chosen!r} … {pair.suffix!r}\n  − {pair.rejected!r} … {pair.suffix!r}")
