"""Configuration of the PEFT method."""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

PEFT_TYPE = "SVD_STEERING"
PREFIX = "svd_steering_"


@dataclass
class SvdSteeringConfig(PeftConfig):
    """Rotate and scale the top singular directions of linear layers by one coefficient c.

    `y = base(x) + [(x V) K(c)ᵀ] Uᵀ` with `K(c) = R_out(c) diag(S exp(c λ)) R_in(c)ᵀ − diag(S)`, where `U, S, V` are
    the top `r` singular triples of the frozen weight, λ is learned and each R(c) is the Cayley rotation of a learned
    skew matrix, so that R(−c) = R(c)ᵀ and K(0) = 0.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
    """

    r: int = field(
        default=32, metadata={"help": "Singular directions that turn, 2 up to the smaller side of a weight."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (suffixes) of linear layers, or one regular expression of full names."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names to leave out, like target_modules."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of decoder layers, from 0; None = all. Needs a list of target_modules."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list of layers, if it is not found by itself."}
    )
    rotate_input: bool = field(default=True, metadata={"help": "Learn R_in, which turns the input directions V."})
    rotate_output: bool = field(default=False, metadata={"help": "Learn R_out, which turns the output directions U."})
    scale: bool = field(default=True, metadata={"help": "Learn λ, the log-gain of each singular value."})
    svd_niter: int = field(
        default=4, metadata={"help": "Power iterations of the seeded randomised SVD; 0 = exact SVD."}
    )
    svd_seed: int = field(default=0, metadata={"help": "Seed of the randomised SVD."})
    init_weights: bool = field(
        default=True, metadata={"help": "True: start as the base model at every c; False: small random rotations."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole, for example a new head."}
    )
    init_bases: bool = field(
        default=True,
        metadata={"help": "False in every saved configuration: take U, S, V from the weights file and run no SVD."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)
        if not isinstance(self.r, int) or self.r < 2:
            raise ValueError(f"r must be an integer of at least 2 (one direction cannot turn); got {self.r!r}")
        if self.svd_niter < 0:
            raise ValueError(f"svd_niter must be 0 (exact) or positive; got {self.svd_niter}")
        if not (self.rotate_input or self.rotate_output or self.scale):
            raise ValueError("nothing to learn: set at least one of rotate_input, rotate_output, scale")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform} has no effect when target_modules is a regular "
                f"expression ({self.target_modules!r}); give a list of names, or put the layers into the expression"
            )

    def to_dict(self) -> dict[str, Any]:
        """As saved: a configuration on disk belongs to a file that holds the bases."""
        return {**super().to_dict(), "init_bases": False}
