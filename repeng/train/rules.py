"""Rules between the keys of a training run. Keys that would have no effect are refused."""

import os
from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from typing import Any

from repeng.train.recipe import TARGETS
from repeng.train.trainer_keys import WITHOUT_EFFECT

RESIDUAL = "residual"
ADAM_KEYS = ("adam_beta1", "adam_beta2", "adam_epsilon")
NOT_LIKE_ADAM = ("sgd", "adagrad", "rmsprop", "adafactor")
LAYERED = ("galore", "apollo")  # optimizers whose constructor needs the modules of the model
# Modules of those `report_to` integrations that are imported under another name.
MODULES = {"azure_ml": "azureml", "dvclive": "dvclive", "flyte": "flytekitplugins.deck", "tensorboard": "tensorboard"}


class Values:
    """The values of a run's keys, and which of them are not at their defaults."""

    def __init__(self, values: Mapping[str, Any], changed: Collection[str]) -> None:
        self.values: Mapping[str, Any] = values
        self.changed: Collection[str] = changed

    def __getitem__(self, key: str) -> str:
        """A value as text; transformers has enumerations for some keys, whose values may be members or text."""
        value = self.values[key]
        return str(getattr(value, "value", value))

    def need(self, keys: Collection[str], holds: bool, what: str) -> None:
        """Raise ValueError if a key is not at its default although it changes nothing."""
        for key in keys:
            if key in self.changed and self.values[key] and not holds:  # 0 and false request nothing
                raise ValueError(
                    f"{key}={self.values[key]!r} has no effect: it needs {what}; set that, or leave it out"
                )


def check_rules(values: Mapping[str, Any], changed: Collection[str]) -> None:
    """Check the keys of a run against each other.

    Args:
        values: the values of all keys, each of its declared type.
        changed: keys that are not at their defaults.

    Raises:
        ValueError: two keys contradict each other, or a key would have no effect.
    """
    for key in changed:
        if key in WITHOUT_EFFECT:
            raise ValueError(f"{key}={values[key]!r} cannot be used: {WITHOUT_EFFECT[key]}; leave it out")
    given = Values(values, changed)
    for rule in RULES:
        rule(given)


def _adapter(given: Values) -> None:
    adapter, targets = given["adapter"], given.values["target_modules"]
    if adapter != "svd" and given["directions"] != "pairs":
        raise ValueError(
            f"directions={given['directions']} is for adapter: svd; a {adapter} has no such directions; leave it out"
        )
    if adapter == "lora" and RESIDUAL in targets:
        raise ValueError(
            f"target_modules {targets} contain {RESIDUAL!r}, which is not a linear module: a LoRA cannot adapt it. "
            "Leave it out, or use adapter: svd"
        )
    if adapter == "svd" and given.values["r"] == 1:
        raise ValueError("r=1: a single direction cannot be rotated; an svd adapter needs r of 2 or more")
    if adapter == "bias":
        if given.values["r"] is not None:
            raise ValueError(f"r={given['r']} is for adapter: lora and svd; a bias has no rank; leave it out")
        if targets not in (list(TARGETS), [RESIDUAL]):
            raise ValueError(
                f"target_modules {targets} are for adapter: lora and svd; a bias acts on the residual stream. Leave "
                "them out, or give layers"
            )


def _loss(given: Values) -> None:
    given.need(["order_target"], given.values["order_weight"] > 0, "order_weight above 0")
    given.need(["coherence_margin"], given.values["coherence_weight"] > 0, "coherence_weight above 0")


def _evaluation(given: Values) -> None:
    strategy = given["eval_strategy"]
    evaluates = strategy != "no"
    given.need(
        ["early_stopping_patience", "load_best_model_at_end", "metric_for_best_model", "eval_delay", "eval_on_start"],
        evaluates,
        "evaluations, by eval_strategy: steps and eval_steps",
    )
    given.need(["eval_steps"], strategy == "steps", "eval_strategy: steps")
    steps, most = given.values["eval_steps"] or given.values["logging_steps"], given.values["max_steps"]
    if strategy == "steps" and 0 < most < steps:
        raise ValueError(f"eval_steps={steps:g} is more than max_steps={most}: no evaluation would run; lower it")
    saves = given["save_strategy"]
    if given.values["load_best_model_at_end"] and saves not in ("best", strategy):
        raise ValueError(
            f"load_best_model_at_end needs save_strategy: best, or {strategy} as eval_strategy; got {saves}"
        )
    if given.values["greater_is_better"] is False:
        raise ValueError("greater_is_better=False would keep the worst checkpoint; leave it out")
    if given["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy") and not evaluates:
        raise ValueError(f"lr_scheduler_type={given['lr_scheduler_type']} needs eval_strategy: steps or epoch")


