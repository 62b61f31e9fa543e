"""Training an adapter: arguments, loss, trainer, and what a run leaves behind."""

from repeng._imports import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "SteeringArguments": "repeng.train.arguments",
        "SteeringTrainer": "repeng.train.trainer",
    },
)
