"""What a steering vector and its file may hold: it may come from somebody else, or from arithmetic that overflowed."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from repeng.data.schema import checked, shown
from repeng.model.sites import Place
from repeng.model.strict_json import parse_json

LEAST, MOST = 1e-12, 1e12  # lengths of a direction that steers: below it does nothing, above all becomes infinite
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=4096)]
Unit = Annotated[float, Field(ge=1e-12, le=1e12)]
# Entries of the metadata that this package reads; others are carried along.
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
    """Raise ValueError, naming the place, for a direction that no model can be steered by.

    Args:
        directions: by place.
        what: the file or vector, as a message names it.
        named: what the directions are called in the file.
    """
    lengths = {}
    for place, direction in directions.items():
        name = (named or {}).get(place, f"the direction at {place[0]!r} of layer {place[1]}")
        if not direction.is_floating_point() or direction.element_size() < 2:
            raise ValueError(
                f"{what}: {name} has dtype {direction.dtype}; floating-point numbers of 16 bits or more do"
            )
        if direction.ndim != 1 or direction.numel() == 0:
            raise ValueError(f"{what}: {name} has shape {tuple(direction.shape)}; a direction has shape (d,)")
        if not direction.isfinite().all():
            raise ValueError(f"{what}: {name} holds NaN or infinite values; make it again, or leave the place out")
        lengths[name] = direction.double().norm().item()
        if lengths[name] > MOST:
            raise ValueError(
                f"{what}: {name} has the length {lengths[name]:.3g}; up to {MOST:g} steers a model. Scale it down"
            )
    if lengths and max(lengths.values()) < LEAST:
        raise ValueError(f"{what}: all directions are zero, so that it does nothing at any coefficient; make it again")


def idle(directions: Mapping[Place, Tensor]) -> list[Place]:
    """The places whose direction is zero, or too short to do anything."""
    return [place for place, direction in directions.items() if direction.double().norm().item() < LEAST]


def checked_metadata(values: Any, what: str) -> dict[str, Any]:
    """The metadata of a file; raises ValueError, naming the key, where an entry that is read cannot be meant."""
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
    """Raise ValueError unless a calibration has units for both arms that a coefficient can stand for."""
    for arm in ("plus", "minus"):
        checked(Unit, calibration.get(arm), f"{what}: {arm} of the calibration")


def parse_header(text: str, newest: int, what: str) -> dict[str, Any]:
    """The metadata in the JSON text of a file's header.

    Raises:
        ValueError: it is no such text, or of a newer format.
    """
    written = parse_json(text, f"{what}: the text of its header")
    version = written.get("format_version") if isinstance(written, dict) else None
    if checked(Annotated[int, Field(ge=1)], version, f"{what}: format_version") > newest:
        raise ValueError(
            f"{what} has format {version} and this version of repeng reads formats up to {newest}: "
            "install a newer repeng"
        )
    return checked_metadata(written.get("metadata"), what)


def place_of(key: str, what: str) -> Place:
    """The site and layer that a tensor's name, LAYER.SITE, stands for; raises ValueError for any other name."""
    match = re.fullmatch(r"(0|[1-9][0-9]{0,5})\.([\w.-]+)", key, re.ASCII)
    if match is None:
        raise ValueError(f"{what} holds a tensor {shown(key)}; it holds LAYER.SITE only, such as '12.residual'")
    return match[2], int(match[1])
