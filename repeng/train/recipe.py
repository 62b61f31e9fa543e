"""The recipe of a training run: this package's own arguments, and its defaults for arguments of `Trainer`.

This file imports nothing slow, so that `repeng train --help` lists its keys at once.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from repeng.data.kinds import Folder, Layers, Word, listed


def _whole_above_1(steps: float) -> float:
    if steps > 1 and steps != int(steps):
        raise ValueError("should be a whole number, or a share below 1 of all steps")
    return steps


def _metric(name: Any) -> Any:
    return name.removeprefix("eval_") if isinstance(name, str) else name


def _steps_or_epochs(steps: int) -> int:
    if steps < 1 and steps != -1:
        raise ValueError("should be 1 or more, or -1 with num_train_epochs")
    return steps


Steps = Annotated[float, Field(gt=0, le=1e9), AfterValidator(_whole_above_1)]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@dataclass
class Recipe:
    """Adapter, loss and schedule. The defaults suit small adapters."""

    output_dir: Folder = field(
        default="outputs/steering", metadata={"help": "Folder for the adapter, the report and checkpoints."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Continue from the newest checkpoint in output_dir, if there is one."}
    )
    require_steering: bool = field(
        default=False,
        metadata={
            "help": "Exit with an error unless both arms gain more than a random direction "
            "and at most 5 percent of the items move the wrong way."
        },
    )
    adapter: Literal["lora", "svd", "bias"] = field(
        default="lora",
        metadata={
            "help": "lora: PEFT's LoRA, in PEFT's own format; svd: turns singular directions of the weights; "
            "bias: adds one vector to the residual stream after each layer."
        },
    )
    target_modules: Annotated[list[Word], Field(min_length=1), BeforeValidator(listed)] = field(
        default_factory=lambda: list(TARGETS),
        metadata={
            "help": "Sites to adapt: linear modules by name, residual-writers, residual-readers, kv, all-linear; "
            "with adapter: svd also residual, where a bias always acts.",
        },
    )
    layers: Layers | None = field(
        default=None,
        metadata={
            "help": "Decoder layers to adapt: indices from 0, or a share of the depth such as 0.3-0.7; None = all.",
        },
    )
    loss_site: Word = field(
        default="residual",
        metadata={"help": "Where separation is measured: 'residual' or the name of a linear site."},
    )
    loss_layer: Annotated[int, Field(ge=0)] | None = field(
        default=None, metadata={"help": "Layer of the loss site, from 0; None = the last adapted one."}
    )
    r: Annotated[int, Field(ge=1, le=65536)] | None = field(
        default=None, metadata={"help": "Rank; None = 8 (svd: 64), or the narrowest target if that is less."}
    )
    directions: Literal["pairs", "top"] = field(
        default="pairs",
        metadata={
            "help": "Singular directions that svd turns. "
            "pairs: those along which the pairs differ most; top: those of the largest singular values."
        },
    )
    separation_target: Annotated[float, Field(gt=0, le=1000)] = field(
        default=3.0, metadata={"help": "Separation to reach, in mean distances between the two sides; above 0."}
    )
    order_target: Annotated[float, Field(gt=0, le=1000)] = field(
        default=1.5,
        metadata={
            "help": "Change to reach in the gap in log-probability between the next tokens of the two personas, "
            "in units of the change that the personas make; above 0."
        },
    )
    order_weight: Annotated[float, Field(ge=0, le=1e6)] = field(
        default=10.0, metadata={"help": "Weight of the order term relative to separation; 0 or more."}
    )
    coherence_margin: Annotated[float, Field(ge=0, le=100)] = field(
        default=0.4,
        metadata={"help": "Log-probability, in nats, that any token may lose at no cost; 0 or more."},
    )
    coherence_weight: Annotated[float, Field(ge=0, le=1e6)] = field(
        default=10.0, metadata={"help": "Weight of the coherence terms relative to separation; 0 or more."}
    )
    last_n_tokens: Annotated[int, Field(ge=1, le=4096)] = field(
        default=6,
        metadata={"help": "Tokens at the end of each prompt on which separation is measured; 1 or more."},
    )
    num_directions: Annotated[int, Field(ge=1, le=1024)] = field(
        default=1, metadata={"help": "Number of preference directions, from the SVD; 1 or more."}
    )
    early_stopping_patience: Annotated[int, Field(ge=1, le=1_000_000)] | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without an improvement; needs eval_strategy."},
    )

    per_device_train_batch_size: Annotated[int, Field(ge=1, le=65536)] = field(
        default=16, metadata={"help": "Pairs per process and micro-batch."}
    )
    per_device_eval_batch_size: Annotated[int, Field(ge=1, le=65536)] = field(
        default=128, metadata={"help": "Rows per forward pass in evaluations during training."}
    )
    learning_rate: Annotated[float, Field(ge=0, le=100)] = field(
        default=0.0,
        metadata={
            "help": "Peak learning rate; 0 = find it from the distance of the parameters to the separation target."
        },
    )
    weight_decay: Annotated[float, Field(ge=0, le=100)] = field(
        default=0.0, metadata={"help": "Weight decay of AdamW."}
    )
    max_steps: Annotated[int, AfterValidator(_steps_or_epochs), Field(le=1_000_000)] = field(
        default=120, metadata={"help": "Optimizer steps; -1 = num_train_epochs sets the number."}
    )
    warmup_steps: Annotated[float, Field(ge=0, le=1e9), AfterValidator(_whole_above_1)] = field(
        default=0.1, metadata={"help": "Steps of linear warm-up; below 1, a share of all steps."}
    )
    lr_scheduler_type: Schedule = field(
        default="cosine", metadata={"help": "Schedule of the learning rate, in optimizer steps."}
    )
    logging_steps: Steps = field(default=10, metadata={"help": "Optimizer steps between two log lines."})
    save_steps: Steps = field(default=60, metadata={"help": "Optimizer steps between two checkpoints."})
    metric_for_best_model: Annotated[Literal["range", "plus", "minus"], BeforeValidator(_metric)] = field(
        default="range",
        metadata={"help": "Figure on held-back pairs by which the best checkpoint is chosen: range, plus or minus."},
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True,
        metadata={"help": "A resumed run remembers how many evaluations brought no improvement."},
    )
    save_total_limit: Annotated[int, Field(ge=1)] | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Must stay true: all batches have the same size."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={"help": "Buffers need no broadcast: they never change and are equal in all processes."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter has a gradient at every step."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the columns of the examples are not inputs of the model."}
    )
