"""Checks of steering vectors and their files, which may have an unknown author or come from an overflow."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from repeng.data.schema import checked, shown
from repeng.model.sites import Place
from repeng.model.strict_json import parse_json

# Limits of a direction's length. A shorter direction does nothing; a longer one gives infinite values.
LEAST, MOST = 1e-12, 1e12
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=4096)]
Unit = Annotated[float, Field(ge=1e-12, le=1e12)]
# Entries of the metadata that this package reads. Other entries are kept unchecked.
METADATA: dict[str, Any] = {
    "model": Text,
    "model_type": Text,
    "model_hint": Text,
    "method": Text,
    "accuracy": dict[str, Annotated[float, Field(ge=0, le=1)]],
    "read": list[dict[str, Any]],
    "calibration": dict[str, Any],
}


def check_directions(directions: Mapping[Place, Tensor], what: str, named: Mapping[Place, str] | None = None) -> None:
    """Raise ValueError, naming the place, for a direction that cannot steer any model.

    Args:
        directions: directions by place.
        what: the name of the file or vector in messages.
        named: names of the directions in the file, by place.
    """
    lengths = {}
    for place, direction in directions.items():
        name = (named or {}).get(place, f"the direction at {place[0]!r} of layer {place[1]}")
        if not direction.is_floating_point() or direction.element_size() < 2:
            raise ValueError(
                f"{what}: {name} has dtype {direction.dtype}; it must be floating-point with at least 16 bits"
            )
        if direction.ndim != 1 or direction.numel() == 0:
            raise ValueError(f"{what}: {name} has shape {tuple(direction.shape)}; a direction has shape (d,)")
        if not direction.isfinite().all():
            raise ValueError(f"{what}: {name} holds NaN or infinite values; make it again, or leave this place out")
        lengths[name] = direction.double().norm().item()
        if lengths[name] > MOST:
            raise ValueError(
                f"{what}: {name} has the length {lengths[name]:.3g}; the limit is {MOST:g}. Scale the vector down"
            )
    if lengths and max(lengths.values()) < LEAST:
        raise ValueError(f"{what}: all directions are zero, so it does nothing at any coefficient; make it again")


def idle(directions: Mapping[Place, Tensor]) -> list[Place]:
    """The places whose direction is zero, or too short to have an effect."""
    return [place for place, direction in directions.items() if direction.double().norm().item() < LEAST]


def checked_metadata(values: Any, what: str) -> dict[str, Any]:
    """The metadata of a file; raises ValueError, naming the key, if an entry that is read is invalid."""
    values = checked(dict[str, Any], values, f"{what}: the metadata")
    for key, hint in METADATA.items():
        if key in values:
            checked(hint, values[key], f"{what}: {key} of the metadata")
    if "calibration" in values:
        check_units(values["calibration"], what)
    for pair in values.get("read", ()):
        for side in ("chosen", "rejected"):
            checked(list[str] | str, pair.get(side), f"{what}: {side} in read of the metadata")
    return values


def check_units(calibration: Mapping[str, Any], what: str) -> None:
    """Raise ValueError unless a calibration has valid units `plus` and `minus`."""
    for arm in ("plus", "minus"):
        checked(Unit, calibration.get(arm), f"{what}: {arm} of the calibration")


def parse_header(text: str, newest: int, what: str) -> dict[str, Any]:
    """The metadata in the JSON text of a file's header.

    Raises:
        ValueError: the text is invalid or has a newer format.
    """
    written = parse_json(text, f"{what}: the text of its header")
    version = written.get("format_version") if isinstance(written, dict) else None
    if checked(Annotated[int, Field(ge=1)], version, f"{what}: format_version") > newest:
        raise ValueError(
            f"{what} has format {version}, but this version of repeng reads formats up to {newest}; "
            "install a newer repeng"
        )
    return checked_metadata(written.get("metadata"), what)


def place_of(key: str, what: str) -> Place:
    """The site and layer in a tensor's name LAYER.SITE; raises ValueError for any other name."""
    match = re.fullmatch(r"(0|[1-9][0-9]{0,5})\.([\w.-]+)", key, re.ASCII)
    if match is None:
        raise ValueError(f"{what} holds a tensor {shown(key)}; its name must be LAYER.SITE, such as '12.residual'")
    return match[2], int(match[1])
