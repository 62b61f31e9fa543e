"""Output folders of commands: they are checked before any work and locked by one command at a time."""

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repeng.data.files import STAGING

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None

LOCK = ".lock"


@contextmanager
def claimed(folder: str | Path, key: str) -> Iterator[Path]:
    """Lock `folder` for one command. Half-written files of killed commands are removed from it first.

    The lock of a dead process does not block. The context makes the folder if needed, and removes it again if it stays
    empty.

    Args:
        folder: output folder of the command.
        key: the user's name for the folder, for messages.

    Raises:
        OSError: the folder cannot be made or written, or another command has locked it.
    """
    with _made(folder, key) as place:
        lock = _lock(place / LOCK, key)
        try:
            for half in place.glob(f"{STAGING}*"):
                shutil.rmtree(half, ignore_errors=True)
            yield place
        finally:
            (place / LOCK).unlink(missing_ok=True)
            if lock is not None:
                os.close(lock)


def check_writable(folder: str | Path, key: str) -> None:
    """Raise OSError if `folder` cannot be made or written. `key` is the user's name for it, for the message."""
    with _made(folder, key):
        pass


def check_new(path: str | Path) -> None:
    """Raise FileExistsError if the file exists or the folder is not empty."""
    path = Path(path)
    if path.is_file():
        raise FileExistsError(f"{path} exists, and no command overwrites it; choose another path")
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty; choose a new or an empty folder")


@contextmanager
def _made(folder: str | Path, key: str) -> Iterator[Path]:
    """Make the folder and test that it can be written. At the end, new folders that are still empty are removed."""
    place, new = Path(folder), []
    try:
        try:
            if not str(folder).strip():
                raise ValueError("it has no name")
            str(folder).encode()  # raises for surrogates: a report could not print such a name
            new = [path for path in (place, *place.parents) if not path.exists()]
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place, prefix=STAGING):
                pass
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(
                f"{key} {os.fspath(folder)!r} cannot be written ({reason}); give a folder that you may write"
            ) from error
        yield place
    finally:
        for path in new:
            try:
                path.rmdir()
            except (OSError, ValueError):  # it is not empty, or was never made
                continue


def _lock(path: Path, key: str) -> int | None:
    """Lock the file and return its descriptor; None if the system or the file system has no locks."""
    if fcntl is None:
        return None
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(lock, 1000).decode(errors="replace") or "another process"
            os.close(lock)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return None  # some network file systems have no locks
            raise OSError(
                f"{key} {str(path.parent)!r} is in use by {holder}; wait until it ends, or give another {key}"
            ) from error
        try:
            same = os.path.samestat(os.fstat(lock), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:  # otherwise the previous holder has just removed the file
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return lock
        os.close(lock)
