"""How a command of this package ends when it is told to, and how it prints where only ASCII can be shown.

The file imports nothing heavy, so that a signal during the imports of others ends in a sentence as well.
"""

import codecs
import ctypes
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SPELT = {"−": "-", "–": "-", "—": "-", "→": "->", "×": "x", "≤": "<=", "≥": ">=", "±": "+-", "‖": "||", "·": "."}
SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, Any], Any]
NOT_READ = 128 + 13  # the status of what SIGPIPE ends
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


class Stopped(KeyboardInterrupt):
    """A signal ends the command.

    Args:
        number: of the signal.
        when: words that end the sentence "stopped by SIGTERM", such as " after step 3".
    """

    def __init__(self, number: int, when: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{when}")
        self.number: int = number


@contextmanager
def command(advice: str = "") -> Iterator[None]:
    """The block is a command: SIGINT and SIGTERM end it with a sentence and the status that shells expect, 128 + N.

    SIGTERM raises once, so that it does not break into the end that it began; a second Ctrl-C insists.

    Args:
        advice: how the user goes on; it ends the sentence.

    Raises:
        SystemExit: a signal came, or nobody reads the output any more.
    """
    came: list[KeyboardInterrupt] = []

    def stop(number: int, _: Any) -> None:
        came.append(Stopped(number))
        if len(came) == 1 or number == signal.SIGINT:
            raise came[-1]

    before, out, strict = handle(stop), sys.stdout, getattr(sys.stdout, "errors", None)
    for stream in (out, sys.stderr):
        _show_anything(stream)
    try:
        yield
    except BrokenPipeError:  # as of `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        sys.exit(NOT_READ)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            came.insert(0, error)
        if not came:  # else it is what a library made of the signal
            raise
    finally:
        restore(before)
        _show_anything(out, strict)
    if came:  # even if a library took it for an end like any other
        stopped = came[0] if isinstance(came[0], Stopped) else Stopped(signal.SIGINT)
        if os.environ.get("RANK", "0") == "0":  # of several processes that all get it
            print(stopped, advice, sep="; " if advice else "", file=sys.stderr)
        sys.exit(128 + stopped.number)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that end a command wait until the block, which must be short, is through."""
    came: list[int] = []
    before = handle(lambda number, _: came.append(number))
    try:
        yield
    finally:
        restore(before)
        for number in came:
            signal.raise_signal(number)


def handle(handler: Handler) -> dict[int, Any]:
    """Let `handler` get the signals that end a command; who got them before. Only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in SIGNALS}


def restore(handlers: dict[int, Any]) -> None:
    """Undo `handle`."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _show_anything(stream: Any, errors: str | None = "repeng.spelt") -> None:
    """Let a stream spell in ASCII what its encoding lacks, instead of raising; or do again what it did."""
    if hasattr(stream, "reconfigure") and errors is not None and not stream.closed:
        stream.reconfigure(errors=errors)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """The error handler of that name."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    plain = "".join(SPELT.get(c) or unicodedata.normalize("NFKD", c) for c in missing)
    return plain.encode("ascii", "replace").decode(), error.end


codecs.register_error("repeng.spelt", _spell)


def end_with_the_launcher() -> None:
    """On Linux, let a process of `accelerate launch` get SIGTERM when the launcher is gone: it forwards none."""
    if sys.platform == "linux" and any(name.startswith("ACCELERATE_") for name in os.environ):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, int(signal.SIGTERM))
