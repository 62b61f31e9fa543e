"""A linear layer with a coefficient-controlled change in the span of its top singular directions."""

from typing import Any

import torch
from einops import einsum
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from repeng.tuner.config import SvdSteeringConfig

INIT_STD = 0.02  # of the skew matrix and of λ when init_weights is False


class Coefficients:
    """The coefficient of every adapter of one model: one object that all of its layers refer to.

    A coefficient is one number or one for each batch row. Adapters without an entry stand at 1.
    """

    def __init__(self) -> None:
        self._given: dict[str, Tensor] = {}
        self._unique: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._zero: dict[str, bool] = {}

    def snapshot(self) -> dict[str, Tensor]:
        """What `restore` takes."""
        return dict(self._given)

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Make the state what it was when `snapshot` was taken."""
        self.__init__()
        for name, value in snapshot.items():
            self.set(name, value)

    def set(self, name: str, value: Tensor | float) -> None:
        """Set adapter `name` to `value`, a number, a 0-dim tensor or a `(b,)` tensor.

        Raises:
            ValueError: `value` has another shape or is not finite.
        """
        value = torch.as_tensor(value, dtype=torch.float32).detach()
        if value.ndim > 1 or value.numel() == 0:
            raise ValueError(f"a coefficient is one number or one for each row; got shape {tuple(value.shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"a coefficient must be finite; got {value.tolist()}")
        self._given[name] = value
        # Distinct values once a change, not once a layer: each needs its own rotation.
        self._unique[name] = (value[None], None) if value.ndim == 0 else torch.unique(value, return_inverse=True)
        self._zero[name] = not value.any().item()

    def is_zero(self, name: str) -> bool:
        """Whether the adapter stands at 0 for every row."""
        return self._zero.get(name, False)

    def unique(self, name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Distinct coefficients `(n,)` and the index of each row into them `(b,)`, or None for one number."""
        values, index = self._unique.get(name, (torch.ones(1), None))
        return values.to(device), None if index is None else index.to(device)


