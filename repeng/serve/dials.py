"""Adapters and vectors by the names that requests use."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from repeng.control.adapter_folder import AdapterFolder
from repeng.control.steer import steer
from repeng.vectors.vector import SteeringVector, read_vector


class Dials:
    """Everything that can steer one model.

    Args:
        model: the model; adapters are injected into it and active.
        adapters: what its adapters are called in PEFT, by name.
        vectors: steering vectors by name.

    Raises:
        ValueError: something cannot be steered, or fits another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Mapping[str, str] | None = None,
        vectors: Mapping[str, SteeringVector] | None = None,
    ) -> None:
        self.model: PreTrainedModel = model
        self._adapters = dict(adapters or {})
        self._vectors = dict(vectors or {})
        self.names: tuple[str, ...] = (*self._adapters, *self._vectors)
        for name, tensor in self._numbers():
            if not tensor.isfinite().all():
                raise ValueError(f"{name!r} holds values that are not finite; it seems to be broken")
        with self.at(dict.fromkeys(self.names, 1.0)):
            pass

    def _numbers(self) -> Iterator[tuple[str, Tensor]]:
        """What steers, by name."""
        for name, vector in self._vectors.items():
            yield from ((name, direction) for direction in vector.directions.values())
        names = {called: name for name, called in self._adapters.items()}
        for place, tensor in chain(self.model.named_parameters(), self.model.named_buffers()):
            yield from ((names[part], tensor) for part in place.split(".") if part in names)

    @contextmanager
    def at(self, coefficients: Mapping[str, float | Tensor]) -> Iterator[None]:
        """Inside the context, the model is steered; what is not named stands at 0.

        Args:
            coefficients: by name, as `steer` takes them.
        """
        with ExitStack() as stack:
            for name, called in self._adapters.items():
                stack.enter_context(steer(self.model, coefficients.get(name, 0.0), adapter_name=called))
            for name, vector in self._vectors.items():
                stack.enter_context(steer(self.model, coefficients.get(name, 0.0), vector=vector))
            yield


def load_dials(model: PreTrainedModel, paths: Mapping[str, Path]) -> Dials:
    """Load adapters (folders) and vectors (files) onto a model, which is changed.

    Raises:
        ValueError: what lies at a path does not fit the model.
    """
    folders = {name: AdapterFolder.read(path) for name, path in paths.items() if path.is_dir()}
    vectors = {name: read_vector(path) for name, path in paths.items() if path.is_file()}
    called = {name: f"dial-{name}" for name in folders}  # PEFT mixes up names that are part of "lora_"
    by_kind: dict[Any, list[str]] = {}
    for name, folder in folders.items():
        folder.check(model)
        by_kind.setdefault(folder.config.peft_type, []).append(name)
    for vector in vectors.values():
        vector.check(model)
    for of_kind in by_kind.values():
        adapted: nn.Module = model
        for name in of_kind:
            adapted = folders[name].load(adapted, called[name])
        tuner: Any = adapted.base_model
        tuner.set_adapter([called[name] for name in of_kind])
    model.requires_grad_(False)
    return Dials(model.eval(), called, vectors)


def per_token(values: list[float], lengths: list[int]) -> float | Tensor:
    """One number if all texts have the same, else `(1 t)`: the value of each token of a row that packs the texts."""
    if len(set(values)) == 1:
        return values[0]
    return torch.repeat_interleave(torch.tensor(values), torch.tensor(lengths))[None]
