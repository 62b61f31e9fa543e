"""Detection and gathering of models and tensors that are sharded over processes (FSDP2), without importing FSDP."""

import sys

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of `model` are sharded over processes. All ranks must run such a model together."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if FSDP was not imported, nothing is sharded
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all processes if it is sharded; in this case every rank must call this."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def local(tensor: Tensor) -> Tensor:
    """This process's shard of the tensor; the tensor itself if it is not sharded."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
