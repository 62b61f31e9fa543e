"""A conversation in the terminal."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repeng.chat.conversation import Answer, Chat, Column, Cost, shown_coefficients, shown_cost
from repeng.data.files import nearest, write_json
from repeng.model.script import printable

HELP = {
    "/c": "/c -1 sets the coefficient; with several adapters or vectors: /c NAME -1",
    "/compare": "/compare -1 1 answers at several coefficients from here on; /compare alone ends it",
    "/retry": "answer the last prompt again, at the coefficients of now and with the next seed",
    "/clear": "forget the conversation; the coefficients stay",
    "/save": "/save FILE.json writes the conversation with coefficients and costs; it never overwrites",
    "/help": "show this",
    "/quit": "end; so does the end of the input",
}


@dataclass(frozen=True)
class Reply:
    """One answer of a round, with its coefficients and its cost."""

    coefficients: dict[str, float]
    answer: Answer
    cost: Cost


@dataclass(frozen=True)
class Round:
    """A prompt, its answers, and the number of the try."""

    prompt: str
    replies: list[Reply]
    attempt: int


class Terminal:
    """A conversation by lines of text. A line that begins with "/" is a command.

    Args:
        chat: the model.
        name: name of the base model.
        show: function that shows a text. It adds no line break.
    """

    def __init__(self, chat: Chat, name: str, show: Callable[[str], Any]) -> None:
        self.chat: Chat = chat
        self.rounds: list[Round] = []
        self.coefficients: dict[str, float] = dict.fromkeys(chat.dials.names, 0.0)
        self.compared: list[dict[str, float]] = []
        self._name, self._show = name, show
        self._commands: dict[str, Callable[[list[str]], None]] = {
            "/c": self._set,
            "/compare": self._compare,
            "/retry": self._retry,
            "/clear": self._clear,
            "/save": self._save,
            "/help": self._help,
        }

    def take(self, line: str) -> bool:
        """Obey or answer one line. An error becomes one sentence. Returns whether the conversation goes on."""
        try:
            command, *words = line.split() if line.startswith("/") else [""]
            if command == "/quit":
                return False
            if command and command not in self._commands:
                raise ValueError(f"there is no command {command}{nearest(command, HELP)}; /help lists the commands")
            if command:
                self._commands[command](words)
            elif line.strip():
                self._answer(line.strip(), 0)
        except KeyboardInterrupt:
            self._show("stopped\n")
        except (ValueError, OSError, RuntimeError) as error:  # such as too little memory
            self._show(f"error: {printable(str(error))}\n")
        return True

    def _answer(self, prompt: str, attempt: int) -> None:
        """Answer a prompt in all columns, with the first one streamed, and remember the round."""
        settings = self.compared or [self.coefficients]
        columns = [Column(prompt, dict(c), self._history(index)) for index, c in enumerate(settings)]
        answers: list[Answer] = []
        self._show(f"[{shown_coefficients(columns[0].coefficients)}] ")
        shown = 0
        try:
            with closing(self.chat.answer(columns, attempt)) as stream:  # type: ignore[type-var]
                for answers in stream:
                    text = printable(answers[0].text.lstrip())
                    self._show(text[shown:])
                    shown = len(text)
        except KeyboardInterrupt:
            if not answers:
                self._show("\n")
                return
            self._show(" (stopped)")
        except BaseException:
            self._show("\n")
            raise
        costs = self.chat.costs(columns, answers)
        for index, (column, answer, cost) in enumerate(zip(columns, answers, costs, strict=True)):
            if index:
                self._show(f"[{shown_coefficients(column.coefficients)}] {printable(answer.text.lstrip())}")
            self._show(f"\n  {shown_cost(cost)}\n")
        replies = [Reply(dict(o.coefficients), a, c) for o, a, c in zip(columns, answers, costs, strict=True)]
        self.rounds.append(Round(prompt, replies, attempt))

    def _history(self, index: int) -> list[str]:
        """The turns before this one. A column that a round lacks continues from the last column of that round."""
        return [
            text
            for one in self.rounds
            for text in (one.prompt, one.replies[min(index, len(one.replies) - 1)].answer.text)
        ]

    def _set(self, words: Sequence[str]) -> None:
        name, numbers = self._named(words, "/c")
        if len(numbers) != 1:
            raise ValueError(f"/c takes one number; got {len(numbers)}; for several answers, give /compare")
        self.coefficients = self.coefficients | {name: numbers[0]}
        if self.compared:
            self.compared = []
            self._show("The comparison has ended. ")
        self._show(f"{shown_coefficients(self.coefficients)}\n")

    def _compare(self, words: Sequence[str]) -> None:
        if not words:
            self.compared = []
            self._show(f"One answer, at {shown_coefficients(self.coefficients)}\n")
            return
        name, numbers = self._named(words, "/compare")
        if len(set(numbers)) < 2 or len(set(numbers)) < len(numbers):
            raise ValueError("/compare takes two or more different numbers, such as /compare -1 1")
        self.compared = [self.coefficients | {name: c} for c in numbers]
        self._show(f"{len(numbers)} answers: {'; '.join(map(shown_coefficients, self.compared))}\n")

    def _named(self, words: Sequence[str], command: str) -> tuple[str, list[float]]:
        """The adapter or vector that the words name, and the numbers after it."""
        names = self.chat.dials.names
        try:
            numbers, name = [float(word) for word in words], names[0]
        except ValueError:
            try:
                name, numbers = words[0], [float(word) for word in words[1:]]
            except ValueError:
                raise ValueError(f"{command} takes numbers, such as {command} -1 1; got {' '.join(words)}") from None
        else:
            if len(names) > 1:
                raise ValueError(f"{command} needs a name before the number: {', '.join(names)}")
        if not numbers:
            raise ValueError(f"{command} needs a number, such as {command} {f'{name} ' if words else ''}-1")
        for c in numbers:
            self.chat.check({name: c})
        return name, numbers

    def _retry(self, words: Sequence[str]) -> None:
        if not self.rounds:
            raise ValueError("there is no prompt to answer again; write one")
        *before, last = after = self.rounds
        self.rounds = before
        try:
            self._answer(last.prompt, last.attempt + 1)
        finally:
            if len(self.rounds) < len(after):  # there is no new answer, so the old ones stay
                self.rounds = after

    def _clear(self, words: Sequence[str]) -> None:
        self.rounds = []
        self._show("The conversation is forgotten.\n")

    def _save(self, words: Sequence[str]) -> None:
        if len(words) != 1:
            raise ValueError(f"/save takes one file name without spaces; got {len(words)} words")
        path = Path(words[0]).expanduser()
        if not self.rounds:
            raise ValueError("there is nothing to save; write a prompt first")
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"{path} exists, and /save does not overwrite files; choose another name")
        write_json(path, self.told())
        self._show(f"written: {printable(str(path))}\n")

    def told(self) -> dict[str, Any]:
        """The conversation as data."""
        return {
            "model": self._name,
            "temperature": self.chat.temperature,
            "max_new_tokens": self.chat.max_new_tokens,
            "rounds": [
                {
                    "prompt": one.prompt,
                    "seed": self.chat.seed + one.attempt,
                    "answers": [
                        {
                            "coefficients": reply.coefficients,
                            "text": reply.answer.text,
                            "ended": reply.answer.ended,
                            "kl": reply.cost.mean,
                            "rmse": reply.cost.rmse,
                            "log_probability": reply.cost.total,
                            "tokens": [
                                {"id": token, "text": piece, "log_probability": change, "kl": kl}
                                for token, piece, change, kl in zip(
                                    reply.answer.ids,
                                    reply.answer.pieces,
                                    reply.cost.change,
                                    reply.cost.kl,
                                    strict=True,
                                )
                            ],
                        }
                        for reply in one.replies
                    ],
                }
                for one in self.rounds
            ],
        }

    def _help(self, words: Sequence[str]) -> None:
        for name, told in HELP.items():
            self._show(f"{name:10}{told}\n")


def talk(chat: Chat, name: str) -> None:
    """Read lines from the standard input until it ends or says /quit."""
    typed = sys.stdin.isatty()

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    terminal = Terminal(chat, name, show)
    if typed:
        show("A line is a prompt; /help lists the commands. Ctrl-C stops an answer, Ctrl-D ends.\n")
    with _interrupts(typed):
        for line in _typed_lines(show) if typed else sys.stdin:
            if not terminal.take(line.rstrip("\r\n")):
                break


def _typed_lines(show: Callable[[str], Any]) -> Iterator[str]:
    """Lines from a person."""
    try:
        import readline  # noqa: F401  # it gives `input` its editing and history; not every platform has it
    except ImportError:
        pass
    while True:
        try:
            yield input("> ")
        except EOFError:
            show("\n")
            return
        except KeyboardInterrupt:  # it empties the line
            show("\n")


@contextmanager
def _interrupts(typed: bool) -> Iterator[None]:
    """Inside the context, Ctrl-C raises KeyboardInterrupt instead of ending the command."""
    if not typed or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
