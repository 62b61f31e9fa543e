"""Arguments of a training run, from a YAML file and the command line."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments

from repeng.data import nearest
from repeng.eval_report import ARMS
from repeng.train.inner_contrastive_loss import (
    COHERENCE_MARGIN,
    COHERENCE_WEIGHT,
    ORDER_TARGET,
    ORDER_WEIGHT,
    SEPARATION_TARGET,
)


def option(default, text: str):
    return field(default=default, metadata={"help": text})


def options(default: list | None, text: str):
    return field(default_factory=lambda: default and list(default), metadata={"help": text, "nargs": "+"})


@dataclass
class SteeringArguments(TrainingArguments):
    """`TrainingArguments` with this package's keys and defaults that suit small adapters.

    Raises:
        ValueError: a value is out of its range, or the data are not said.
    """

    output_dir: str = option("outputs/steering", "Folder for the adapter, the report and checkpoints.")
    model_name_or_path: str = option("tiny", "'tiny' (embedded), a local folder, or a hub id.")
    load_in_4bit: bool = option(False, "Load the base model in 4 bits (NF4), by bitsandbytes.")
    pairs_file: str | None = option(None, "JSON Lines with chosen, rejected and, optionally, suffix.")
    positive: str | None = option(None, "Persona word of c = +1, instead of pairs_file.")
    negative: str | None = option(None, "Persona word of c = −1.")
    templates: list[str] | None = options(None, "Persona prompts with a {persona} placeholder.")
    suffixes_file: str | None = option(None, "Incomplete answers, one a line or JSON Lines.")
    num_pairs: int | None = option(None, "Pairs to draw from templates and suffixes; None = all, at most 1024.")
    neutral_file: str | None = option(
        None, "Texts that steering must leave alone, one a line or JSON Lines; None = sampled from the base model."
    )
    questions_file: str | None = option(
        None, "Evaluation questions, JSON Lines; None = next words that the personas favour on held-out pairs."
    )
    resume: bool = option(False, "Continue from the newest checkpoint in output_dir, if there is one.")
    require_steering: bool = option(
        False, "Exit with an error unless both arms gain more than a random direction and 95 % of items go along."
    )
    target_modules: list[str] = options(
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        "Sites to adapt: linear modules by name, residual, residual-writers, residual-readers, kv, all-linear.",
    )
    layers: list[str] | None = options(
        None, "Decoder layers to adapt: indices from 0, or a share of the depth such as 0.3-0.7; None = 1/3 to 2/3."
    )
    loss_site: str = option("residual", "Where separation is measured: 'residual' or the name of a linear site.")
    loss_layer: int | None = option(None, "Layer of the loss site, from 0; None = the last adapted one.")
    r: int | None = option(None, "Rank; None = 64, or the narrowest target if that is less.")
    directions: Literal["pairs", "top"] = option(
        "pairs", "Singular directions that turn: those along which the pairs differ most, or the top ones."
    )
    separation_target: float = option(
        SEPARATION_TARGET, "Separation to reach, in mean distances between the two sides; above 0."
    )
    order_target: float = option(
        ORDER_TARGET,
        "Change to reach of the gap in log-probability between what the personas say next, nats; above 0.",
    )
    order_weight: float = option(ORDER_WEIGHT, "Weight of the order term against separation; 0 or more.")
    coherence_margin: float = option(
        COHERENCE_MARGIN, "What any token may lose in log-probability for nothing, in nats; 0 or more."
    )
    coherence_weight: float = option(COHERENCE_WEIGHT, "Weight of the coherence terms; 0 or more.")
    last_n_tokens: int = option(6, "Tokens at the end of each prompt on which separation is measured; 1 or more.")
    num_directions: int = option(1, "Preference directions from the SVD; 1 or more.")

    per_device_train_batch_size: int = option(16, "Pairs a process and micro-batch.")
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    max_steps: int = option(120, "Optimizer steps.")
    warmup_steps: float = option(0.1, "Steps, or a share of them below 1, of linear warm-up.")
    lr_scheduler_type: str = option("cosine", "Schedule of the learning rate, in optimizer steps.")
    logging_steps: float = option(10, "Log every so many optimizer steps.")
    save_steps: float = option(60, "Write a checkpoint every so many optimizer steps.")
    metric_for_best_model: str | None = option(
        "range",
        "What eval_strategy measures on held-back pairs and makes a checkpoint the best: range, plus or minus.",
    )
    early_stopping_patience: int | None = option(
        None, "End after so many evaluations without a better one; needs eval_strategy."
    )
    restore_callback_states_from_checkpoint: bool = option(
        True, "A resumed run counts evaluations without a better one from where it was."
    )
    save_total_limit: int | None = option(2, "Checkpoints to keep.")
    dataloader_drop_last: bool = option(True, "Must stay true: all batches are equally large.")
    ddp_broadcast_buffers: bool | None = option(False, "The buffers never change, and all processes have the same.")
    ddp_find_unused_parameters: bool | None = option(False, "Every parameter has a gradient at every step.")
    remove_unused_columns: bool = option(False, "Must stay false: examples are no model inputs.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process, one GPU; DataParallel would hand each replica other rows
        for name, least, open_end in (
            ("separation_target", 0, True), ("order_target", 0, True), ("order_weight", 0, False),
            ("coherence_margin", 0, False), ("coherence_weight", 0, False),
            ("last_n_tokens", 1, False), ("num_directions", 1, False),
        ):  # fmt: skip
            value = getattr(self, name)
            if value < least or (open_end and value == least):
                raise ValueError(f"{name} must be {'above' if open_end else 'at least'} {least}; got {value}")
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]  # YAML without brackets
        if self.layers is not None:
            self.layers = layer_request(self.layers)
        if (self.positive is None) != (self.negative is None):
            raise ValueError(f"give both positive and negative; got {self.positive!r} and {self.negative!r}")
        if (self.pairs_file is None) == (self.positive is None):
            raise ValueError("give either pairs_file, or positive and negative")
        self.metric_for_best_model = str(self.metric_for_best_model).removeprefix("eval_")
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
    def pairs_a_step(self) -> int:
        """Pairs that one optimizer step sees, in all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


