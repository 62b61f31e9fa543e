"""What the command line calls adapters and vectors; without an import that takes long."""

import re
from collections.abc import Iterable
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9_-]+")


def named_paths(words: Iterable[str]) -> dict[str, Path]:
    """Paths by name, of words `NAME=PATH` or `PATH`, whose name is that of the folder or file.

    Raises:
        ValueError: a name cannot be used, or two are the same.
        FileNotFoundError: nothing lies at a path.
    """
    paths: dict[str, Path] = {}
    for word in words:
        path, name = Path(word), None
        if not path.exists() and "=" in word:
            name, _, text = word.partition("=")
            path = Path(text)
        if not path.exists():
            raise FileNotFoundError(f"there is no adapter and no vector at {str(path)!r}")
        if name is None:
            name = path.resolve().name if path.is_dir() else path.stem
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a dial: use letters, digits, - and _, as in NAME=PATH")
        if name in paths:
            raise ValueError(f"two paths have the name {name!r}; give names, as in NAME=PATH")
        paths[name] = path
    return paths
