"""Limits of the keys of `transformers.TrainingArguments`, and the keys that have no effect in this training.

Transformers checks few limits, and most of them only during training. This file imports nothing slow.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from repeng.data.files import nearest
from repeng.data.kinds import Word, listed, reports
from repeng.train.recipe import Steps

REPORTS = (
    *("none", "all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "mlflow"),
    *("neptune", "swanlab", "tensorboard", "trackio", "wandb"),
)

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _known_reports(names: list[str]) -> list[str]:
    for name in names:
        if name not in REPORTS:
            raise ValueError(f"should be one of {', '.join(REPORTS)}{nearest(name, REPORTS)}")
    return names


def _object(value: Any) -> Any:
    """Parse a JSON object from a command line; return any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"should be an object, as JSON on the command line ({error})") from None


def _object_or_file(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return _object(value)
    if not Path(value).is_file():
        raise ValueError("should be an object, or a JSON file that exists")
    try:
        found = json.loads(Path(value).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"should be a JSON file; this file is not JSON ({error})") from None
    if not isinstance(found, Mapping):
        raise ValueError("should be a JSON file that holds an object")
    return value


def _finite(value: Any) -> Any:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"should hold finite numbers; it holds {value}")
    for part in parts:
        _finite(part)
    return value


Object = Annotated[dict[str, Any] | None, BeforeValidator(_object), AfterValidator(_finite)]
ObjectOrFile = Annotated[dict[str, Any] | str | None, BeforeValidator(_object_or_file)]


def _fsdp(value: str | None) -> str | None:
    allowed = ("full_shard", "shard_grad_op", "hybrid_shard", "hybrid_shard_zero2", "offload", "auto_wrap", "true")
    for word in (value or "").lower().split():
        if word not in allowed:
            raise ValueError(f"should be words of {', '.join(allowed)}, with fsdp_config")
    return value


class TrainerKeys:
    """Stricter types for keys of `TrainingArguments` that allow senseless values. The defaults are Trainer's."""

    num_train_epochs: Annotated[float, Field(gt=0, le=1_000_000)]
    lr_scheduler_kwargs: Object
    adam_beta1: Beta
    adam_beta2: Beta
    adam_epsilon: Annotated[float, Field(gt=0, lt=1)]
    optim_args: Word | None
    optim_target_modules: Annotated[list[Word] | None, Field(min_length=1), BeforeValidator(listed)]
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)]
    max_grad_norm: Annotated[float, Field(ge=0, le=1e9)]
    gradient_checkpointing_kwargs: Annotated[
        dict[Literal["use_reentrant", "preserve_rng_state"], bool] | None, BeforeValidator(_object)
    ]
    activation_checkpointing_kwargs: Object
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None
    torch_compile_backend: Word | None
    torch_empty_cache_steps: Count | None
    include_num_input_tokens_seen: Literal["all", "non_padding", "no"] | bool
    log_level: Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
    log_level_replica: Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
    report_to: Annotated[list[str], Field(min_length=1), AfterValidator(_known_reports), BeforeValidator(reports)]
    eval_steps: Steps | None
    eval_delay: Annotated[float, Field(ge=0, le=1e9)]
    seed: Seed
    data_seed: Seed | None
    accelerator_config: ObjectOrFile
    dataloader_num_workers: Annotated[int, Field(ge=0, le=1024)]
    dataloader_prefetch_factor: Count | None
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None
    train_sampling_strategy: Literal["random", "sequential"]
    ddp_bucket_cap_mb: Count | None
    ddp_backend: Literal["nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", "xccl"] | None
    ddp_timeout: Annotated[int, Field(ge=1)]
    fsdp: Annotated[str | None, AfterValidator(_fsdp)]
    fsdp_config: ObjectOrFile
    deepspeed: ObjectOrFile
    debug: Literal["", "underflow_overflow"]
    resume_from_checkpoint: Word | None


_LABELS = "the loss is made of pairs, not of labels"
_OWN_EVALUATION = "the evaluation asks questions and makes its own batches"
_SCRIPT = "every run trains and then compares"
# Keys that nothing here reads, each with the reason.
_HOOKS = "the loss reads hidden states by hooks, which do not run in a compiled model"
WITHOUT_EFFECT: dict[str, str] = {
    "label_smoothing_factor": _LABELS,
    "label_names": _LABELS,
    "average_tokens_across_devices": _LABELS,
    "neftune_noise_alpha": "noise on the embeddings would move the policy away from the reference",
    "include_for_metrics": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "prediction_loss_only": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "eval_accumulation_steps": _OWN_EVALUATION,
    "bf16_full_eval": _OWN_EVALUATION,
    "fp16_full_eval": _OWN_EVALUATION,
    "length_column_name": "examples are not grouped by length",
    "do_train": _SCRIPT,
    "do_eval": _SCRIPT,
    "do_predict": _SCRIPT,
    "torch_compile": _HOOKS,
    "torch_compile_backend": _HOOKS,
    "torch_compile_mode": _HOOKS,
    "parallelism_config": "this training does not support splitting the model in this way",
}
