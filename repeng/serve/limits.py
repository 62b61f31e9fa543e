"""What one server takes; without an import that takes long."""

import math
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Limits:
    """What one server takes."""

    max_length: int | None = field(
        default=None, metadata={"help": "tokens of prompt and answer; by default the model's, to 4096"}
    )
    max_concurrent: int = field(default=16, metadata={"help": "requests in one batch"})
    max_waiting: int = field(default=256, metadata={"help": "requests that wait for their turn; more get 429"})
    max_coefficient: float = field(default=10.0, metadata={"help": "the largest coefficient, either sign"})

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{one.name} must be above 0; got {value}")
