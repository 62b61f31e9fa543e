"""The folder in which this package keeps what it has computed or downloaded."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$REPENG_CACHE`, or `repeng` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("REPENG_CACHE") or Path(home) / "repeng")
