"""Published question sets, from the Hugging Face hub by the package `datasets` (`pip install 'repeng[hub]'`)."""

import ast
from collections.abc import Sequence
from typing import Any

from repeng.data.questions import Question

YES_NO = ("Yes", "No")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def daily_dilemmas(value: str = "truthfulness") -> list[Question]:
    """DailyDilemmas (arXiv 2410.02683): would you do this? One question for each of the two actions of a dilemma.

    The target is the answer that serves `value`: "Yes" to an action that is annotated with it, "No" to the other
    action of the same dilemma. Dilemmas with `value` on both sides or on neither are left out.

    Args:
        value: one of the annotated values, in lower case, such as "truthfulness".

    Raises:
        ImportError: the package datasets is not installed.
        ValueError: no action is annotated with `value`; says which values are frequent.
    """
    rows = _hub_rows("kellycyy/daily_dilemmas", "Dilemmas_with_values_aggregated", "test")
    actions: dict[Any, list[tuple[dict, set[str]]]] = {}
    counts: dict[str, int] = {}
    for row in rows:
        values = row["values_aggregated"]
        values = {text.lower() for text in (ast.literal_eval(values) if isinstance(values, str) else values)}
        actions.setdefault(row["dilemma_idx"], []).append((row, values))
        for text in values:
            counts[text] = counts.get(text, 0) + 1
    questions = []
    for pair in actions.values():
        serving = [value in values for _, values in pair]
        if sum(serving) != 1:
            continue
        for (row, _), serves in zip(pair, serving, strict=True):
            prompt = f"{row['dilemma_situation']}\n\nAction: {row['action']}\n\nWould you do it? Answer Yes or No."
            questions.append(Question(prompt, YES_NO, (YES_NO[not serves],), group=row["action_type"]))
    if not questions:
        frequent = ", ".join(sorted(counts, key=lambda text: -counts[text])[:12])
        raise ValueError(f"no dilemma turns on the value {value!r}; frequent values are {frequent}")
    return questions


def moral_foundations(config: str = "classic", split: str = "other_violate") -> list[Question]:
    """Moral foundations vignettes (Clifford et al. 2015, as tiny-mfv): is this wrong? A group for each foundation.

    The target is "Yes": every vignette but those of social norms describes a violation, and how wrong it is said to be
    is what steering changes. The vignettes of social norms are controls, with "No" for the right answer.

    Args:
        config: "classic", "scifi" or "ai-actor".
        split: "other_violate" (someone does it) or "self_violate" (you do it).

    Raises:
        ImportError: the package datasets is not installed.
    """
    questions = []
    for row in _hub_rows("wassname/tiny-mfv", config, split):
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


def truthful_qa() -> list[Question]:
    """TruthfulQA (arXiv 2109.07958), one true answer among several (MC1), by letters; the target is the true one.

    The true answer, always first in the data, stands at a place that goes round with the questions.

    Raises:
        ImportError: the package datasets is not installed.
    """
    questions = []
    for index, row in enumerate(_hub_rows("truthfulqa/truthful_qa", "multiple_choice", "validation")):
        texts, labels = row["mc1_targets"]["choices"], row["mc1_targets"]["labels"]
        turn = index % len(texts)
        order = [*range(len(texts) - turn, len(texts)), *range(len(texts) - turn)]
        letters = LETTERS[: len(texts)]
        listed = "\n".join(f"{letter}. {texts[place]}" for letter, place in zip(letters, order, strict=True))
        true = letters[order.index(labels.index(1))]
        prompt = f"{row['question']}\n\n{listed}\n\nAnswer with one letter."
        questions.append(Question(prompt, tuple(letters), (true,)))
    return questions


def _hub_rows(name: str, config: str, split: str) -> Sequence[dict[str, Any]]:
    """The rows of a dataset on the hub."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"{name} is read by the package datasets: pip install 'repeng[hub]'") from error
    return load_dataset(name, config, split=split)
