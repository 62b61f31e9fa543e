"""Pairs, texts and questions: what they are, how they are read, and how they become tokens."""

from repeng._imports import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "ContrastPair": "repeng.data.pairs",
        "PairCollator": "repeng.train.collator",  # where version 0.1 had it
        "Question": "repeng.data.questions",
        "Task": "repeng.data.task",
        "TaskArguments": "repeng.data.arguments",
        "check_pairs": "repeng.data.pairs",
        "load_pairs": "repeng.data.pairs",
        "load_questions": "repeng.data.questions",
        "make_pairs": "repeng.data.pairs",
    },
)
