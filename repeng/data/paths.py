"""What a command is pointed at: the folder of an adapter or the file of a vector, told by a glance."""

from pathlib import Path

from repeng.data.schema import shown

WANTED = "give the folder of an adapter, which training writes, or the file of a vector (.safetensors, .gguf)"


def steerable(word: str) -> Path:
    """The path, if an adapter or a vector seems to lie there; its contents are checked where they are read.

    Raises:
        ValueError: something else lies there, or nothing.
    """
    path = Path(word)
    try:
        there = bool(word.strip()) and path.exists()
    except (OSError, ValueError):  # too long, or no path at all
        there = False
    if not there:
        raise ValueError(f"PATH: there is no adapter and no vector at {shown(word)}; {WANTED}")
    if path.is_dir():
        if not (path / "adapter_config.json").is_file():
            what = "the folder of a model" if (path / "config.json").is_file() else "a folder without an adapter"
            raise ValueError(f"PATH: {word!r} is {what}: it has no adapter_config.json; {WANTED}")
    elif path.suffix not in (".safetensors", ".gguf") or not path.is_file():
        raise ValueError(f"PATH: {word!r} is no file of a vector; {WANTED}")
    return path
