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
    """The adapters and vectors that can steer one model.

    Args:
        model: the model, with its adapters injected and active.
        adapters: names of its adapters in PEFT, by the names that requests use.
        vectors: steering vectors, by the names that requests use.

    Raises:
        ValueError: an adapter or vector holds values that are not finite, cannot be steered, or fits another model.
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
        """All tensors of the adapters and vectors, each with the name that requests use."""
        for name, vector in self._vectors.items():
            yield from ((name, direction) for direction in vector.directions.values())
        names = {called: name for name, called in self._adapters.items()}
        for place, tensor in chain(self.model.named_parameters(), self.model.named_buffers()):
            yield from ((names[part], tensor) for part in place.split(".") if part in names)

    @contextmanager
    def at(self, coefficients: Mapping[str, float | Tensor]) -> Iterator[None]:
        """Steer the model inside the context. Adapters and vectors without a coefficient are at 0.

        Args:
            coefficients: coefficients by name, in the form that `steer` accepts.
        """
        with ExitStack() as stack:
            for name, called in self._adapters.items():
                stack.enter_context(steer(self.model, coefficients.get(name, 0.0), adapter_name=called))
            for name, vector in self._vectors.items():
                stack.enter_context(steer(self.model, coefficients.get(name, 0.0), vector=vector))
            yield


def load_dials(model: PreTrainedModel, paths: Mapping[str, Path]) -> Dials:
    """Load adapters (folders) and vectors (files) onto a model. This changes the model.

    Raises:
        ValueError: an adapter or vector does not fit the model.
    """
    folders = {name: AdapterFolder.read(path) for name, path in paths.items() if path.is_dir()}
    vectors = {name: read_vector(path) for name, path in paths.items() if path.is_file()}
    # With the prefix: PEFT confuses a name that is part of "lora_" with its parameter names.
    called = {name: f"dial-{name}" for name in folders}
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
    """The value of every token in a row that packs several texts, `(1 t)`; one number if all texts have the same."""
    if len(set(values)) == 1:
        return values[0]
    return torch.repeat_interleave(torch.tensor(values), torch.tensor(lengths))[None]
