"""Models and tensors that several processes hold in pieces (FSDP2), told without importing what shards them."""

import sys

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parameters of `model` in pieces, so that they can run it only together."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what was never imported has sharded nothing
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes if they share it; all must call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
