"""What EasySteer (ZJU-REAL/EasySteer) says of its control vectors beside what llama.cpp reads."""

from pathlib import Path
from typing import Any

from repeng.model.strict_json import parse_json


def check_place(reader: Any, path: str | Path) -> None:
    """Raise ValueError if EasySteer says that its directions are for something else than the residual stream.

    ZJU-REAL/EasySteer writes the layout of llama.cpp (easysteer/extraction/result.py) and counts decoder layers from
    0; `direction.N` is added to the output of layer N. Since version 1 of its own key, JSON tells the component; its
    older files do not, but the method "iti" is for attention heads only.
    """
    own, method = (reader.get_field(f"controlvector.{key}") for key in ("easysteer", "method"))
    try:
        told = parse_json(own.contents(), str(path)) if own else {"version": 1}
    except (TypeError, ValueError):
        told = None
    if not isinstance(told, dict) or told.get("version") != 1:
        raise ValueError(f"{path} holds metadata of EasySteer in an unknown version; 1 is read: export it with that")
    component = told.get("component") or ("attention_heads" if method and method.contents() == "iti" else None)
    if component not in (None, "hidden_states"):
        raise ValueError(
            f"{path} is for the component {component!r} of EasySteer, and a control vector acts on the residual "
            "stream; extract one from 'hidden_states'"
        )
