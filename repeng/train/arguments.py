"""Arguments of a training run: those of `Trainer`, and the recipe, which sets some of their defaults."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from repeng.data.arguments import TaskArguments
from repeng.data.configuration import add_keys, built, defaults_of, read_given
from repeng.data.schema import hints_of
from repeng.data.words import argument
from repeng.model.sites import RESIDUAL
from repeng.train.learning_rate import SIGN_LIKE, peak_learning_rate, schedule
from repeng.train.recipe import Recipe
from repeng.train.rules import LAYERED, check_rules
from repeng.train.trainer_keys import TrainerKeys

DEFAULT_CONFIG = "tiny"


@dataclass
class SteeringArguments(Recipe, TrainerKeys, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`TrainingArguments` with this package's keys and defaults that suit small adapters.

    Raises:
        ValueError: a value is out of range, or keys contradict each other.
    """

    changed: tuple[str, ...] = field(default=(), init=False, metadata={"help": "Keys that are not at their defaults."})

    def __post_init__(self) -> None:
        for name, hint in {**hints_of(TrainerKeys), **hints_of(Recipe)}.items():
            if hasattr(self, name):  # older versions of transformers lack some keys
                setattr(self, name, argument(hint, getattr(self, name), name))
        # Read the values before `TrainingArguments` derives some of them from others.
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        self.changed = changed(values)
        check_rules(values, self.changed)
        _check_precision(values)
        _check_accelerator(values["accelerator_config"])
        super().__post_init__()
        if self.n_gpu > 1:
            self._n_gpu = 1  # one GPU per process: DataParallel would give each replica different rows
        optim = OptimizerNames(self.optim).value
        if not self.learning_rate and not any(name in optim for name in SIGN_LIKE):
            raise ValueError(f"optim={optim} needs a learning_rate: it is found for Adam and its like only")
        _check_optimizer(self)
        if self.max_steps > 0:
            schedule(self, self.max_steps)
            if not self.learning_rate:
                peak_learning_rate(1.0, self, self.max_steps)  # raises if the rate is 0 at every step
        if self.adapter == "bias":
            self.target_modules: list[str] = [RESIDUAL]

    @property
    def pairs_per_step(self) -> int:
        """Pairs per optimizer step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


def changed(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of a run that are not at their defaults."""
    defaults = defaults_of([SteeringArguments])
    same = {"report_to": (["none"], "none")}  # other spellings of the default
    return tuple(
        name
        for name, value in values.items()
        if value != defaults[name] and value not in same.get(name, ()) and (value or defaults[name] not in ("", "no"))
    )


def _check_precision(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a precision that this machine does not support."""
    if values["bf16"] and not values["use_cpu"] and not is_torch_bf16_gpu_available():
        raise ValueError(
            "bf16 needs a GPU that computes in bfloat16, and there is none; set bf16: false or use_cpu: true"
        )
    if values["fp16"] and not torch.accelerator.is_available():
        raise ValueError("fp16 needs a GPU, and there is none; set fp16: false")


def _check_optimizer(args: TrainingArguments) -> None:
    """Raise ValueError unless the optimizer can be constructed on this machine."""
    optim = OptimizerNames(args.optim).value
    try:
        if not any(name in optim for name in LAYERED):  # their constructor needs a model
            Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(
            f"optim={optim}, optim_args={args.optim_args!r}: {told}; install what it needs, or take adamw_torch"
        ) from None


def _check_accelerator(given: dict[str, Any] | str | None) -> None:
    """Raise ValueError unless accelerate knows these keys and values, or those in the JSON file of this name."""
    try:
        if isinstance(given, str):
            AcceleratorConfig.from_json_file(given)
        text = Path(given).read_text(encoding="utf-8") if isinstance(given, str) else json.dumps(given or {})
        values: dict[str, Any] = json.loads(text)
        for key, value in values.items():
            if key == "gradient_accumulation_kwargs" and value is not None:
                raise ValueError(f"{key} has no place here: set gradient_accumulation_steps")
            if not isinstance(value, bool | None):
                raise ValueError(f"{key} should be true or false; got {value!r}")
        AcceleratorConfig(**values)
    except (TypeError, KeyError, ValueError) as error:
        known = ", ".join(field.name for field in fields(AcceleratorConfig))
        raise ValueError(f"accelerator_config should have the keys {known}; {error}") from None


def check_arguments(argv: Sequence[str]) -> None:
    """Check a command line as `parse_arguments` does, except for the checks that need a device."""
    kinds = (TaskArguments, SteeringArguments)
    given = read_given(kinds, argv, DEFAULT_CONFIG)
    built([TaskArguments], given)
    values = {**defaults_of([SteeringArguments]), **given}
    values = {name: values[name] for name in defaults_of([SteeringArguments])}
    check_rules(values, changed(values))


def parse_arguments(
    argv: Sequence[str], default_config: str | Path | None = None
) -> tuple[TaskArguments, SteeringArguments]:
    """The task and the training run, from `--config NAME_OR_FILE …` overridden by the rest of the command line.

    Args:
        argv: the command line.
        default_config: the configuration to use if the command line names no configuration, model or behaviour.

    Raises:
        ValueError: a key is unknown (the message names the nearest valid key), or a value is out of range.
        FileNotFoundError: a configuration or a data file does not exist.
        SystemExit: the command line asks for help.
    """
    kinds = (TaskArguments, SteeringArguments)
    if {"-h", "--help"} & set(argv):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--config", nargs="+", help="YAML files with any of these keys, or names: tiny, mood")
        add_keys(parser, kinds, "keys")
        parser.print_help()
        sys.exit(0)
    task, training = built(kinds, read_given(kinds, argv, default_config))
    return task, training
