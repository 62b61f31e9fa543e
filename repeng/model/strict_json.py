"""Strict reading of JSON from untrusted files: limited in size, without repeated keys, and standard JSON only."""

import json
from pathlib import Path
from typing import Any

LARGEST = 1 << 26  # bytes


def read_json(path: str | Path, *, constants: bool = False) -> Any:
    """The value in a JSON file; see `parse_json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is too large, or is not valid JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {LARGEST} are allowed")
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"), str(path), constants=constants)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); write JSON") from None


def parse_json(text: str, where: str, *, constants: bool = False) -> Any:
    """The value of a JSON text. Repeated keys are refused, and so are NaN and infinity unless `constants` is set.

    Raises:
        ValueError: the text is not valid; the message begins with `where`.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=None if constants else _refuse)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:60]!r} is given twice")
        found[key] = value
    return found


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")
