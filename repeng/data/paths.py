"""Quick check that the PATH of a command is the folder of an adapter or the file of a vector."""

from pathlib import Path

from repeng.data.schema import shown

WANTED = "give the folder of an adapter that training wrote, or the file of a vector (.safetensors, .gguf)"


def steerable(word: str) -> Path:
    """Return `word` as a path if it looks like an adapter or a vector. The contents are checked when they are read.

    Raises:
        ValueError: the path does not exist, or it is neither an adapter nor a vector.
    """
    path = Path(word)
    try:
        there = bool(word.strip()) and path.exists()
    except (OSError, ValueError):  # too long, or not a valid path
        there = False
    if not there:
        raise ValueError(f"PATH: there is no adapter or vector at {shown(word)}; {WANTED}")
    if path.is_dir():
        if not (path / "adapter_config.json").is_file():
            what = "the folder of a model" if (path / "config.json").is_file() else "a folder without an adapter"
            raise ValueError(f"PATH: {word!r} is {what}: it has no adapter_config.json; {WANTED}")
    elif path.suffix not in (".safetensors", ".gguf") or not path.is_file():
        raise ValueError(f"PATH: {word!r} is not the file of a vector; {WANTED}")
    return path
