"""Shape, device and weight of a base layer, for every library that makes such layers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

CHUNK = 1024  # number of input directions read at once from a quantised layer


def base_of(module: nn.Module | BaseTunerLayer) -> nn.Module:
    """The layer below all adapters."""
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module


def is_linear(module: nn.Module) -> bool:
    """Whether the base of `module` is a layer that this method can adapt."""
    base = base_of(module)
    return isinstance(base, Conv1D) or (isinstance(base, nn.Linear) and _is_plain(base))


def _is_plain(linear: nn.Linear) -> bool:
    """Whether the layer maps `(… d_in)` to `(… d_out)`. Routers and grouped layers that subclass `nn.Linear` do not.

    To find out, the forward pass of a subclass runs once on the meta device, where nothing is computed.
    """
    if type(linear).forward is nn.Linear.forward or is_quantised(linear):
        return True
    d_in, d_out = linear_shape(linear)
    own = {name: torch.empty_like(parameter, device="meta") for name, parameter in linear.named_parameters()}
    x = torch.empty(1, 1, d_in, dtype=linear.weight.dtype, device="meta")
    try:
        y = torch.func.functional_call(linear, own, (x,))
    except Exception:  # a forward pass of another kind may raise anything on this input
        return False
    return isinstance(y, Tensor) and y.shape == (1, 1, d_out)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as the layer stores it: packed if the layer is quantised."""
    return cast(Tensor, linear.weight)


def is_quantised(linear: nn.Module) -> bool:
    """Whether the weight is anything but a plain floating-point tensor."""
    weight = weight_of(linear)
    return type(weight.data) is not Tensor or not weight.is_floating_point() or weight.element_size() < 2


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """`(d_in, d_out)` of a linear layer or a Conv1D."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    d_in, d_out = weight_of(linear).shape
    return d_in, d_out


def device_of(linear: nn.Module) -> torch.device:
    """The device on which the layer computes. If accelerate has offloaded the layer, its weight lies elsewhere."""
    device = weight_of(linear).device
    hook = getattr(linear, "_hf_hook", None)
    if device.type == "meta" and isinstance(hook, AlignDevicesHook) and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    return device


@contextmanager
def _loaded(linear: nn.Module) -> Iterator[None]:
    """Inside the context, an offloaded weight is loaded."""
    hook = getattr(linear, "_hf_hook", None)
    if not (isinstance(hook, AlignDevicesHook) and hook.offload):
        yield
        return
    hook.pre_forward(linear)
    try:
        yield
    finally:
        hook.post_forward(linear, None)


@torch.no_grad()
def dense_weight(linear: nn.Module) -> Tensor:
    """The weight `(d_out d_in)` of a linear layer in float32, dequantised if need be."""
    if is_quantised(linear):
        d_in = linear_shape(linear)[0]
        inputs = torch.arange(d_in, device=weight_of(linear).device)
        return torch.cat([_columns(linear, part) for part in inputs.split(CHUNK)], dim=1)
    with _loaded(linear):
        weight = weight_of(linear).detach().float()
    return weight.mT if isinstance(linear, Conv1D) else weight


@torch.no_grad()
def entries(linear: nn.Module, outputs: Tensor, inputs: Tensor) -> Tensor:
    """The weight's entries `(n)` at output and input indices `(n)`, float32 on the CPU."""
    if is_quantised(linear):
        every = torch.arange(len(inputs))
        return _columns(linear, inputs.to(weight_of(linear).device))[outputs, every].cpu()
    with _loaded(linear):
        weight = weight_of(linear).detach()
        weight = weight.mT if isinstance(linear, Conv1D) else weight
        return weight[outputs.to(weight.device), inputs.to(weight.device)].float().cpu()


def _columns(linear: nn.Module, inputs: Tensor) -> Tensor:
    """The columns `(d_out n)` of a quantised weight for input indices `(n)`.

    They are computed by applying a copy of the layer to unit vectors, which works for every quantisation scheme. The
    layer itself does not run, because libraries repack weights or choose a compute dtype at the first forward pass.
    """
    apply = copy.deepcopy(linear).eval().requires_grad_(False)
    units = nn.functional.one_hot(inputs, linear_shape(linear)[0]).float()
    return (apply(units) - apply(torch.zeros_like(units[:1]))).float().mT
