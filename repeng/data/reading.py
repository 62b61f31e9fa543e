"""Reading files of rows: JSON Lines, a JSON list, or lines of text. Errors name the kind of any other file."""

import json
import math
import re
from collections.abc import Callable
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NoReturn

SHOWN = 60  # characters of a line in a message
LONGEST = 1 << 20  # characters of one line
DEEPEST = 100  # levels of nesting in one value; an object counts as two
Row = tuple[str, Any]  # a value and, before it, its place in the file for messages
# The first bytes of files of other kinds, the name of the kind, and the advice to the user.
UNPACK, CONVERT = "unpack it first", "convert it to JSON Lines in UTF-8"
MAGIC = (
    (b"\x1f\x8b", "gzip-compressed", UNPACK),
    (b"BZh91AY&SY", "bzip2-compressed", UNPACK),
    (b"\xfd7zXZ", "xz-compressed", UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", UNPACK),
    (b"PK\x03\x04", "a zip archive (or a spreadsheet)", UNPACK),
    (b"PAR1", "a Parquet file", CONVERT),
    (b"ARROW1", "an Arrow file", CONVERT),
    (b"SQLite format 3", "an SQLite database", CONVERT),
    (b"%PDF", "a PDF file", CONVERT),
    (b"GGUF", "a GGUF model", "give a file of texts"),
    (b"\x89PNG", "an image", "give a file of texts"),
    (b"\xff\xd8\xff", "an image", "give a file of texts"),
)
WIDE = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
TABLES = (".csv", ".tsv")
MARKUP = (".yaml", ".yml", ".toml", ".xml", ".html")
JSON_NAMES = (".json", ".jsonl", ".ndjson")
# The beginning of a text that is treated as JSON, whatever the name of the file.
LIST = re.compile(r'\s*\[\s*($|["{\[\]])')
OBJECT = re.compile(r'\s*\{\s*($|["}])')


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, without a byte-order mark.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the path is a folder, or the file is empty, of another kind or encoding, or not text.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; give a file")
    data = Path(path).read_bytes()
    for start, kind, mend in MAGIC:
        if data.startswith(start):
            raise ValueError(f"{path} is {kind}, not text; {mend}")
    for start, name in WIDE:
        if data.startswith(start):
            raise ValueError(f"{path} is in {name}; save it in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        kind = (
            "binary, not text; give a file of texts" if b"\0" in data else "not in UTF-8 (latin-1?); save it in UTF-8"
        )
        raise ValueError(f"{path}, line {line}: byte 0x{byte:02x}: the file is {kind}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}, line {line} holds NUL: the file is binary or in UTF-16; save it as text in UTF-8")
    if not text.strip():
        raise ValueError(f"{path} is empty; write one value per line")
    return text


def lines_of(path: str | Path, text: str) -> list[tuple[int, str]]:
    """The non-empty lines of a text with their numbers. Only a line feed ends a line.

    Raises:
        ValueError: a line is longer than any text that a model can read.
    """
    found = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1)]
    for number, line in found:
        if len(line) > LONGEST:
            raise ValueError(
                f"{path}, line {number} has {len(line)} characters; at most {LONGEST} per line are allowed: split it"
            )
    return [(number, line) for number, line in found if line.strip()]


def is_json(path: str | Path, text: str) -> bool:
    """Whether to read a file of texts as JSON: by its name, by its beginning, or if each line is a JSON string."""
    if Path(path).suffix.lower() in JSON_NAMES or LIST.match(text.split("\n", 1)[0]) or OBJECT.match(text):
        return True
    return all(map(_is_json_string, filter(str.strip, text.split("\n"))))


def _is_json_string(line: str) -> bool:
    try:
        return isinstance(json.loads(line), str)
    except (ValueError, RecursionError):
        return False


def read_json_rows(path: str | Path, text: str, example: str, name: str | None = None) -> list[Row]:
    """The values of JSON Lines or of one JSON list, each with its place in the file.

    Args:
        path: path of the file.
        text: contents of the file.
        example: a correct value, for messages.
        name: name of the file in messages; None for its path.

    Raises:
        ValueError: the file is not JSON, or it has a repeated key, a number that is not finite or too long, a lone
            surrogate, or values that are nested too deeply.
    """
    name = name or str(path)
    if text.lstrip()[0] == "[":
        rows = parse(text, name, example)
        return [(f"{name}, row {number}", value) for number, value in enumerate(rows, start=1)]
    numbered = lines_of(name, text)
    first = numbered[0][1].strip()
    if first in ("{", "[") or (first[0] == "{" and first[-1] in "{,[" and len(numbered) > 1):
        raise ValueError(
            f"{name}, line {numbered[0][0]}: an object spans several lines; write each object on one line, such as "
            f"{example}, or write all objects as one list in [ ]"
        )
    return [(f"{name}, line {number}", parse(line, f"{name}, line {number}", example)) for number, line in numbered]


def parse(text: str, where: str, example: str) -> Any:
    """The value of a JSON text, read strictly as in the JSON standard.

    Raises:
        ValueError: see `read_json_rows`.
    """

    def refuse(problem: str) -> NoReturn:
        raise ValueError(f"{where}: {problem}")

    try:
        value = json.loads(
            text,
            object_pairs_hook=lambda pairs: _object(pairs, refuse),
            parse_constant=lambda name: refuse(f"{name} is not a JSON value; write a finite number or a text"),
            parse_int=lambda digits: _number(digits, int, refuse),
            parse_float=lambda digits: _number(digits, float, refuse),
        )
    except JSONDecodeError as error:
        at = f", line {error.lineno}" if "\n" in text else ""
        line = text.split("\n")[error.lineno - 1].strip()
        raise ValueError(
            f"{where}{at} is not JSON ({error.msg}): {line[:SHOWN]!r}; a row looks like {example}"
        ) from None
    except RecursionError:
        value = DEEPEST
        refuse(f"the value is nested too deeply; a row looks like {example}")
    _check_values(value, refuse)
    return value


def _object(pairs: list[tuple[str, Any]], refuse: Callable[[str], NoReturn]) -> dict[str, Any]:
    """The object with these keys and values; a repeated key is refused."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            refuse(f"the key {key!r} is given twice; leave one out")
        found[key] = value
    return found


def _number(digits: str, kind: type[int] | type[float], refuse: Callable[[str], NoReturn]) -> int | float:
    """The number with these digits; a long or infinite number is refused."""
    if len(digits) > SHOWN:
        refuse(f"a number of {len(digits)} digits is too long: {digits[:SHOWN]}…")
    value = kind(digits)
    if not math.isfinite(value):
        refuse(f"{digits} is too large a number")
    return value


def _check_values(value: Any, refuse: Callable[[str], NoReturn]) -> None:
    """Refuse lone surrogates, which no tokenizer can read, and values that are nested too deeply."""
    level = [value]
    for _ in range(DEEPEST):
        for text in level:
            if isinstance(text, str) and (half := re.search("[\ud800-\udfff]", text)):
                refuse(
                    f"{text[:SHOWN]!r} holds half a character (\\u{ord(half[0]):04x}, a lone surrogate); write the "
                    "whole character, or leave it out"
                )
        inner = [list(v.items()) if isinstance(v, dict) else v for v in level if isinstance(v, list | dict | tuple)]
        level = [part for values in inner for part in values]
        if not level:
            return
    refuse(f"the value is nested more than {DEEPEST // 2} levels deep")
