"""How the commands of this package end on a signal, and how they print to streams that can only show ASCII.

This module imports nothing slow, so a signal that arrives during slow imports also ends the command with a sentence.
"""

import codecs
import ctypes
import os
import signal
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

SPELT = {"−": "-", "–": "-", "—": "-", "→": "->", "×": "x", "≤": "<=", "≥": ">=", "±": "+-", "‖": "||", "·": "."}
SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, Any], Any]
NOT_READ = 128 + 13  # exit status of a process that SIGPIPE ends
FAILED, REFUSED = 1, 2  # exit statuses: a check has failed, bad input; 128 + N follows from signal N
# Warnings of the libraries about what only their callers can change, which are the libraries themselves.
NOISE: tuple[tuple[str, type[Warning]], ...] = (
    ("`(is_)?gradient_checkpointing", FutureWarning),  # transformers 5.24 renames it, and uses the old name itself
    ("'pin_memory' argument is set as true but no accelerator is found", UserWarning),  # on any machine without one
    ("Could not find a config file in ", UserWarning),  # PEFT, for a base model that is not on the hub
)
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


class Stopped(KeyboardInterrupt):
    """A signal ends the command.

    Args:
        number: number of the signal.
        when: words appended to the sentence "stopped by SIGTERM", such as " after step 3".
    """

    def __init__(self, number: int, when: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{when}")
        self.number: int = number


class Ended(SystemExit):
    """The end of a command with a message on the standard error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.code = status


def end(message: str, status: int = REFUSED) -> NoReturn:
    """End the command with an error message and an exit status."""
    print(f"error: {message}", file=sys.stderr)
    raise Ended(f"error: {message}", status)


@contextmanager
def command(advice: str = "") -> Iterator[None]:
    """Run the block as a command: SIGINT and SIGTERM end it with a sentence and the usual exit status, 128 + N.

    Only the first SIGTERM raises, so a second one does not interrupt the cleanup. Every further Ctrl-C raises again.

    Args:
        advice: how the user can continue; it is appended to the sentence.

    Raises:
        SystemExit: a signal arrived, or the reader of the output has closed the pipe.
    """
    came: list[KeyboardInterrupt] = []

    def stop(number: int, _: Any) -> None:
        came.append(Stopped(number))
        if len(came) == 1 or number == signal.SIGINT:
            raise came[-1]

    before, out, strict = handle(stop), sys.stdout, getattr(sys.stdout, "errors", None)
    for stream in (out, sys.stderr):
        _show_anything(stream)
    for message, kind in NOISE:
        warnings.filterwarnings("ignore", message, kind, append=True)  # after the filters of `python -W`
    try:
        yield
    except BrokenPipeError:  # such as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit would raise
        sys.exit(NOT_READ)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            came.insert(0, error)
        if not came:  # otherwise a library has turned the signal into another exception
            raise
    finally:
        restore(before)
        _show_anything(out, strict)
    if came:  # even if a library caught the exception and returned normally
        stopped = came[0] if isinstance(came[0], Stopped) else Stopped(signal.SIGINT)
        if os.environ.get("RANK", "0") == "0":  # all ranks get the signal, only rank 0 prints
            print(stopped, advice, sep="; " if advice else "", file=sys.stderr)
        sys.exit(128 + stopped.number)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Delay the signals that end a command until the end of the block, which must be short."""
    came: list[int] = []
    before = handle(lambda number, _: came.append(number))
    try:
        yield
    finally:
        restore(before)
        for number in came:
            signal.raise_signal(number)


def handle(handler: Handler) -> dict[int, Any]:
    """Set `handler` for the signals that end a command, and return the previous handlers.

    Only the main thread can set handlers; in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in SIGNALS}


def restore(handlers: dict[int, Any]) -> None:
    """Restore the handlers that `handle` returned."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _show_anything(stream: Any, errors: str | None = "repeng.spelt") -> None:
    """Make a stream replace characters that its encoding lacks with ASCII; `errors` restores an earlier handler."""
    if hasattr(stream, "reconfigure") and errors is not None and not stream.closed:
        stream.reconfigure(errors=errors)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """The codec error handler "repeng.spelt"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    plain = "".join(SPELT.get(c) or unicodedata.normalize("NFKD", c) for c in missing)
    return plain.encode("ascii", "replace").decode(), error.end


codecs.register_error("repeng.spelt", _spell)


def end_with_the_launcher() -> None:
    """On Linux, let a process of `accelerate launch` get SIGTERM when the launcher dies, which forwards no signals."""
    if sys.platform == "linux" and any(name.startswith("ACCELERATE_") for name in os.environ):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, int(signal.SIGTERM))
