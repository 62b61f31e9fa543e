"""Folders that a command writes into: checked before any work, and held by one command at a time."""

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
except ImportError:  # on Windows: nothing is locked there
    fcntl = None

LOCK = ".lock"


@contextmanager
def claimed(folder: str | Path, key: str) -> Iterator[Path]:
    """Hold `folder` for one command; what killed ones left half-written in it is removed first.

    The lock of a process that is gone holds nobody up. A folder that was made for it and stays empty is removed.

    Args:
        folder: where the command writes.
        key: what the user calls the folder.

    Raises:
        OSError: the folder cannot be made or written, or another command holds it.
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
    """Raise OSError, before any work, if `folder`, which the user calls `key`, cannot be made or written."""
    with _made(folder, key):
        pass


@contextmanager
def _made(folder: str | Path, key: str) -> Iterator[Path]:
    """The folder, made and written to; folders that were made for it and stay empty are removed at the end."""
    place, new = Path(folder), []
    try:
        try:
            if not str(folder).strip():
                raise ValueError("it has no name")
            str(folder).encode()  # what is no text cannot be named in a report
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
            except (OSError, ValueError):  # it is in use, or was never made
                continue


def _lock(path: Path, key: str) -> int | None:
    """Lock the file; its descriptor, or None where files cannot be locked."""
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
                return None  # some network file systems know no locks
            raise OSError(
                f"{key} {str(path.parent)!r} is in use by {holder}; wait until it ends, or give another {key}"
            ) from error
        try:
            same = os.path.samestat(os.fstat(lock), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:  # else the one who held it has just removed it
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return lock
        os.close(lock)
