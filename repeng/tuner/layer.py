"""A linear layer with a change in the span of its top singular directions, controlled by a coefficient."""

from collections.abc import MutableMapping
from typing import Any, cast

import torch
from einops import einsum
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from repeng.tuner.base import base_of, dense_weight, device_of, is_linear, is_quantised, linear_shape, weight_of
from repeng.tuner.coefficients import Coefficients, repeat_rows
from repeng.tuner.config import SvdSteeringConfig
from repeng.tuner.svd import subspace_error, top_singular_triples

CANDIDATES = 8  # candidate singular triples per triple that is kept
INIT_STD = 0.02  # standard deviation of the skew matrices, λ and b when init_weights is False


Bases = MutableMapping[str, Tensor]  # by adapter name


def _bases() -> Bases:
    """An empty store for tensors that are saved with the model."""
    return cast(Bases, BufferDict(persistent=True))


class SvdSteeringLayer(BaseTunerLayer):
    """State of the method at one site. It stores these tensors, by adapter name:

    `svd_steering_u (d_out r)`, `svd_steering_s (r)`, `svd_steering_v (d_in r)`: frozen bases, saved with the adapter;
    `svd_steering_in (r(r−1)/2)`, `svd_steering_out`: upper triangles of the skew matrices; `svd_steering_lambda (r)`;
    `svd_steering_shift (d_out)`. A site holds only the tensors that it uses.

    `svd_error` is ‖W − U Uᵀ W‖ / ‖W‖, the share of the weight outside the rotated directions.
    """

    adapter_layer_names: tuple[str, ...] = (
        "svd_steering_in",
        "svd_steering_out",
        "svd_steering_lambda",
        "svd_steering_shift",
    )
    other_param_names: tuple[str, ...] = (
        "svd_steering_u",
        "svd_steering_s",
        "svd_steering_v",
        "r",
        "svd_error",
        "additive",
    )

    def __init__(self, coefficients: Coefficients) -> None:
        self.coefficients: Coefficients = coefficients
        self.r: dict[str, int] = {}
        self.svd_error: dict[str, float] = {}
        self.additive: dict[str, bool] = {}  # whether λ is added to the singular values
        self.awaited: set[str] = set()  # adapters whose tensors have not been loaded from a file yet
        self.svd_steering_in: nn.ParameterDict = nn.ParameterDict()
        self.svd_steering_out: nn.ParameterDict = nn.ParameterDict()
        self.svd_steering_lambda: nn.ParameterDict = nn.ParameterDict()
        self.svd_steering_shift: nn.ParameterDict = nn.ParameterDict()
        self.svd_steering_u: Bases = _bases()
        self.svd_steering_s: Bases = _bases()
        self.svd_steering_v: Bases = _bases()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        coefficients.register(self.svd_steering_in)
        coefficients.register(self.svd_steering_out)

    def update_layer(self, adapter_name: str, config: SvdSteeringConfig, like: str | None = None) -> None:
        """Add an adapter.

        A new adapter gets bases by SVD and initial parameters. For a saved configuration, both are NaN until they are
        loaded from a file. If `like` names another adapter of the same configuration, its bases are copied instead;
        for a saved configuration, its parameters are copied too.
        """
        raise NotImplementedError

    def select_directions(self, difference: Tensor, adapter_name: str, config: SvdSteeringConfig) -> None:
        """Select the bases anew, by `difference (b d)`; see `SvdSteeringModel.select_directions`."""
        raise NotImplementedError

    def check_merge(self, names: list[str]) -> None:
        """Raise ValueError if these adapters cannot be merged into the weights of this site."""
        raise NotImplementedError

    def enable_adapters(self, enabled: bool) -> None:
        # PEFT's method also sets requires_grad of every adapter. Disabling for one forward pass must not change it.
        self._disable_adapters = not enabled

    def device(self) -> torch.device:
        """The device on which this site computes."""
        return device_of(base_of(self))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's method also casts to the dtype of the base, which would round the bases.
        device = device or self.device()
        for attribute in (*self.adapter_layer_names, "svd_steering_u", "svd_steering_s", "svd_steering_v"):
            store = getattr(self, attribute)
            if adapter_name in store and store[adapter_name].device not in (device, torch.device("meta")):
                store[adapter_name] = store[adapter_name].detach().to(device)

    def parameters_of(self, adapter_name: str) -> list[Tensor]:
        """The learned parameters of one adapter at this site."""
        stores = [getattr(self, attribute) for attribute in self.adapter_layer_names]
        return [store[adapter_name] for store in stores if adapter_name in store]

    def set_basis(self, letter: str, adapter_name: str, basis: Tensor | None, shape: tuple[int, ...]) -> None:
        """Store a basis. If `basis` is None, store NaN of this shape until the basis is loaded."""
        basis = torch.full(shape, torch.nan) if basis is None else basis
        getattr(self, f"svd_steering_{letter}")[adapter_name] = basis.to(self.device())

    def set_start(self, learned: str, adapter_name: str, config: SvdSteeringConfig, n: int, like: str | None) -> None:
        """Store the initial value of a parameter `(n)`.

        A new adapter starts with zeros or small random values. For a saved configuration, the value is copied from the
        adapter `like`, or is NaN until it is loaded.
        """
        store = getattr(self, f"svd_steering_{learned}")
        if config.init_bases:
            values = torch.zeros(n) if config.init_weights else torch.randn(n) * INIT_STD
        else:
            values = torch.full((n,), torch.nan) if like is None else store[like].detach().clone()
        store[adapter_name] = nn.Parameter(values.to(self.device()))
        if store[adapter_name].is_meta or store[adapter_name].isnan().any():
            self.awaited.add(adapter_name)

    def is_empty(self, adapter_name: str) -> bool:
        """Whether some tensors of this adapter have not been loaded yet."""
        if adapter_name not in self.awaited:
            return False
        bases = (getattr(self, f"svd_steering_{letter}") for letter in "usv")
        tensors = self.parameters_of(adapter_name) + [s[adapter_name] for s in bases if adapter_name in s]
        if any(tensor.is_meta or tensor.isnan().any() for tensor in tensors):
            return True
        self.awaited.discard(adapter_name)
        return False

    def cast_to_base(self, adapter_name: str) -> None:
        """Cast the learned parameters of one adapter to the dtype of the base. The bases keep their dtype."""
        linear = base_of(next(m for m in base_of(self).modules() if is_linear(m)))
        if not is_quantised(linear):
            for parameter in self.parameters_of(adapter_name):
                parameter.data = parameter.data.to(weight_of(linear).dtype)

    def working(self) -> list[str]:
        """Active adapters of this site whose coefficient is not 0.

        Raises:
            ValueError: the tensors of one of them were never loaded.
        """
        names = [name for name in self.active_adapters if name in self.r and not self.coefficients.is_zero(name)]
        for name in self.awaited.intersection(names):
            if self.is_empty(name):
                raise ValueError(empty(name))
        return names


