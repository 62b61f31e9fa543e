"""Refuse ways of splitting a model between processes that this training does not support."""

import os
from typing import Any, cast

from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import str_to_bool
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from repeng.train.arguments import SteeringArguments

WHOLE = "the bases of the adapter and the reference are computed from the whole base weights on every process"


def check_parallelism(args: SteeringArguments, *, load_in_4bit: bool = False) -> None:
    """Raise ValueError if the model would be split in a way that this training does not support."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(f"DeepSpeed ZeRO-3 loads the model in parts, but {WHOLE}. Use ZeRO-2 or FSDP2")
    if not (args.fsdp or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))):
        return
    plugin = FullyShardedDataParallelPlugin(**cast(dict[str, Any], args.fsdp_plugin_args or {}))
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP1 flattens adapter and frozen weights into one parameter, so the adapter cannot be trained alone. "
            "Set fsdp_version: 2 in the accelerate configuration"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            f"fsdp_cpu_ram_efficient_loading loads the model in one process only, but {WHOLE}. Set it to false"
        )
    if load_in_4bit:
        raise ValueError(
            "FSDP does not shard 4-bit weights, so it would save no memory. Use ddp.yaml of configs/accelerate "
            "(--config_file ddp) for load_in_4bit on several GPUs"
        )
