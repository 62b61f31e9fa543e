"""Models and tensors that several processes hold in pieces (FSDP2)."""

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parameters of `model` in pieces, so that they can run it only together."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes if they share it; all must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