class SvdSteeringLayer(BaseTunerLayer):
    """State of the method on one site. Stored tensors, by adapter name:

    `svd_steering_u (d_out r)`, `svd_steering_s (r)`, `svd_steering_v (d_in r)`: frozen bases, saved with the adapter;
    `svd_steering_in (r(r−1)/2)`, `svd_steering_out`: upper triangles of the skew matrices; `svd_steering_lambda (r)`.
    """

    adapter_layer_names = ("svd_steering_in", "svd_steering_out", "svd_steering_lambda")
    other_param_names = ("svd_steering_u", "svd_steering_s", "svd_steering_v", "r")

    def __init__(self, base_layer: nn.Module, coefficients: Coefficients) -> None:
        self.base_layer = base_layer
        self.coefficients = coefficients
        self.r: dict[str, int] = {}
        self.svd_steering_in = nn.ParameterDict()
        self.svd_steering_out = nn.ParameterDict()
        self.svd_steering_lambda = nn.ParameterDict()
        self.svd_steering_u = BufferDict(persistent=True)
        self.svd_steering_s = BufferDict(persistent=True)
        self.svd_steering_v = BufferDict(persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = linear_shape(self.get_base_layer())

    def update_layer(self, adapter_name: str, config: SvdSteeringConfig) -> None:
        """Add an adapter: bases by SVD (or NaN until they are loaded), parameters at zero."""
        r = config.r
        self.r[adapter_name] = r
        if config.init_bases:
            u, s, v = top_singular_triples(self.dense_weight(), r, config.svd_niter, config.svd_seed)
        else:
            u, s, v = (torch.full(shape, torch.nan) for shape in ((self.out_features, r), (r,), (self.in_features, r)))
        self.svd_steering_u[adapter_name], self.svd_steering_v[adapter_name] = u, v
        self.svd_steering_s[adapter_name] = s

        def parameter(n: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n) * INIT_STD)

        if config.rotate_input:
            self.svd_steering_in[adapter_name] = parameter(r * (r - 1) // 2)
        if config.rotate_output:
            self.svd_steering_out[adapter_name] = parameter(r * (r - 1) // 2)
        if config.scale:
            self.svd_steering_lambda[adapter_name] = parameter(r)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The base weight `(d_out d_in)` in float32."""
        base = self.get_base_layer()
        weight = base.weight.detach().float()
        return weight.mT if isinstance(base, Conv1D) else weight

    def gain(self, adapter_name: str, coefficient: Tensor) -> Tensor:
        """K(c), `(n r r)` in float32, for coefficients `(n,)`; exactly zero at c = 0."""
        s = self.svd_steering_s[adapter_name].float()
        spread = torch.zeros_like(coefficient)[:, None]
        if adapter_name in self.svd_steering_lambda:
            spread = coefficient[:, None] * self.svd_steering_lambda[adapter_name].float()
        gain = torch.diag_embed(s * spread.exp())
        if adapter_name in self.svd_steering_out:
            gain = rotation(self.svd_steering_out[adapter_name], coefficient, s.numel()) @ gain
        if adapter_name in self.svd_steering_in:
            gain = gain @ rotation(self.svd_steering_in[adapter_name], coefficient, s.numel()).mT
        return gain - s.diag()

    def delta(self, x: Tensor, adapter_name: str) -> Tensor:
        """The change of the output at the current coefficient, `(… d_out)` for `x (… d_in)`."""
        u, v = self.svd_steering_u[adapter_name], self.svd_steering_v[adapter_name]
        values, index = self.coefficients.unique(adapter_name, x.device)
        gain = self.gain(adapter_name, values).to(v.dtype)
        z = self._cast_input_dtype(x, v.dtype) @ v
        if index is None:
            z = z @ gain[0].mT
        else:
            z = einsum(z, gain[rows_of(index, x)], "b ... r, b s r -> b ... s")
        return z @ u.mT


class Linear(nn.Module, SvdSteeringLayer):
    """`y = base(x) + [(x V) K(c)ᵀ] Uᵀ` on top of `nn.Linear` or `Conv1D`; the base layer itself runs untouched."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SvdSteeringConfig, coefficients: Coefficients
    ) -> None:
        nn.Module.__init__(self)
        SvdSteeringLayer.__init__(self, base_layer, coefficients)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.svd_steering_u and not self.coefficients.is_zero(name):
                result = result + self.delta(x, name).to(result.dtype)
        return result


def rotation(triangle: Tensor, coefficient: Tensor, r: int) -> Tensor:
    """Cayley rotations `R(c) = (I − cA/2)⁻¹ (I + cA/2)`, `(n r r)` in float32; A is skew with this upper triangle.

    R(−c) = R(c)ᵀ, and the derivative at c = 0 is A. A plane of A with eigenvalue ±iω turns by
    2 arctan(cω/2), under 180°.
    """
    rows, cols = torch.triu_indices(r, r, 1, device=triangle.device)
    upper = torch.zeros(r, r, device=triangle.device).index_put((rows, cols), triangle.float())
    half = coefficient[:, None, None] * (upper - upper.mT) / 2
    eye = torch.eye(r, device=triangle.device)
    return torch.linalg.solve(eye - half, eye + half)


@torch.no_grad()
def top_singular_triples(weight: Tensor, r: int, niter: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U `(d_out r)`, S `(r)`, V `(d_in r)` of `weight (d_out d_in)`: exact for `niter` 0, else randomised.

    The randomised form is that of Halko, Martinsson and Tropp (2011) with 16 extra directions, in a forked random
    number generator, so that creating an adapter leaves the caller's random state alone.
    """
    if niter == 0:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :r].contiguous(), s[:r].contiguous(), vh[:r].mT.contiguous()
    devices = [] if weight.device.type == "cpu" else [weight.device]
    with torch.random.fork_rng(devices=devices, device_type="cuda" if not devices else weight.device.type):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=min(r + 16, *weight.shape), niter=niter)
    return u[:, :r].contiguous(), s[:r].contiguous(), v[:, :r].contiguous()


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """`(d_in, d_out)` of a linear layer or a Conv1D."""
    return tuple(layer.weight.shape) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def rows_of(index: Tensor, x: Tensor) -> Tensor:
    """The index of each row of `x`: beams and returned sequences repeat a row of the prompt batch side by side."""
    if x.shape[0] == index.numel():
        return index
    if x.ndim < 3 or x.shape[0] % index.numel():
        raise ValueError(
            f"{index.numel()} per-row coefficients were given, and the layer sees input of shape {tuple(x.shape)}; "
            "give one coefficient for each row of the batch, or one number"
        )
    return index.repeat_interleave(x.shape[0] // index.numel())
