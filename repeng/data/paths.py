"""Quick check that the PATH of a command is the folder of an adapter or the file of a vector."""

from pathlib import Path

from repeng._file_names import CONFIG, VECTOR
from repeng.data.schema import shown
from repeng.model.hub import Repository, download, repository

WANTED = (
    "give the folder of an adapter that training wrote, the file of a vector (.safetensors, .gguf), or a repository "
    "on the hub, owner/name"
)
# What is read of a repository. Other files are not downloaded.
READ = ("adapter_model.safetensors", "adapter_config.json", CONFIG, VECTOR)


def steerable(word: str) -> Path:
    """Return `word` as a path if it looks like an adapter or a vector. The contents are checked when they are read.

    A repository on the hub, `owner/name` or `owner/name@revision`, is downloaded into the hub's cache.

    Raises:
        ValueError: the path does not exist, it is neither an adapter nor a vector, or the repository cannot be read.
    """
    remote = repository(word)
    if remote is not None:
        return _downloaded(remote)
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


def _downloaded(remote: Repository) -> Path:
    """The folder of an adapter, or the file of a vector, of a repository."""
    try:
        folder = download(remote, READ)
    except ValueError as error:
        raise ValueError(f"PATH: there is no adapter or vector at {remote.id!r} on this machine; {error}") from None
    for place in (folder, folder / VECTOR):
        if (place / "adapter_config.json").is_file() or place.is_file():
            return place
    raise ValueError(f"PATH: {remote.id} on the hub holds neither adapter_config.json nor {VECTOR}; {WANTED}")


def named_after(word: str) -> Path:
    """The path after which the results of a command are named: `word`; for a repository its name, in this folder."""
    remote = repository(word)
    return Path(word) if remote is None else Path(remote.name)
