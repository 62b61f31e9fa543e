"""How an adapter is trained: this package's own arguments of a run, and its defaults for those of `Trainer`.

The file imports nothing heavy, so that `repeng train --help` can list its keys at once.
"""

from dataclasses import dataclass, field
from typing import Literal

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@dataclass
class Recipe:
    """Adapter, loss and schedule. The defaults suit small adapters."""

    output_dir: str = field(
        default="outputs/steering", metadata={"help": "Folder for the adapter, the report and checkpoints."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Continue from the newest checkpoint in output_dir, if there is one."}
    )
    require_steering: bool = field(
        default=False,
        metadata={
            "help": "Exit with an error unless both arms gain more than a random direction, "
            "and 95 percent of the items move along."
        },
    )
    adapter: Literal["lora", "svd", "bias"] = field(
        default="lora",
        metadata={
            "help": "lora: PEFT's LoRA, in PEFT's own format; svd: turns singular directions of the weights; "
            "bias: adds one vector to the residual stream after each layer."
        },
    )
    target_modules: list[str] = field(
        default_factory=lambda: list(TARGETS),
        metadata={
            "help": "Sites to adapt: linear modules by name, residual-writers, residual-readers, kv, all-linear; "
            "with adapter: svd also residual, where a bias always acts.",
            "nargs": "+",
        },
    )
    layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Decoder layers to adapt: indices from 0, or a share of the depth such as 0.3-0.7; None = all.",
            "nargs": "+",
        },
    )
    loss_site: str = field(
        default="residual",
        metadata={"help": "Where separation is measured: 'residual' or the name of a linear site."},
    )
    loss_layer: int | None = field(
        default=None, metadata={"help": "Layer of the loss site, from 0; None = the last adapted one."}
    )
    r: int | None = field(
        default=None, metadata={"help": "Rank; None = 8 (svd: 64), or the narrowest target if that is less."}
    )
    directions: Literal["pairs", "top"] = field(
        default="pairs",
        metadata={
            "help": "Singular directions that svd turns: those along which the pairs differ most, or the top ones."
        },
    )
    separation_target: float = field(
        default=3.0, metadata={"help": "Separation to reach, in mean distances between the two sides; above 0."}
    )
    order_target: float = field(
        default=1.5,
        metadata={
            "help": "Change to reach of the gap in log-probability between what the personas say next, in units of "
            "what the personas change; above 0."
        },
    )
    order_weight: float = field(
        default=10.0, metadata={"help": "Weight of the order term against separation; 0 or more."}
    )
    coherence_margin: float = field(
        default=0.4,
        metadata={"help": "Log-probability that any token may lose at no cost, in nats; 0 or more."},
    )
    coherence_weight: float = field(default=10.0, metadata={"help": "Weight of the coherence terms; 0 or more."})
    last_n_tokens: int = field(
        default=6,
        metadata={"help": "Tokens at the end of each prompt on which separation is measured; 1 or more."},
    )
    num_directions: int = field(default=1, metadata={"help": "Preference directions from the SVD; 1 or more."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "End after so many evaluations without a better one; needs eval_strategy."},
    )

    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pairs per process and micro-batch."})
    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Rows of a forward in evaluations during training."}
    )
    learning_rate: float = field(
        default=0.0,
        metadata={"help": "Peak learning rate; 0 = found by how far the parameters must go to reach the target."},
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    max_steps: int = field(default=120, metadata={"help": "Optimizer steps."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of linear warm-up; below 1, a share of all steps."}
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Schedule of the learning rate, in optimizer steps."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    save_steps: float = field(default=60, metadata={"help": "Write a checkpoint every so many optimizer steps."})
    metric_for_best_model: str | None = field(
        default="range",
        metadata={
            "help": "What eval_strategy measures on held-back pairs to find the best checkpoint: range, plus or minus."
        },
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True,
        metadata={"help": "A resumed run remembers its evaluations without a better one."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Must stay true: all batches have the same size."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "The buffers never change, and all processes have the same."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter has a gradient at every step."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: examples are not inputs of the model."}
    )
