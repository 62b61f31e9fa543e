"""Questions with a whitelist of answers, from JSON Lines or made in code."""

from dataclasses import dataclass, fields
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from repeng.data.files import nearest, read_jsonl
from repeng.data.tokens import plain_ids

KINDS = ("target", "control")


@dataclass(frozen=True)
class Question:
    """A prompt whose next token is one of `choices`; those in `target` are the answers that +1 should favour.

    In a question of the kind "control", `target` holds the right answer, which steering should leave alone. `suffix`
    is the beginning of the answer, as in `ContrastPair`. `group` names questions that reports tell apart. Questions of
    one `unit`, such as one entity in several wordings, are resampled together; an empty string makes the question its
    own unit.
    """

    prompt: str
    choices: tuple[str, ...]
    target: tuple[str, ...]
    kind: str = "target"
    suffix: str = ""
    group: str = ""
    unit: str = ""

    def __post_init__(self) -> None:
        if not set(self.target) < set(self.choices):
            raise ValueError(f"target {self.target} must be some, not all, of choices {self.choices}")
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; choose one of {', '.join(KINDS)}")


def choice_ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> dict[str, int]:
    """The first token of each choice as it follows the prompt.

    Raises:
        ValueError: two choices begin with the same token, or one has none.
    """
    ids: dict[str, int] = {}
    for choice in question.choices:
        first = choice_id(tokenizer, question, choice)
        if first is None:
            raise ValueError(f"this tokenizer has no token for one of the choices {question.choices}; reword it")
        ids[choice] = first
    if len(set(ids.values())) < len(ids):
        raise ValueError(f"choices {question.choices} do not begin with different tokens; rename them")
    return ids


def choice_id(tokenizer: PreTrainedTokenizerBase, question: Question, choice: str) -> int | None:
    """The first token of `choice` as it follows the question: without a space where it opens the assistant's turn.

    None if the tokenizer turns the choice into nothing.
    """
    opens_turn = bool(tokenizer.chat_template) and question.prompt and not question.suffix
    ids = plain_ids(tokenizer, choice if opens_turn else f" {choice}")
    return ids[0] if ids else None


def load_questions(path: str | Path) -> list[Question]:
    """Questions from JSON Lines: `choices`, `target` (a text or a list), `prompt` or `suffix`, and other fields.

    `cluster`, the name of `kind` in version 0.1, is taken for it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, or a line (numbered from 1) is not such an object.
    """
    allowed = [field.name for field in fields(Question)]
    questions = []
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        if "cluster" in row and "kind" not in row:
            row["kind"] = row.pop("cluster")
        for key in row:
            if key not in allowed:
                raise ValueError(f"{where}: unknown key {key!r}{nearest(key, allowed)}; keys are {', '.join(allowed)}")
        target = [row["target"]] if isinstance(row.get("target"), str) else row.get("target")
        if not (row.get("prompt") or row.get("suffix")) or not row.get("choices") or not target:
            raise ValueError(f"{where}: each line needs choices, target, and a prompt or a suffix")
        if not isinstance(row["choices"], list) or not isinstance(target, list):
            raise ValueError(f"{where}: choices must be a list of texts, and target one of them or a list")
        try:
            questions.append(
                Question(**{"prompt": "", **row, "choices": tuple(row["choices"]), "target": tuple(target)})
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return questions
