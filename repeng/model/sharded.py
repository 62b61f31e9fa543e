"""Models and tensors that several processes hold in pieces (FSDP2), told without importing what shards them."""

import sys

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parameters of `model` in pieces, so that they can run it only together."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what was never imported has sharded nothing
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes if they share it; all must call."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of the tensor."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
