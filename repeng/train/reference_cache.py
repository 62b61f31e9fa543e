"""Files with the outputs of the base model on the training examples, computed once and shared by all processes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from repeng.data.files import written_whole
from repeng.model.identity import model_key
from repeng.train.collator import SIDES, STACKED, Example, ReferencedExample

VERSION = 4


class Processes(Protocol):
    """The part of `accelerate.Accelerator` that this file uses."""

    @property
    def num_processes(self) -> int: ...

    @property
    def process_index(self) -> int: ...

    @property
    def mixed_precision(self) -> str: ...

    def wait_for_everyone(self) -> None: ...


class ReferenceExamples(Sequence[ReferencedExample]):
    """Training examples with their reference, read from memory-mapped files on access.

    Example i is row `i // len(parts)` of part `i % len(parts)`.
    """

    def __init__(self, examples: Sequence[Example], parts: Sequence[Path]) -> None:
        self.examples: Sequence[Example] = examples
        self.paths: list[Path] = list(parts)
        self.parts: list[dict[str, Tensor]] = []
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                self.parts.append({name: file.get_tensor(name) for name in file.keys()})

    def __getstate__(self) -> dict[str, Any]:
        return {"examples": self.examples, "paths": self.paths}  # each worker process maps the files itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["examples"], state["paths"])

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> ReferencedExample: ...

    @overload
    def __getitem__(self, index: slice) -> list[ReferencedExample]: ...

    def __getitem__(self, index: int | slice) -> ReferencedExample | list[ReferencedExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        row, part = divmod(index, len(self.parts))
        tensors = self.parts[part]
        n = len(SIDES)
        starts = tensors["ref_logp_starts"][n * row : n * row + n + 1].tolist()
        logp = [tensors["ref_logp"][a:b] for a, b in itertools.pairwise(starts)]
        stacked = {name: tensors[name][row] for name in STACKED}
        return cast(ReferencedExample, {**self.examples[index], **stacked, "ref_logp": logp})

    def __iter__(self) -> Iterator[ReferencedExample]:
        return (self[index] for index in range(len(self)))


def cached_reference(
    examples: Sequence[Example],
    compute: Callable[[Sequence[Example]], list[ReferencedExample]],
    *,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    accelerator: Processes,
    **settings: Any,
) -> ReferenceExamples:
    """The examples with their reference: read from files in `folder` if they fit, else computed and written there.

    Every process computes its share. The file name is a hash of model, tokenizer, data, precision and settings; files
    with another hash are deleted.

    Args:
        examples: training examples.
        compute: adds the reference to examples.
        model: the model; its base parameters are part of the hash.
        tokenizer: the tokenizer, also part of the hash.
        folder: the folder of the files.
        accelerator: tells the number of processes and the rank of this one.
        settings: everything else that the reference depends on, JSON-serialisable.
    """
    key = reference_key(examples, model, tokenizer, precision=accelerator.mixed_precision, **settings)
    world, rank = accelerator.num_processes, accelerator.process_index
    paths = [Path(folder) / f"reference-{key}-{part}-of-{world}.safetensors" for part in range(world)]
    if not _readable(paths[rank]):
        _write_part(compute(examples[rank::world]), paths[rank])
    accelerator.wait_for_everyone()
    if rank == 0:
        for stale in set(Path(folder).glob("reference-*-of-*.safetensors")) - set(paths):
            stale.unlink()
    return ReferenceExamples(examples, paths)


def _write_part(done: Sequence[ReferencedExample], path: Path) -> None:
    """Write the reference of a share of the examples completely or not at all."""
    tensors = {name: torch.stack([example[name] for example in done]).contiguous() for name in STACKED}
    logp = [row for example in done for row in example["ref_logp"]]
    tensors["ref_logp"] = torch.cat(logp).contiguous()
    lengths = torch.tensor([0, *(len(row) for row in logp)])
    tensors["ref_logp_starts"] = lengths.cumsum(dim=0)
    with written_whole(path) as place:
        save_file(tensors, place)


def _readable(path: Path) -> bool:
    """Whether the file of a part exists and is a readable tensor file."""
    try:
        with safe_open(path, framework="pt") as file:
            return "ref_logp_starts" in file.keys()
    except (OSError, SafetensorError):
        return False


def reference_key(
    examples: Sequence[Example], model: nn.Module, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> str:
    """A hash of all that the reference depends on: samples of the base parameters, tokenizer, data, settings."""
    rows = [[example[side] for side in SIDES] for example in examples]
    return model_key(model, tokenizer, VERSION, settings, rows)