def _schedule(given: Values) -> None:
    most, warmup = given.values["max_steps"], given.values["warmup_steps"]
    given.need(["num_train_epochs"], most == -1, "max_steps: -1")
    given.need(["warmup_steps"], given["lr_scheduler_type"] != "constant", "another lr_scheduler_type than constant")
    if warmup >= 1 and 0 < most < warmup:
        raise ValueError(f"warmup_steps={warmup:g} is more than max_steps={most}; lower it")
    given.need(ADAM_KEYS, not any(name in given["optim"] for name in NOT_LIKE_ADAM), "an optim like adamw_torch")
    layered = any(name in given["optim"] for name in LAYERED)
    own = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad")
    given.need(["optim_args"], given["optim"] not in own, "an optim that reads them")
    for name in LAYERED:
        if name in given["optim"] and find_spec(f"{name}_torch") is None:
            raise ValueError(f"optim={given['optim']} needs a package: pip install {name}-torch; or take adamw_torch")
    given.need(["optim_target_modules"], layered, "an optim of GaLore or APOLLO")


def _saving(given: Values) -> None:
    given.need(["save_steps"], given["save_strategy"] == "steps", "save_strategy: steps")
    given.need(["save_total_limit", "save_only_model"], given["save_strategy"] != "no", "save_strategy: steps")
    given.need(["logging_steps"], given["logging_strategy"] == "steps", "logging_strategy: steps")
    given.need(["logging_first_step"], given["logging_strategy"] != "no", "logging_strategy: steps")
    if given.values["resume"] and given.values["resume_from_checkpoint"] is not None:
        raise ValueError(
            f"resume and resume_from_checkpoint={given['resume_from_checkpoint']!r} both name a checkpoint; give one"
        )
    checkpoint = given.values["resume_from_checkpoint"]
    if checkpoint is not None and not os.path.isfile(os.path.join(checkpoint, "trainer_state.json")):
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint!r} is not a checkpoint folder; give one such as out/checkpoint-60"
        )
    hub = [key for key in given.changed if key.startswith("hub_")]
    given.need(hub, bool(given.values["push_to_hub"]), "push_to_hub: true")


def _machine(given: Values) -> None:
    values = given.values
    workers = [key for key in given.changed if key.startswith("dataloader_") and key in WORKER_KEYS]
    given.need(workers, values["dataloader_num_workers"] > 0, "dataloader_num_workers above 0")
    for kind in ("gradient_checkpointing", "activation_checkpointing"):
        on = bool(values.get("gradient_checkpointing") or values.get("activation_checkpointing"))
        given.need([f"{kind}_kwargs"], on, f"{kind}: true")
    given.need(["fsdp_config"], bool(values["fsdp"]), "fsdp: full_shard")
    if values["fp16"] and values["bf16"]:
        raise ValueError("fp16 and bf16 contradict each other; leave one out")
    if values["fp16"] and values["use_cpu"]:
        raise ValueError("fp16 needs a GPU, but use_cpu turns it off; leave one out, or use bf16")
    rank = values.get("local_rank", -1)
    if rank != -1 and str(rank) != os.environ.get("LOCAL_RANK"):
        raise ValueError(f"local_rank={rank} has no effect: launchers set LOCAL_RANK instead; leave it out")
    given.need(["liger_kernel_config"], values["use_liger_kernel"], "use_liger_kernel: true")
    if values["use_liger_kernel"] and not find_spec("liger_kernel"):
        raise ValueError("use_liger_kernel needs the package liger-kernel: pip install liger-kernel; or leave it out")
    if values["deepspeed"] and not find_spec("deepspeed"):
        raise ValueError("deepspeed needs the package deepspeed: pip install deepspeed; or leave it out")
    if not values["dataloader_drop_last"]:
        raise ValueError(
            "dataloader_drop_last must stay true: the pairs of a smaller batch would count more, and several "
            "processes would fill that batch with pairs that they have already seen"
        )
    if values["remove_unused_columns"]:
        raise ValueError(
            "remove_unused_columns must stay false: the columns of the examples are not inputs of the model"
        )


def _reports(given: Values) -> None:
    named = given.values["report_to"]
    named = [named] if isinstance(named, str) else named or ["none"]
    given.need(["run_name"], named != ["none"], "report_to")
    for key in ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        given.need([key], "trackio" in named or "all" in named, "report_to: trackio")
    for name in named:
        if name not in ("all", "none") and not _installed(MODULES.get(name, name)):
            raise ValueError(f"report_to: {name} needs a package of that name; install it, or set report_to: none")


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


WORKER_KEYS = (
    *("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"),
    "dataloader_in_order",
)
RULES: tuple[Callable[[Values], None], ...] = (
    _adapter,
    _loss,
    _evaluation,
    _schedule,
    _saving,
    _machine,
    _reports,
)
