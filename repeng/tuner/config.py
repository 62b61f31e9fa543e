"""Configuration of the PEFT method."""

import re
from dataclasses import dataclass, field
from enum import Enum
from numbers import Integral
from typing import Any, cast

from peft import PeftConfig, PeftType

from repeng.tuner.fields import check_expression, check_fields


class SteeringType(str, Enum):  # noqa: UP042 — PEFT reads the class's name in str() too
    """The key of the method. Like a member of PEFT's enum, it equals its text, hashes like it and is saved as it."""

    SVD_STEERING = "SVD_STEERING"


# `PeftType` itself takes no new members.
PEFT_TYPE = cast(PeftType, SteeringType.SVD_STEERING)
PREFIX = "svd_steering_"
FORMAT_VERSION = 2  # the newest format that is read; a file names the oldest format that can express its content


@dataclass
class SvdSteeringConfig(PeftConfig):
    """Rotate and scale the top singular directions of linear layers, or of the residual stream, by one coefficient c.

    Linear layer: `y = base(x) + [(x V) K(c)ᵀ] Uᵀ` with `K(c) = R_out(c) diag(S exp(c λ)) R_in(c)ᵀ − diag(S)`. Here
    `U, S, V` are the top `r` singular triples of the frozen weight, and λ is learned (with `additive_scale`, `S + c λ`
    replaces `S exp(c λ)`).
    Residual stream: `h + c b + Q (R(c) − I) Qᵀ h` after the decoder layer, where Q holds the top `r` output directions
    of the weights that write to the stream in this layer.
    Each R(c) is the Cayley rotation of a learned skew matrix, so R(−c) = R(c)ᵀ and K(0) = 0. A plane turns by
    2 arctan(cω/2), which is less than 180° at every c; no tighter bound is claimed.

    Raises:
        ValueError: a field is out of its range, two fields contradict each other, or the file has a newer format.
    """

    r: int = field(
        default=32, metadata={"help": "Number of singular directions that rotate: 2 to the smaller side of a weight."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (suffixes) of linear modules; 'residual' (the output of the decoder layer); "
            "'residual-writers', 'residual-readers', 'kv', 'all-linear'; or one regular expression for full names."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out of target_modules, in the same forms."}
    )
    layers_to_transform: list[int] | int | str | None = field(
        default=None,
        metadata={
            "help": "Decoder layers: indices from 0, or a share of the depth such as '0.3-0.7'; None = all. "
            "Needs a list of target_modules."
        },
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of decoder layers, if it is not found automatically."}
    )
    rotate_input: bool = field(default=True, metadata={"help": "Learn R_in, which rotates the input directions V."})
    rotate_output: bool = field(
        default=False, metadata={"help": "Learn R_out, which rotates the output directions U."}
    )
    scale: bool = field(default=True, metadata={"help": "Learn λ, the log-gain of each singular value."})
    shift: bool = field(default=True, metadata={"help": "Learn b, the vector that is added to the residual stream."})
    additive_scale: bool = field(
        default=False, metadata={"help": "Singular values become S + cλ, as in AntiPaSTO, instead of S exp(cλ)."}
    )
    svd_niter: int = field(
        default=2, metadata={"help": "Power iterations of the seeded randomised SVD; 0 = exact SVD."}
    )
    svd_seed: int = field(default=0, metadata={"help": "Seed of the randomised SVD."})
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "True: a new adapter equals the base model at every c; False: it starts with small random values."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole, for example a new head."}
    )
    init_bases: bool = field(
        default=True,
        metadata={"help": "False in every saved configuration: U, S, V come from the weights file, and no SVD runs."},
    )
    resolved_modules: list[str] | None = field(
        default=None, metadata={"help": "Full names of the adapted modules; filled in when the adapter is created."}
    )
    fingerprint: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Sampled entries of the adapted weights; filled in when the adapter is created."},
    )
    calibration: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "'plus' and 'minus', the values of c = 1 and c = −1 in the adapter's own units; and their origin."
        },
    )
    allow_other_base: bool = field(
        default=False, metadata={"help": "Load onto a base model whose weights differ from the fingerprint."}
    )
    format_version: int = field(default=1, metadata={"help": "Version of the adapter's files; 2 has additive_scale."})

    def __post_init__(self) -> None:
        if isinstance(self.format_version, int) and self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this adapter has file format {self.format_version!r}, but this version of repeng reads formats up "
                f"to {FORMAT_VERSION}; install a newer repeng to load it"
            )
        self._make_plain()
        check_fields(vars(self))
        super().__post_init__()
        self.peft_type: str | PeftType | None = PEFT_TYPE
        if self.additive_scale:
            self.format_version = 2  # version 1 would read λ as a log-gain
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                check_expression(name, getattr(self, name), from_file=not self.init_bases)
        if not (self.rotate_input or self.rotate_output or self.scale or self.shift):
            raise ValueError("nothing to learn: set at least one of rotate_input, rotate_output, scale, shift")
        if self.additive_scale and not self.scale:
            raise ValueError("additive_scale=True says how to scale, but scale=False disables scaling; set only one")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform} has no effect when target_modules is a regular "
                f"expression ({self.target_modules!r}); give a list of names, or put the layers into the expression"
            )

    def _make_plain(self) -> None:
        """Convert fields to the form in which they are saved: names as a set, indices as a list of int."""
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and re.fullmatch(r"[\w-]+", value):
                value = [value]  # one name, such as "residual" or "all-linear"
            if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
                value = set(value)
            setattr(self, name, value)
        if isinstance(self.layers_to_transform, list | tuple | range | set):
            self.layers_to_transform = [
                int(one) if isinstance(one, Integral) and not isinstance(one, bool) else one
                for one in self.layers_to_transform
            ]
        for name in ("modules_to_save", "layers_pattern"):
            if isinstance(getattr(self, name), tuple | set):
                setattr(self, name, list(getattr(self, name)))

    @property
    def turns(self) -> bool:
        """Whether the adapter learns a rotation."""
        return self.rotate_input or self.rotate_output

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is saved: with `init_bases=False`, since the bases are in the weights file.

        `allow_other_base` is left out, because a saved adapter is for the base model that it names.
        """
        saved = {**super().to_dict(), "init_bases": False}
        saved.pop("allow_other_base")
        return saved
