"""Reading files of texts, and writing files atomically: whole or not at all."""

import difflib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from repeng._command import undisturbed
from repeng.data.reading import MARKUP, TABLES, is_json, lines_of, read_json_rows, read_text
from repeng.model.script import visible

STAGING = ".saving-"  # name prefix of the temporary folders in which files are written before they are moved


def load_texts(path: str | Path) -> list[str]:
    """Texts from JSON Lines or a JSON list (strings, or objects with `text`), or from a file with one text per line.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, is not text or has another form, or a value (numbered from 1) is not a visible
            text.
    """
    from repeng.data.schema import checked, checked_keys  # it imports this module

    text, example = read_text(path), '"a text" or {"text": "a text"}'
    if is_json(path, text):
        rows = read_json_rows(path, text, example)
    elif Path(path).suffix.lower() in (*TABLES, *MARKUP):
        kind = Path(path).suffix[1:].upper()
        raise ValueError(f"{path} is a {kind} file by its name; give one text per line, or JSON Lines")
    else:
        rows = [(f"{path}, line {number}", line) for number, line in lines_of(path, text)]
    texts = []
    for where, row in rows:
        given = checked_keys({"text": str}, row, where, needed=("text",))["text"] if isinstance(row, dict) else row
        if not isinstance(given, str):
            raise ValueError(f"{where}: should be {example}; got {given!r:.60}")
        if not visible(checked(str, given, where)):
            raise ValueError(f"{where}: the text {given[:60]!r} has no visible characters; leave it out")
        texts.append(given.strip())
    if not texts:
        raise ValueError(f"{path} has no rows; write one text a line")
    return texts


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A hint that names the nearest allowed name; an empty text if none is near."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def give_usual_mode(files: Iterable[Path], beside: Path) -> None:
    """Give files the permissions that a new file in the folder `beside` gets.

    Some libraries write files that only their owner may read, whatever the user's umask.
    """
    probe = beside / ".mode"
    probe.touch()
    for file in files:
        os.chmod(file, probe.stat().st_mode)


class WriteError(OSError):
    """Files could not be written. The older files of these names are unchanged."""


@contextmanager
def staged(folder: str | Path, names: Iterable[str], stale: Iterable[Path] = ()) -> Iterator[Path]:
    """A temporary folder inside `folder`. If the block succeeds, its files of these names are moved into `folder`.

    If the block fails, nothing changes. Each file replaces an older one atomically, so a reader never sees half a
    file, even after a kill.

    Args:
        folder: destination of the files.
        names: names of the files, in the order in which they are moved.
        stale: files that describe the replaced files. They are deleted before the first new file is moved.

    Raises:
        WriteError: the folder cannot be made, or a file cannot be written.
    """
    folder, names, temporary = Path(folder), list(names), ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=STAGING) as temporary:
            yield Path(temporary)
            give_usual_mode((Path(temporary) / name for name in names), Path(temporary))
            with undisturbed():
                for path in stale:
                    path.unlink(missing_ok=True)
                for name in names:
                    os.replace(Path(temporary) / name, folder / name)
    except (OSError, SafetensorError) as error:
        told = str(error)
        if not isinstance(error, WriteError):  # a WriteError already names the file
            told = f"{folder}: {' and '.join(names)} could not be written: {getattr(error, 'strerror', None) or error}"
        raise WriteError(told.replace(temporary or str(folder), str(folder))) from error


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to. If the block succeeds, the file is moved to `path`; see `staged`."""
    path = Path(path)
    with staged(path.parent, [path.name]) as folder:
        yield folder / path.name


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with written_whole(path) as place:
        place.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")