def layer_request(given: object) -> list[int] | str:
    """Indices, or one share of the depth as text, from what YAML or the command line gives.

    Raises:
        ValueError: neither.
    """
    words = [str(word) for word in (given if isinstance(given, list) else [given])]
    if len(words) == 1 and "-" in words[0].strip("-"):
        return words[0]
    if not all(word.isdigit() for word in words):
        raise ValueError(f"layers must be indices from 0, or one share of the depth such as 0.3-0.7; got {given!r}")
    return [int(word) for word in words]


def parse_arguments(argv: Sequence[str], default_config: Path | None) -> SteeringArguments:
    """Arguments from `--config FILE.yaml …` (or `default_config`, if any), overridden by the rest of the command line.

    Of several files, later ones override earlier ones.

    Raises:
        ValueError: an unknown key, with the nearest valid one.
        FileNotFoundError: there is no such configuration file.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", type=Path, nargs="+", default=[] if default_config is None else [default_config])
    known, rest = before.parse_known_args(list(argv))
    names = [f.name for f in fields(SteeringArguments) if f.init]
    given: dict[str, Any] = {}
    for path in known.config:
        keys = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(keys, dict):
            raise ValueError(f"{path}: expected keys and values, got a {type(keys).__name__}")
        refuse_unknown(keys, names, str(path))
        given |= keys

    parser = HfArgumentParser(SteeringArguments, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", help="YAML files with any of these keys")  # for --help; taken off above
    parser.set_defaults(**given)
    arguments, _, unknown = parser.parse_args_into_dataclasses(
        rest, return_remaining_strings=True, look_for_args_file=False
    )
    flags = [word[2:].split("=")[0] for word in unknown if word.startswith("--")]
    refuse_unknown(flags or unknown, names, "the command line")
    return arguments


def refuse_unknown(keys: Sequence[str], allowed: Sequence[str], where: str) -> None:
    """Raise ValueError for the first key that is not allowed."""
    for key in keys:
        if key not in allowed:
            raise ValueError(f"unknown key {key!r} in {where}{nearest(str(key), allowed)}")
