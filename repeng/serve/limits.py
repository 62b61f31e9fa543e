"""Limits of one server. This module has no slow imports."""

import math
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Limits:
    """Limits of one server."""

    max_length: int | None = field(
        default=None,
        metadata={"help": "tokens of prompt and answer together; by default the positions of the model, at most 4096"},
    )
    max_concurrent: int = field(default=16, metadata={"help": "requests in one batch"})
    max_waiting: int = field(default=256, metadata={"help": "waiting requests; further requests get HTTP status 429"})
    max_coefficient: float = field(default=10.0, metadata={"help": "largest absolute value of a coefficient"})

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{one.name} must be above 0; got {value}")
