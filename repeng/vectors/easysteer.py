"""Metadata that EasySteer (ZJU-REAL/EasySteer) adds to its control vectors; llama.cpp does not read it."""

from pathlib import Path
from typing import Any

from repeng.model.strict_json import parse_json


def check_place(reader: Any, path: str | Path) -> None:
    """Raise ValueError if EasySteer's metadata say that the directions are not for the residual stream.

    ZJU-REAL/EasySteer writes the layout of llama.cpp (easysteer/extraction/result.py) and counts decoder layers from
    0; `direction.N` is added to the output of layer N. Since version 1 of EasySteer's own key, its JSON names the
    component. Older files do not name it, but their method "iti" is for attention heads only.
    """
    own, method = (reader.get_field(f"controlvector.{key}") for key in ("easysteer", "method"))
    try:
        told = parse_json(own.contents(), str(path)) if own else {"version": 1}
    except (TypeError, ValueError):
        told = None
    if not isinstance(told, dict) or told.get("version") != 1:
        raise ValueError(f"{path} holds EasySteer metadata of an unknown version; export it again in version 1")
    component = told.get("component") or ("attention_heads" if method and method.contents() == "iti" else None)
    if component not in (None, "hidden_states"):
        raise ValueError(
            f"{path} is for the component {component!r} of EasySteer, but a control vector acts on the residual "
            "stream; extract a vector from 'hidden_states'"
        )
