"""The coefficients of a model's adapters, and the rotations computed from them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repeng.tuner.rotation import Rotations, can_be_batched, rotation


@dataclass(frozen=True)
class Setting:
    """One adapter's coefficient, prepared once per change instead of once per layer.

    Attributes:
        given: the coefficient as it was set.
        values: distinct coefficients in the adapter's own units, `(n,)`.
        index: index into `values` for each row, `(b,)`, or for each token, `(b t)`; None for a single number.
        magnitude: distinct |c|, `(a,)`.
        which: index into `magnitude` for each entry of `values`, `(n,)`.
    """

    given: Tensor
    values: Tensor
    index: Tensor | None
    magnitude: Tensor
    which: Tensor

    @classmethod
    def of(cls, given: Tensor, units: tuple[float, float] = (1.0, 1.0)) -> "Setting":
        given = given.clone()  # the caller may write to its own tensor
        in_units = given * torch.where(given < 0, units[1], units[0])
        values, index = (in_units[None], None) if in_units.ndim == 0 else torch.unique(in_units, return_inverse=True)
        return cls(given, values, index, *torch.unique(values.abs(), return_inverse=True))

    def to(self, device: torch.device) -> "Setting":
        index = None if self.index is None else self.index.to(device)
        return Setting(self.given, self.values.to(device), index, self.magnitude.to(device), self.which.to(device))


ONE = Setting.of(torch.ones(()))


class Coefficients:
    """The coefficients of all adapters, shared by all steering layers of a model. The default coefficient is 1."""

    def __init__(self) -> None:
        self._settings: dict[str, dict[torch.device, Setting]] = {}
        self._default: dict[torch.device, Setting] = {ONE.given.device: ONE}
        # By adapter: the values of +1 and −1 in its own units, and the default coefficient in these units.
        self._units: dict[str, tuple[float, float]] = {}
        self._defaults: dict[str, dict[torch.device, Setting]] = {}
        self._zero: dict[str, bool] = {}
        self._triangles: list[nn.ParameterDict] = []
        # By adapter, rank and site: the triangle, its version, whether gradients were enabled, its rotations.
        self._ready: dict[tuple[str, int, int], tuple[Tensor, int, bool, Tensor]] = {}
        # By adapter and site: ids and versions of the parameters, the result computed from them, the parameters.
        self._kept: dict[tuple[str, int], tuple[list[tuple[int, int, int]], Tensor, list[Tensor]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Rotations with an autograd graph can be neither copied nor pickled, and keys hold addresses in this process.
        return {**self.__dict__, "_ready": {}, "_kept": {}}

    def set_units(self, name: str, plus: float, minus: float) -> None:
        """Let c = 1 of adapter `name` stand for `plus` of its own units, and c = −1 for `−minus`.

        Raises:
            ValueError: a unit is not a positive number, or a `steer` context that sets the adapter is open.
        """
        if not all(0 < unit < math.inf for unit in (plus, minus)):
            raise ValueError(f"the units of a coefficient must be positive numbers; got plus={plus} and minus={minus}")
        if name in self._settings:
            raise ValueError(f"a `steer` context sets the coefficient of adapter {name!r}; leave the contexts first")
        self._units[name] = (float(plus), float(minus))
        setting = Setting.of(ONE.given, self._units[name])
        self._defaults[name] = {setting.given.device: setting}
        self._ready, self._kept = {}, {}

    def register(self, triangles: nn.ParameterDict) -> None:
        """Register the triangles of one site, by adapter name. The rotations of all registered sites are batched."""
        self._triangles.append(triangles)

    def snapshot(self) -> dict[str, tuple[dict[torch.device, Setting], bool]]:
        """The current coefficients, for `restore`."""
        return {name: (by_device, self._zero[name]) for name, by_device in self._settings.items()}

    def restore(self, snapshot: dict[str, tuple[dict[torch.device, Setting], bool]]) -> None:
        """Reset the coefficients to those of `snapshot`."""
        self._settings = {name: by_device for name, (by_device, _) in snapshot.items()}
        self._zero = {name: zero for name, (_, zero) in snapshot.items()}
        self._ready, self._kept = {}, {}

    # Tensors created in inference mode could not be used in a later training step.
    @torch.inference_mode(False)
    def set(self, name: str, value: Tensor | float) -> None:
        """Set adapter `name` to `value`: a number, or a tensor `()`, `(b,)` or `(b t)`.

        Raises:
            ValueError: `value` has another shape or is not finite.
        """
        value = as_coefficient(value)
        setting = Setting.of(value, self._units.get(name, (1.0, 1.0)))
        self._settings[name] = {value.device: setting}
        self._zero[name] = not value.any().item()
        self._ready, self._kept = {}, {}

    def get(self, name: str) -> Tensor:
        """The coefficient of adapter `name` as it was set."""
        return next(iter(self._by_device(name).values())).given

    def _by_device(self, name: str) -> dict[torch.device, Setting]:
        return self._settings.get(name) or self._defaults.get(name, self._default)

    def is_zero(self, name: str) -> bool:
        """Whether the adapter's coefficient is 0 for every row."""
        return self._zero.get(name, False)

    def setting(self, name: str, device: torch.device) -> Setting:
        """The prepared coefficient of adapter `name` on `device`."""
        by_device = self._by_device(name)
        if device not in by_device:
            with torch.inference_mode(False):
                by_device[device] = next(iter(by_device.values())).to(device)
        return by_device[device]

    def once(self, name: str, site: int, parameters: list[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """The result of `compute`, which depends only on the coefficient of `name` and on `parameters`.

        The result is cached only inside `steer` and without gradients, as in generation. It is kept until the
        coefficient or a parameter changes, or a forward pass with gradients begins. PyTorch cannot detect a write
        through `parameter.data`, so such a write does not clear the cache.
        """
        if torch.compiler.is_compiling():
            return compute()
        tracked = all(type(p.data) is Tensor and not p.is_inference() for p in parameters)
        if torch.is_grad_enabled() or name not in self._zero or not tracked:
            self._kept.pop((name, site), None)
            return compute()
        stamp = [(id(p), p.data_ptr(), p._version) for p in parameters]
        entry = self._kept.get((name, site))
        if entry is None or entry[0] != stamp:
            entry = self._kept[name, site] = (stamp, compute(), parameters)  # references keep the ids valid
        return entry[1]

    def rotation(self, triangles: nn.ParameterDict, name: str, r: int) -> Tensor:
        """Rotations `(n r r)` of adapter `name` for one site, at the distinct values of its coefficient.

        The first request computes the rotations of all registered sites of this rank in one batch. Each result is
        used once, so the next forward pass, after an optimizer step, computes the rotations again.
        """
        mine = triangles[name]
        setting = self.setting(name, mine.device)
        if torch.compiler.is_compiling():
            return rotation(mine, setting.values, r)
        key = (name, r, id(triangles))
        ready = self._ready.pop(key, None)
        if ready is None or ready[0] is not mine or ready[1:3] != (_version(mine), torch.is_grad_enabled()):
            sites = [site for site in self._triangles if name in site and site[name].device == mine.device]
            sites = [site for site in sites if can_be_batched([mine, site[name]], r)]
            if not any(site is triangles for site in sites):
                return rotation(mine, setting.values, r)
            turns = Rotations.apply(
                setting.values, setting.magnitude, setting.which, r, *(site[name] for site in sites)
            )
            for site, turn in zip(sites, turns, strict=True):
                self._ready[name, r, id(site)] = (site[name], _version(site[name]), torch.is_grad_enabled(), turn)
            ready = self._ready.pop(key)
        return ready[3]


def as_coefficient(value: Tensor | float) -> Tensor:
    """The value as a float32 tensor `()`, `(b,)` or `(b t)`.

    Raises:
        ValueError: the value has another shape or is not finite.
    """
    value = torch.as_tensor(value, dtype=torch.float32).detach()
    if value.ndim > 2 or value.numel() == 0:
        raise ValueError(
            f"a coefficient is a single number, one number per row or one per token; got shape {tuple(value.shape)}"
        )
    if not torch.isfinite(value).all():
        raise ValueError(f"a coefficient must be finite; got {value.tolist()}")
    return value


def _version(tensor: Tensor) -> int:
    """How often the tensor was written in place, or −1 for an inference tensor, which PyTorch does not track."""
    return -1 if tensor.is_inference() else tensor._version


def repeat_rows(values: Tensor, x: Tensor) -> Tensor:
    """Repeat values `(b,)` or `(b t)` to match the rows of `x (b' t …)`.

    Generation with beams or several returned sequences repeats each row, with the copies next to each other.

    Raises:
        ValueError: the numbers of rows or tokens of `x` do not match.
    """
    rows = len(values)
    fits = x.shape[0] == rows or (x.ndim > 2 and x.shape[0] % rows == 0)
    if not fits or (values.ndim == 2 and values.shape[1:] != x.shape[1:-1]):
        each = "row" if values.ndim == 1 else "token"
        raise ValueError(
            f"{' × '.join(map(str, values.shape))} coefficients were given, one per {each}, but the layer's input has "
            f"shape {tuple(x.shape)}; give one coefficient per {each} of the batch, or a single number"
        )
    return values if x.shape[0] == rows else values.repeat_interleave(x.shape[0] // rows, dim=0)
