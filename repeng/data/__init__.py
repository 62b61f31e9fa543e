"""Contrast pairs, texts and questions: their types, how to read them from files, and how a model makes them."""

from typing import TYPE_CHECKING

from repeng._imports import lazily

if TYPE_CHECKING:
    from repeng.data.arguments import TaskArguments
    from repeng.data.pairs import ContrastPair, PairProblem, check_pairs, load_pairs, make_pairs
    from repeng.data.questions import Question, load_questions
    from repeng.data.task import Task
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "ContrastPair": "repeng.data.pairs",
            "PairProblem": "repeng.data.pairs",
            "PairCollator": "repeng.train.collator",  # version 0.1 had it in this package
            "Question": "repeng.data.questions",
            "Task": "repeng.data.task",
            "TaskArguments": "repeng.data.arguments",
            "check_pairs": "repeng.data.pairs",
            "load_pairs": "repeng.data.pairs",
            "load_questions": "repeng.data.questions",
            "make_pairs": "repeng.data.pairs",
        },
    )

__all__ = [
    "ContrastPair",
    "PairProblem",
    "Question",
    "Task",
    "TaskArguments",
    "check_pairs",
    "load_pairs",
    "load_questions",
    "make_pairs",
]
