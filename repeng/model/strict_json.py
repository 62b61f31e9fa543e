"""JSON from files of others: read whole, once, and as it was meant."""

import json
from pathlib import Path
from typing import Any

LARGEST = 1 << 26  # bytes


def read_json(path: str | Path, *, constants: bool = False) -> Any:
    """What a JSON file holds; see `parse_json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no file of this kind, or too large.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; up to {LARGEST} are read")
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"), str(path), constants=constants)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}); write JSON") from None


def parse_json(text: str, where: str, *, constants: bool = False) -> Any:
    """The value of a JSON text, without a key that stands twice, and without NaN and infinity unless `constants`.

    Raises:
        ValueError: naming `where`.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=None if constants else _refuse)
    except RecursionError:
        raise ValueError(f"{where} nests too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{where} is no JSON that can be meant ({error})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:60]!r} stands twice")
        found[key] = value
    return found


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")
