"""Arguments of a training run: those of `Trainer`, and the recipe, which has their defaults."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from repeng.data.arguments import TaskArguments
from repeng.data.configuration import default_of, parse_into
from repeng.eval.eval_report import ARMS
from repeng.model.sites import RESIDUAL
from repeng.train.learning_rate import SIGN_LIKE, peak_learning_rate
from repeng.train.recipe import Recipe

# Least values of keys, and whether a value must be above the least.
LEAST = {
    "separation_target": (0, True),
    "order_target": (0, True),
    "order_weight": (0, False),
    "coherence_margin": (0, False),
    "coherence_weight": (0, False),
    "last_n_tokens": (1, False),
    "num_directions": (1, False),
    "learning_rate": (0, False),
}


@dataclass
class SteeringArguments(Recipe, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`TrainingArguments` with this package's keys and defaults that suit small adapters.

    Raises:
        ValueError: a value is out of its range.
    """

    changed: tuple[str, ...] = field(default=(), init=False, metadata={"help": "Keys that are not at their defaults."})

    def __post_init__(self) -> None:
        # Before `TrainingArguments` derives values from others.
        values = {f.name: (getattr(self, f.name), default_of(f)) for f in fields(self) if f.init}
        # HfArgumentParser gives False or None for a default that says "no" or nothing in other words.
        self.changed = tuple(
            name
            for name, (value, default) in values.items()
            if value != default and (value or default not in ("", "no"))
        )
        keys = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
        compiling = [key for key in keys if getattr(self, key)]
        if compiling:  # before it is put into the environment, where accelerate would find it
            raise ValueError(
                f"{compiling[0]}={getattr(self, compiling[0])} does not go with this training, whose loss reads "
                "hidden states by hooks, which do not run in a compiled model; leave it out"
            )
        super().__post_init__()
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process, one GPU; DataParallel would hand each replica other rows
        optim = OptimizerNames(self.optim).value
        if not self.learning_rate and not any(name in optim for name in SIGN_LIKE):
            raise ValueError(f"optim={optim} needs a learning_rate: it is found for Adam and its like only")
        if self.adapter != "svd" and self.directions != "pairs":
            raise ValueError(f"directions={self.directions} is for adapter: svd; a {self.adapter} has none of its own")
        if not self.learning_rate and self.max_steps > 0:
            peak_learning_rate(1.0, self, self.max_steps)  # whether the schedule has one
        for name, (least, open_end) in LEAST.items():
            value = getattr(self, name)
            if value < least or (open_end and value == least):
                raise ValueError(f"{name} must be {'above' if open_end else 'at least'} {least}; got {value}")
        # YAML may give one value without brackets, and numbers.
        if isinstance(self.target_modules, str):
            self.target_modules: list[str] = [self.target_modules]
        if self.adapter == "lora" and RESIDUAL in self.target_modules:
            raise ValueError(
                f"target_modules {self.target_modules} hold {RESIDUAL!r}, which is no linear module: a LoRA cannot "
                "adapt it. Leave it out, or use adapter: svd"
            )
        if self.adapter == "bias":
            if self.r is not None:
                raise ValueError(f"r={self.r} is for adapter: lora and svd; a bias has no rank")
            if "target_modules" in self.changed and self.target_modules != [RESIDUAL]:
                raise ValueError(
                    f"target_modules {self.target_modules} are for adapter: lora and svd; a bias acts on the residual "
                    "stream. Leave them out, or give layers"
                )
            self.target_modules: list[str] = [RESIDUAL]
        if self.layers is not None:
            given = self.layers if isinstance(self.layers, list) else [self.layers]
            self.layers: list[str] | None = [str(word) for word in given]
            layer_request(self.layers)
        self.metric_for_best_model: str | None = str(self.metric_for_best_model).removeprefix("eval_")
        measured = ("range", *(arm for arm, _ in ARMS))
        if self.metric_for_best_model not in measured:
            raise ValueError(
                f"metric_for_best_model must be one of {', '.join(measured)}; got {self.metric_for_best_model!r}"
            )
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience needs evaluations: set eval_strategy and eval_steps")
        if not self.dataloader_drop_last:
            raise ValueError(
                "dataloader_drop_last must stay true: a smaller batch would weigh its pairs more, and several "
                "processes would fill it with pairs that they have already seen"
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay false: the trainer's examples are no model inputs")

    @property
    def pairs_per_step(self) -> int:
        """Pairs that one optimizer step sees, in all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


def layer_request(words: Sequence[str]) -> list[int] | str:
    """Indices, or one share of the depth as text, from the words that were given.

    Raises:
        ValueError: neither.
    """
    if len(words) == 1 and "-" in words[0].strip("-"):
        return words[0]
    if not all(word.isdigit() for word in words):
        raise ValueError(f"layers must be indices from 0, or one share of the depth such as 0.3-0.7; got {words!r}")
    return [int(word) for word in words]


def parse_arguments(
    argv: Sequence[str], default_config: str | Path | None = None
) -> tuple[TaskArguments, SteeringArguments]:
    """The task and the training run, from `--config NAME_OR_FILE …` overridden by the rest of the command line.

    Args:
        argv: the command line.
        default_config: the configuration where the command line names neither one nor a model or a behaviour.

    Raises:
        ValueError: an unknown key, with the nearest valid one, or a value out of its range.
        FileNotFoundError: there is no such configuration, or no such file of data.
    """
    task, training = parse_into((TaskArguments, SteeringArguments), argv, default_config)
    return task, training
