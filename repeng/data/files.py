"""Reading files of texts, and writing files whole or not at all."""

import difflib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from repeng.data.reading import MARKUP, TABLES, is_json, lines_of, read_json_rows, read_text
from repeng.model.script import visible


def load_texts(path: str | Path) -> list[str]:
    """Texts from JSON Lines or a JSON list (strings, or objects with `text`), or one text a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, no text, or of another form, or a value (numbered from 1) is no text that can be
            seen.
    """
    from repeng.data.schema import checked, checked_keys  # it imports this module

    text, example = read_text(path), '"a text" or {"text": "a text"}'
    if is_json(path, text):
        rows = read_json_rows(path, text, example)
    elif Path(path).suffix.lower() in (*TABLES, *MARKUP):
        raise ValueError(f"{path} is {Path(path).suffix[1:].upper()} by its name; write a text a line, or JSON Lines")
    else:
        rows = [(f"{path}, line {number}", line) for number, line in lines_of(path, text)]
    texts = []
    for where, row in rows:
        given = checked_keys({"text": str}, row, where, needed=("text",))["text"] if isinstance(row, dict) else row
        if not isinstance(given, str):
            raise ValueError(f"{where}: should be {example}; got {given!r:.60}")
        if not visible(checked(str, given, where)):
            raise ValueError(f"{where}: the text {given[:60]!r} holds nothing that can be seen; leave it out")
        texts.append(given.strip())
    if not texts:
        raise ValueError(f"{path} has no rows; write one text a line")
    return texts


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A hint at the nearest allowed name, or nothing."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def give_usual_mode(files: Iterable[Path], beside: Path) -> None:
    """Let files be read by whoever reads a new file in the folder `beside`.

    Some libraries write files that nobody else may read, whatever the user's umask.
    """
    probe = beside / ".mode"
    probe.touch()
    for file in files:
        os.chmod(file, probe.stat().st_mode)


@contextmanager
def staged(folder: str | Path, names: Iterable[str]) -> Iterator[Path]:
    """A temporary folder inside `folder`; files of these names move from it to their places if the block ends well.

    Otherwise nothing changes. Each file takes the place of an older one in one step, so that no reader finds half of
    it, even after a kill.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder, names = Path(folder), list(names)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        yield Path(temporary)
        give_usual_mode((Path(temporary) / name for name in names), Path(temporary))
        for name in names:
            os.replace(Path(temporary) / name, folder / name)


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Where to write what shall lie at `path`: it moves there if the block ends well; see `staged`."""
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


def cache_folder() -> Path:
    """Where what can be measured again is kept: `$REPENG_CACHE`, or `repeng` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("REPENG_CACHE") or Path(home) / "repeng")


def check_writable(folder: str | Path) -> None:
    """Raise OSError, before any work, if `folder` cannot be made or written."""
    with staged(folder, ()):
        pass
