"""Rotation and shift of the residual stream at the output of a decoder layer, controlled by the coefficient."""

from typing import Any

import torch
from torch import Tensor, nn

from repeng.tuner.base import base_of, device_of
from repeng.tuner.coefficients import Coefficients, repeat_rows
from repeng.tuner.config import SvdSteeringConfig
from repeng.tuner.decoder import linear_modules
from repeng.tuner.layer import CANDIDATES, SvdSteeringLayer, largest, rank_change
from repeng.tuner.svd import subspace_error, top_singular_triples
from repeng.tuner.targets import writers

# The name has no method prefix, because PEFT skips modules with the prefix when it deletes an adapter.
CHILD = "steering_residual"


class Residual(nn.Module, SvdSteeringLayer):
    """`h + c b + Q (R(c) − I) Qᵀ h`: a child of the decoder layer, applied to its output by a hook.

    Q `(d r)`, stored as `svd_steering_u`, holds the top output directions of the weights that write to the residual
    stream in this layer. The triangle of R is stored as `svd_steering_in`, b as `svd_steering_shift`.
    """

    def __init__(self, layer: nn.Module, coefficients: Coefficients, width: int) -> None:
        nn.Module.__init__(self)
        SvdSteeringLayer.__init__(self, coefficients)
        self._beside = (layer,)  # in a tuple, so that the parent is not registered as a child of its own child
        self.width = width
        self._active_adapter = []

    def get_base_layer(self) -> nn.Module:
        return self._beside[0]

    def device(self) -> torch.device:
        for module in linear_modules(self.get_base_layer()).values():
            return device_of(base_of(module))
        return next(self.get_base_layer().parameters()).device

    def update_layer(self, adapter_name: str, config: SvdSteeringConfig, like: str | None = None) -> None:
        r = config.r
        self.r[adapter_name] = r
        if config.turns:
            basis: Tensor | None = None
            if like is not None:
                basis = self.svd_steering_u[like].clone()
                self.svd_error.update({adapter_name: self.svd_error[like]} if like in self.svd_error else {})
            elif config.init_bases:
                weight = torch.cat(writers(self.get_base_layer(), self.width), dim=1)
                basis = top_singular_triples(weight, r, config.svd_niter, config.svd_seed)[0]
                self.svd_error[adapter_name] = subspace_error(weight, basis)
            self.set_basis("u", adapter_name, basis, (self.width, r))
            self.set_start("in", adapter_name, config, r * (r - 1) // 2, like)
        if config.shift:
            self.set_start("shift", adapter_name, config, self.width, like)
        self.set_adapter(self.active_adapters)

    def select_directions(self, difference: Tensor, adapter_name: str, config: SvdSteeringConfig) -> None:
        if adapter_name not in self.svd_steering_u:
            return
        weight = torch.cat(writers(self.get_base_layer(), self.width), dim=1)
        basis = top_singular_triples(weight, CANDIDATES * config.r, config.svd_niter, config.svd_seed)[0]
        chosen = largest((difference.to(basis) @ basis).norm(dim=0), config.r)
        self.svd_error[adapter_name] = subspace_error(weight, basis[:, chosen])
        self.svd_steering_u[adapter_name].copy_(basis[:, chosen])

    def turn(self, adapter_name: str) -> Tensor:
        """R(c) − I, `(n r r)` in float32 at the distinct coefficients `(n,)`."""
        turn = self.coefficients.rotation(self.svd_steering_in, adapter_name, self.r[adapter_name])
        return turn - torch.eye(turn.shape[-1], device=turn.device)

    def forward(self, h: Tensor) -> Tensor:
        """The steered residual stream, `(b t d)` in the dtype of `h (b t d)`."""
        if self.disable_adapters:
            return h
        result = h
        for name in self.working():
            setting = self.coefficients.setting(name, h.device)
            if name in self.svd_steering_in:
                basis = self.svd_steering_u[name].to(h.dtype)
                with torch.autocast(h.device.type, enabled=False):
                    turn = self.coefficients.once(
                        name, id(self), self.parameters_of(name), lambda name=name: self.turn(name)
                    )
                    result = result + rank_change(h, basis, turn.to(h.dtype), basis, setting.index)
            if name in self.svd_steering_shift:
                c = setting.values if setting.index is None else setting.values[repeat_rows(setting.index, h)]
                shift = c.reshape(*c.shape, *[1] * (h.ndim - c.ndim)) * self.svd_steering_shift[name].float()
                result = result + shift.to(h.dtype)
        return result

    def check_merge(self, names: list[str]) -> None:
        if names:
            raise ValueError(NO_MERGE)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self.check_merge([name for name in adapter_names or self.active_adapters if name in self.r])

    def unmerge(self) -> None:
        pass


NO_MERGE = (
    "the site 'residual' changes the whole residual stream, which no change of one weight can do, so it cannot be "
    "merged; adapt 'residual-writers' (the linear layers that write to the residual stream) to get mergeable weights"
)


def _steer_output(layer: nn.Module, _inputs: Any, output: Any) -> Any:
    """Forward hook of a decoder layer: pass its hidden states, the output or its first item, through `Residual`."""
    residual = getattr(layer, CHILD)
    if isinstance(output, tuple):
        return (residual(output[0]), *output[1:])
    return residual(output)


def attach(layer: nn.Module, coefficients: Coefficients, width: int) -> Residual:
    """Attach a `Residual` of this width to a decoder layer, or return the one that the layer already has."""
    if not hasattr(layer, CHILD):
        layer.add_module(CHILD, Residual(layer, coefficients, width))
        layer.register_forward_hook(_steer_output)
    return getattr(layer, CHILD)


def detach(layer: nn.Module) -> None:
    """Remove the `Residual` and its hook from a decoder layer."""
    for key, hook in list(layer._forward_hooks.items()):
        if hook is _steer_output:
            del layer._forward_hooks[key]
    delattr(layer, CHILD)
