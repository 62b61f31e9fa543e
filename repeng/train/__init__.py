"""Training an adapter: arguments, loss, trainer, and the files that a run writes."""

from typing import TYPE_CHECKING

from repeng._imports import lazily

if TYPE_CHECKING:
    from repeng.train.arguments import SteeringArguments
    from repeng.train.trainer import SteeringTrainer
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {"SteeringArguments": "repeng.train.arguments", "SteeringTrainer": "repeng.train.trainer"},
    )

__all__ = ["SteeringArguments", "SteeringTrainer"]
