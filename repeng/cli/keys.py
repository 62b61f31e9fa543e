"""Keys of the commands that also take the keys of a task."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from repeng.data.kinds import Folder, Layers, Word


@dataclass
class ModelArguments:
    """Keys of every command that loads the model of a task."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = field(
        default=42, metadata={"help": "Seed for drawing pairs and neutral texts, as in training."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU even if there is a GPU."})


@dataclass
class MeasureArguments(ModelArguments):
    """Keys of the commands that measure an adapter or a vector."""

    bf16: bool = field(default=False, metadata={"help": "Compute a 4-bit base in bfloat16, as in training."})


@dataclass
class EvaluateArguments(MeasureArguments):
    """Keys of `repeng evaluate`."""

    output: Folder | None = field(
        default=None,
        metadata={"help": "Folder of the report; None = PATH/evaluation for an adapter, for a vector beside PATH."},
    )
    require_steering: bool = field(
        default=False,
        metadata={
            "help": "Exit with an error unless both arms gain more than a random direction, "
            "and 95 percent of the questions move with the coefficient."
        },
    )


@dataclass
class CalibrateArguments(MeasureArguments):
    """Keys of `repeng calibrate`."""

    nats: Annotated[float, Field(ge=1e-4, le=100)] = field(
        default=1.0, metadata={"help": "Budget: KL divergence from the base per token, in nats."}
    )
    sequences: Annotated[int, Field(ge=2, le=1_000_000)] = field(
        default=512, metadata={"help": "Continuations to draw."}
    )
    percentile: Annotated[float, Field(gt=0, lt=100)] = field(
        default=95.0, metadata={"help": "Percentile of the tokens' KL divergences that must stay within the budget."}
    )


@dataclass
class ExtractArguments(ModelArguments):
    """Keys of `repeng extract`."""

    method: str = field(default="mean_diff", metadata={"help": "Method, such as mean_diff, pca_diff or gradient."})
    layers: Layers | None = field(
        default=None,
        metadata={"help": "Decoder layers: indices from 0, or a share of the depth; None = one, at two thirds."},
    )
    output: Word | None = field(
        default=None, metadata={"help": "File of the vector; None = POSITIVE-NEGATIVE.safetensors."}
    )


@dataclass
class PairsArguments:
    """Keys of `repeng pairs`."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = field(default=42, metadata={"help": "Seed for drawing pairs."})
    output: Word | None = field(default=None, metadata={"help": "For `make`: the file to write, JSON Lines."})


MEASURES: dict[str, type[MeasureArguments]] = {
    "evaluate": EvaluateArguments,
    "calibrate": CalibrateArguments,
}