def empty(adapter_name: str) -> str:
    """The error message for an adapter whose tensors were never loaded."""
    return (
        f"adapter {adapter_name!r} was created to be loaded from a weights file (from a saved configuration, or with "
        "low_cpu_mem_usage=True), but some of its tensors were never loaded; use PeftModel.from_pretrained or "
        "load_adapter; to create a new adapter instead, set init_bases=True in the configuration and leave out "
        "low_cpu_mem_usage"
    )


class Linear(nn.Module, SvdSteeringLayer):
    """`y = base(x) + [(x V) K(c)ᵀ] Uᵀ` on `nn.Linear` or `Conv1D`, quantised or not. The base layer runs unchanged."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SvdSteeringConfig, coefficients: Coefficients
    ) -> None:
        nn.Module.__init__(self)
        SvdSteeringLayer.__init__(self, coefficients)
        self.base_layer: nn.Module = base_layer
        self.in_features: int
        self.out_features: int
        self.in_features, self.out_features = linear_shape(base_of(base_layer))
        self._unmerged: Tensor | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def get_base_layer(self) -> nn.Module:
        # Unlike in PEFT, only one level down: unloading restores the layer that this one replaced, maybe an adapter.
        return self.base_layer

    def update_layer(self, adapter_name: str, config: SvdSteeringConfig, like: str | None = None) -> None:
        r = config.r
        bases: list[Tensor | None] = [None, None, None]
        if like is not None:
            bases = [getattr(self, f"svd_steering_{letter}")[like].clone() for letter in "usv"]
            self.svd_error.update({adapter_name: self.svd_error[like]} if like in self.svd_error else {})
        elif config.init_bases:
            weight = dense_weight(base_of(self))
            u, s, v = top_singular_triples(weight, r, config.svd_niter, config.svd_seed)
            self.svd_error[adapter_name] = subspace_error(weight, u)
            bases = [u, s, v]
        for letter, basis, shape in zip(
            "usv", bases, ((self.out_features, r), (r,), (self.in_features, r)), strict=True
        ):
            self.set_basis(letter, adapter_name, basis, shape)
        self.r[adapter_name], self.additive[adapter_name] = r, config.additive_scale
        for learned, n in (("in", r * (r - 1) // 2), ("out", r * (r - 1) // 2), ("lambda", r)):
            if {"in": config.rotate_input, "out": config.rotate_output, "lambda": config.scale}[learned]:
                self.set_start(learned, adapter_name, config, n, like)
        self.set_adapter(self.active_adapters)

    def select_directions(self, difference: Tensor, adapter_name: str, config: SvdSteeringConfig) -> None:
        weight = dense_weight(base_of(self))
        u, s, v = top_singular_triples(weight, CANDIDATES * config.r, config.svd_niter, config.svd_seed)
        chosen = largest(s * (difference.to(v) @ v).norm(dim=0), config.r)
        self.svd_error[adapter_name] = subspace_error(weight, u[:, chosen])
        for store, tensor in (("u", u[:, chosen]), ("s", s[chosen]), ("v", v[:, chosen])):
            getattr(self, f"svd_steering_{store}")[adapter_name].copy_(tensor)

    def core(self, adapter_name: str) -> Tensor:
        """K(c) `(n r r)`, float32 even under autocast, at the distinct coefficients `(n,)`; K(0) = 0."""
        s = self.svd_steering_s[adapter_name].float()
        coefficient = self.coefficients.setting(adapter_name, s.device).values
        with torch.autocast(s.device.type, enabled=False):
            spread = torch.zeros_like(coefficient)[:, None]
            if adapter_name in self.svd_steering_lambda:
                spread = coefficient[:, None] * self.svd_steering_lambda[adapter_name].float()
            core = torch.diag_embed(s + spread if self.additive[adapter_name] else s * spread.exp())
            if adapter_name in self.svd_steering_out:
                core = self.coefficients.rotation(self.svd_steering_out, adapter_name, s.numel()) @ core
            if adapter_name in self.svd_steering_in:
                core = core @ self.coefficients.rotation(self.svd_steering_in, adapter_name, s.numel()).mT
            return core - s.diag()

    def delta(self, x: Tensor, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """The change of the output at the current coefficient, `(… d_out)` in `dtype` for `x (… d_in)`."""
        index = self.coefficients.setting(adapter_name, x.device).index
        u, v = self.svd_steering_u[adapter_name].to(dtype), self.svd_steering_v[adapter_name].to(dtype)
        core = self.coefficients.once(
            adapter_name, id(self), self.parameters_of(adapter_name), lambda: self.core(adapter_name)
        )
        return rank_change(self._cast_input_dtype(x, dtype), v, core.to(dtype), u, index)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged and self._unmerged is not None:
            # PEFT's other methods unmerge here. This method does not: it would lose the coefficient of the merge.
            depth = next(name for name, m in self.base_layer.named_modules() if m is base_of(self))
            weight = {f"{depth}.weight".lstrip("."): self._unmerged.to(weight_of(base_of(self)))}
            return torch.func.functional_call(self.base_layer, weight, (x, *args), kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.working():
            result = result + self.delta(x, name, result.dtype)
        return result

    def check_merge(self, names: list[str]) -> None:
        weight = weight_of(base_of(self))
        if is_quantised(base_of(self)):
            raise ValueError(
                f"a quantised weight ({type(weight).__name__}, {weight.dtype}) cannot hold the change exactly; "
                "load the base model without quantisation to merge"
            )
        if isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(
                f"the weight lies below another method's layer ({type(self.base_layer).__name__}), so the merges "
                "would conflict; merge and unload that adapter first, then create this one"
            )
        for name in names:
            coefficient = self.coefficients.get(name)
            if coefficient.ndim:
                raise ValueError(
                    f"adapter {name!r} has {coefficient.numel()} coefficients, for single rows or tokens, which one "
                    "weight cannot hold; merge inside steer(model, c) with a number c"
                )
            if not self.single_core(name).isfinite().all():
                raise ValueError(f"adapter {name!r} gives NaN or infinite weights; the adapter seems to be broken")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the site has the adapter. `convert_to_lora` of PEFT takes its change at the current coefficient."""
        return adapter_name in self.r

    @torch.no_grad()
    def single_core(self, adapter_name: str) -> Tensor:
        """K(c) `(r r)`, float32, for a coefficient that is a single number; exactly zero at c = 0."""
        core = self.core(adapter_name)[0]
        return torch.zeros_like(core) if self.coefficients.is_zero(adapter_name) else core

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """U K(c) Vᵀ at the current coefficient, float32, in the layout of the base weight.

        Raises:
            ValueError: the base is quantised, the coefficient is not a single number, or K(c) is not finite.
        """
        self.check_merge([adapter_name])
        u, v = self.svd_steering_u[adapter_name].float(), self.svd_steering_v[adapter_name].float()
        change = u @ self.single_core(adapter_name) @ v.mT
        return change.mT if isinstance(base_of(self), Conv1D) else change

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change at the current coefficient to the base weight; keep a copy of the old weight for `unmerge`.

        Args:
            safe_merge: refuse a result that overflows the dtype of the base.
            adapter_names: the adapters to merge; by default the active ones.

        Raises:
            ValueError: as `get_delta_weight`, or `safe_merge` found an overflow. The weight is then unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        weight = weight_of(base_of(self))
        changed = (weight.float() + sum(self.get_delta_weight(name) for name in names)).to(weight.dtype)
        if safe_merge and not torch.isfinite(changed).all():
            raise ValueError(f"merging {', '.join(names)} gives NaN or infinite weights in {weight.dtype}")
        if self._unmerged is None:
            self._unmerged = weight.detach().clone()
        weight.data = changed
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the base weight from before `merge` bit for bit, cast to the dtype of the model."""
        if self._unmerged is not None:
            weight = weight_of(base_of(self))
            weight.data = self._unmerged.to(weight)
        self._unmerged = None
        self.merged_adapters.clear()


def largest(score: Tensor, r: int) -> Tensor:
    """Indices of the `r` largest entries, in ascending order."""
    return score.topk(r).indices.sort().values


def rank_change(x: Tensor, v: Tensor, core: Tensor, u: Tensor, index: Tensor | None) -> Tensor:
    """`[(x V) Kᵀ] Uᵀ`, `(… d_out)`.

    K is the only entry of `core (n r r)`, or the entry that `index` selects per row, `(b,)`, or per token, `(b t)`.
    """
    z = x @ v
    if index is None:
        z = z @ core[0].mT
    else:
        own = core[repeat_rows(index, x)]
        z = einsum(z, own, "b ... r, b s r -> b ... s" if index.ndim == 1 else "b t r, b t s r -> b t s")
    return z @ u.mT
