"""Names of adapters and vectors on the command line. This module has no slow imports."""

import re
from collections.abc import Iterable
from pathlib import Path

from repeng.data.paths import steerable
from repeng.model.hub import repository

NAME = re.compile(r"[A-Za-z0-9_-]+")


def named_paths(words: Iterable[str]) -> dict[str, Path]:
    """Paths by name, from words of the form `NAME=PATH` or `PATH`. For `PATH`, the file or folder gives the name.

    A repository on the hub, `owner/name`, is downloaded. Its name gives the name, with - instead of dots.

    Raises:
        ValueError: a name is not allowed, or two names are the same.
        FileNotFoundError: there is no file or folder at a path, and it cannot be a repository.
    """
    paths: dict[str, Path] = {}
    for word in words:
        path, name = Path(word), None
        if not path.exists() and "=" in word:
            name, _, text = word.partition("=")
            path = Path(text)
        remote = repository(str(path))
        if remote is not None:
            path, name = steerable(str(path)), name or remote.name.replace(".", "-")
        if not path.exists():
            raise FileNotFoundError(f"there is no adapter and no vector at {str(path)!r}")
        if name is None:
            name = path.resolve().name if path.is_dir() else path.stem
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name an adapter or vector: use letters, digits, - and _, as in NAME=PATH"
            )
        if name in paths:
            raise ValueError(f"two paths have the name {name!r}; give different names, as in NAME=PATH")
        paths[name] = path
    return paths
