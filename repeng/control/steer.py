"""The context manager that steers a model, by adapters or by vectors."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn

from repeng.control.cache_guard import Influence, State, current, guarded
from repeng.control.lora import lora_modules, lora_names, scaled
from repeng.control.operators import OPERATORS, Operator, edit_with
from repeng.control.positions import Positions, TokenFilter, unpacked
from repeng.model.sites import edit_outputs, site_modules, trunk
from repeng.tuner import Coefficients, SvdSteeringLayer
from repeng.tuner.coefficients import as_coefficient
from repeng.vectors.gate import Gate
from repeng.vectors.vector import SteeringVector


@contextmanager
def steer(
    model: nn.Module,
    coefficient: float | Tensor,
    vector: SteeringVector | None = None,
    adapter_name: str | None = None,
    *,
    operator: Operator = "add",
    positions: Positions = "all",
    clamp: float | None = None,
    gate: Gate | None = None,
    reuse_cache: bool = False,
) -> Iterator[None]:
    """Steer `model` by `coefficient` inside the context: its adapters, or `vector`.

    Contexts can be nested, so several vectors and adapters can act together. On exit, also after an exception, the
    previous state is restored. Everything that runs the model's forward pass is steered: `generate`, a pipeline,
    training.

    Args:
        model: a model with steering or LoRA adapters (a `PeftModel`, or a module with injected adapters); with
            `vector`, any causal language model.
        coefficient: a single number, a `(b,)` tensor with one coefficient per batch row, or a `(b t)` tensor with one
            per token, for rows that pack several texts. 0 is exactly the base model. If the adapter, or the vector
            that is added, is calibrated, ±1 has the calibrated strength.
        vector: a steering vector that acts on the outputs of its sites; without it, adapters are used.
        adapter_name: the adapter to set. By default, every active steering adapter; if the model has none, the change
            of every active LoRA adapter is multiplied by the coefficient.
        operator: for a vector: "add" it; "ablate" its direction, completely at 1; "rotate" toward it at constant norm.
        positions: for a vector: "all" tokens except padding, the tokens of the "prompt", the "generated" tokens, or a
            slice of the real tokens. A slice counts from the first real token; negative bounds count from the end of
            the prompt.
        clamp: for a vector: the norm of a token is limited to `clamp` times its norm before the edit.
        gate: for a vector: computes how strongly each token is steered; see `repeng.fit_gate`.
        reuse_cache: allow a key-value cache that was made under other steering. By default, such a cache raises.

    Raises:
        ValueError: there is no such adapter, the coefficient has another shape or is not finite, the vector is for
            another model, or an option is not allowed.
    """
    if vector is None:
        if (operator, positions, clamp, gate) != ("add", "all", None, None):
            raise ValueError("operator, positions, clamp and gate go with a vector; an adapter acts on every token")
        with _steer_adapters(model, coefficient, adapter_name, reuse_cache):
            yield
        return
    if adapter_name is not None:
        raise ValueError(f"vector and adapter_name={adapter_name!r} exclude each other; nest two contexts instead")
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; choose one of {', '.join(OPERATORS)}")
    if clamp is not None and clamp <= 0:
        raise ValueError(f"clamp must be above 0; got {clamp}")
    value = as_coefficient(coefficient)
    if operator == "add":
        value = vector.in_own_units(value)
    vector.check(model)
    if gate is not None:
        gate.check(vector)
    where, runs = TokenFilter(positions), trunk(model)
    if not value.any():
        with guarded(runs, current(runs), reuse_cache):
            yield
        return
    modules = site_modules(model, list(vector.directions))
    edits = [
        (module, edit_with(operator, direction, value, clamp, where, gate and partial(gate.factor, place)))
        for module, (place, direction) in zip(modules, vector.directions.items(), strict=True)
    ]
    influence = Influence("a vector", (vector, operator, positions, clamp, gate), _as_key(value))
    state = (*current(runs), influence)  # adapters first, then vectors in the order in which they act
    unknown = f"positions={positions!r}" if positions != "all" else _by_rows(value)
    with unpacked(model, unknown), where.watching(model, runs), edit_outputs(edits):
        with guarded(runs, state, reuse_cache):
            yield


@contextmanager
def _steer_adapters(
    model: nn.Module, coefficient: float | Tensor, adapter_name: str | None, reuse_cache: bool
) -> Iterator[None]:
    """Set the coefficient of steering adapters, or of LoRA adapters, inside the context."""
    stores, loras = _adapters(model, adapter_name)
    value = as_coefficient(coefficient)
    before = [(store, store.snapshot()) for store, _ in stores]
    try:
        for store, names in stores:
            for name in names:
                store.set(name, value)
        names = sorted({*loras, *(name for _, names in stores for name in names)})
        with ExitStack() as stack:
            stack.enter_context(scaled([module for modules in loras.values() for module in modules], value))
            stack.enter_context(unpacked(model, _by_rows(value)))
            stack.enter_context(_guard_adapters(model, names, value, reuse_cache))
            yield
    finally:
        for store, snapshot in before:
            store.restore(snapshot)


def _guard_adapters(model: nn.Module, names: list[str], value: Tensor, reuse_cache: bool):
    """The guard of key-value caches for adapters. A model whose decoder layers cannot be found gets no guard."""
    try:
        runs = trunk(model)
    except ValueError:
        return nullcontext()
    labels = [f"adapter {name!r}" for name in names]
    state: State = tuple(one for one in current(runs) if one.name not in labels)
    if value.ndim or value != 1:  # at 1 an adapter acts as it does outside of every context
        state = (*(Influence(label, (), _as_key(value)) for label in sorted(labels)), *state)
    return guarded(runs, state, reuse_cache)


def _by_rows(value: Tensor) -> str | None:
    """The name, for messages, of a coefficient per row or token; None for a single number."""
    return "a coefficient for each row or token" if value.ndim else None


def _as_key(value: Tensor) -> float | tuple[float, ...]:
    return value.item() if value.ndim == 0 else (*value.shape, *value.flatten().tolist())


def _adapters(
    model: nn.Module, adapter_name: str | None
) -> tuple[list[tuple[Coefficients, list[str]]], dict[str, list[nn.Module]]]:
    """The coefficient stores of `model`, each with the adapters to set in it, and the LoRA adapters to scale.

    Raises:
        ValueError: there is no such active adapter, or an adapter is merged into the weights.
    """
    names: dict[int, set[str]] = {}
    stores: dict[int, Coefficients] = {}
    available: set[str] = set()
    active: set[str] = set()
    for layer in model.modules():
        if isinstance(layer, SvdSteeringLayer):
            if layer.merged:
                raise ValueError(
                    f"adapter {', '.join(layer.merged_adapters)} is merged into the weights, where no coefficient "
                    "can scale it; call unmerge_adapter() first"
                )
            names_in_layer = set(layer.r)
            available |= names_in_layer
            active |= names_in_layer & set(layer.active_adapters)
            stores[id(layer.coefficients)] = layer.coefficients
            names.setdefault(id(layer.coefficients), set()).update(names_in_layer & set(layer.active_adapters))
    if adapter_name in available - active:
        raise ValueError(
            f"adapter {adapter_name!r} is not active, so no coefficient would have an effect; call set_adapter first"
        )
    wanted = active if adapter_name is None else active & {adapter_name}
    if not wanted:
        loras = {} if available and adapter_name is None else lora_modules(model, adapter_name)
        if loras:
            return [], loras
        wanted_text = (
            "an active steering adapter" if adapter_name is None else f"the steering adapter {adapter_name!r}"
        )
        listed = ", ".join(sorted({*available, *lora_names(model)})) or "none"
        raise ValueError(
            f"{type(model).__name__} lacks {wanted_text}; it has: {listed}. "
            "Load an adapter with PeftModel.from_pretrained, or pass vector="
        )
    return [(store, sorted(names[key] & wanted)) for key, store in stores.items()], {}
