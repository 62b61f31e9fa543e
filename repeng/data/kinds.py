"""Argument types that several keys share, with their checks."""

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

PLACEHOLDER = "{persona}"
LONGEST_NAME = 255  # bytes, of a file or folder
SHARE = re.compile(r"\s*(\d+|\d*\.\d+)\s*-\s*(\d+|\d*\.\d+)\s*", re.ASCII)


def listed(value: Any) -> Any:
    """Turn a single text, a tuple or a range into a list; return anything else unchanged."""
    if isinstance(value, tuple | range):
        return list(value)
    return [value] if isinstance(value, str) else value


def reports(value: Any) -> Any:
    """The value of `report_to` of transformers as a list of names; an empty value becomes ["none"]."""
    return listed(value) if value else ["none"]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("should be a text that is not empty")
    return text


def _template(text: str) -> str:
    others = [word for word in re.findall(r"\{[^{}]*\}", text) if word != PLACEHOLDER]
    if PLACEHOLDER not in text or others:
        what = f"has the unknown placeholder {others[0]}" if others else f"lacks {PLACEHOLDER}"
        raise ValueError(f"should be texts with the placeholder {PLACEHOLDER}: {text!r} {what}")
    return text


def _folder(text: str) -> str:
    """The path of the folder with `~` expanded; raises ValueError if the folder cannot be made."""
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise ValueError("should be the name of a folder, without line breaks and other control characters")
    place = Path(text).expanduser()
    try:
        parent = next(path for path in (place, *place.absolute().parents) if os.path.lexists(path))
        os.lstat(place) if os.path.lexists(place) else os.stat(parent)
        longest = max(len(os.fsencode(part)) for part in place.absolute().parts)
    except OSError as error:
        raise ValueError(f"should be a folder: {error.strerror}") from None
    if longest > LONGEST_NAME:
        raise ValueError(f"should be a folder, with names of at most {LONGEST_NAME} bytes")
    if not parent.is_dir():
        raise ValueError(f"should be a folder: {parent} is not a folder; name a new or an existing folder")
    return str(place)


def layer_request(words: Sequence[str]) -> list[int] | str:
    """Read layers from words: indices, or one share of the depth, which stays text.

    Raises:
        ValueError: the words are neither.
    """
    share = SHARE.fullmatch(words[0]) if len(words) == 1 else None
    if share and 0 <= float(share[1]) < float(share[2]) <= 1:
        return words[0]
    if share or not words or not all(re.fullmatch(r"\d{1,6}", word, re.ASCII) for word in words):
        raise ValueError(
            f"layers should be indices from 0, or one share of the depth within 0-1 such as 0.3-0.7; got {words!r}"
        )
    return [int(word) for word in words]


def _layers(words: list[str]) -> list[str]:
    layer_request(words)
    return words


def _as_words(value: Any) -> Any:
    """Turn indices into the words of a command line; return any other value unchanged."""
    if isinstance(value, list):
        return [str(part) if type(part) is int else part for part in value]
    return _as_words([value]) if type(value) in (int, str) else value


Word = Annotated[str, AfterValidator(_not_blank)]
Template = Annotated[str, AfterValidator(_template)]
Folder = Annotated[
    str,
    BeforeValidator(lambda value: os.fspath(value) if isinstance(value, Path) else value),
    AfterValidator(_not_blank),
    AfterValidator(_folder),
]
Layers = Annotated[list[str], AfterValidator(_layers), BeforeValidator(_as_words)]
