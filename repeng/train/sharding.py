"""Adapters whose parameters lie in shards on several processes (FSDP2): what is refused, gathering, loading."""

import os
from pathlib import Path

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import str_to_bool
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from repeng.sharded import whole
from repeng.train.arguments import SteeringArguments
from repeng.tuner.config import PREFIX
from repeng.tuner.model import check_keys

WHOLE = "the bases of the adapter and the reference are computed from the whole base weights on every process"


def check_parallelism(args: SteeringArguments) -> None:
    """Raise ValueError for ways of splitting a model that this training cannot follow."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(f"DeepSpeed ZeRO-3 loads the model in pieces, and {WHOLE}: use ZeRO-2, or FSDP2")
    if not (args.fsdp or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))):
        return
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP1 flattens adapter and frozen weights into one parameter, which cannot be trained apart: set "
            "fsdp_version: 2 in the accelerate configuration"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            f"fsdp_cpu_ram_efficient_loading loads the model on one process only, and {WHOLE}: set it to false"
        )
    if args.load_in_4bit:
        raise ValueError(
            "FSDP does not shard 4-bit weights, so that nothing would be saved: use configs/accelerate/ddp.yaml for "
            "load_in_4bit on several GPUs"
        )


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """What an adapter's file is made of, whole, on the CPU, by its names in the model; all processes must call."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = {key: tensor for key, tensor in model.state_dict().items() if key in trained or f".{PREFIX}" in key}
    return {key: whole(tensor).detach().cpu() for key, tensor in kept.items()}


@torch.no_grad()
def load_adapter_state(model: PeftModel, folder: str | Path) -> None:
    """Write the adapter of a checkpoint into a model whose parameters may be sharded; all processes must call.

    Raises:
        ValueError: the file holds other tensors than the model has.
    """
    given, name = load_file(Path(folder) / "adapter_model.safetensors"), model.active_adapter
    here = {key.removesuffix(f".{name}"): tensor for key, tensor in model.state_dict().items() if f".{PREFIX}" in key}
    check_keys(set(here), {key for key in given if f".{PREFIX}" in key}, name)
    for key, tensor in here.items():
        value = given[key].to(tensor.device, tensor.dtype)
        if hasattr(tensor, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor  # not in every build of PyTorch

            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        tensor.copy_(value)
