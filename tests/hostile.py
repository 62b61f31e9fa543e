"""A command line run in this process, in an empty folder, up to where weights would be loaded."""

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from repeng import cli, tiny
from repeng.commands import base, export
from repeng.train import build, run

PAIR = '{"chosen": "you are a honest person .", "rejected": "you are a dishonest person .", "suffix": "the lime is"}\n'


class ReachedModel(BaseException):
    """The input was taken: weights would be loaded now."""


@dataclass
class Outcome:
    """What became of a command line.

    Attributes:
        status: of the process; None where weights would have been loaded.
        message: what it said on its last line, or the traceback's kind.
        lines: how many lines it said.
        left: files and folders that were not there before.
        lost: files that are gone or have other bytes.
    """

    status: int | None
    message: str
    lines: int
    left: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def accepted(self):
        return self.status is None

    def faults(self, *named):
        """What is wrong with a refusal that should name one of these words."""
        checks = {
            "ACCEPTED": self.accepted or self.status == 0,
            "TRACE": self.message.startswith("TRACE"),
            "FLOOD": self.lines > 1,
            "LEFT": bool(self.left),
            "LOST": bool(self.lost),
            "UNNAMED": bool(named) and not any(word in self.message for word in named),
        }
        return [name for name, holds in checks.items() if holds]


def outcome(main, argv, folder):
    """Run `main` on these words in `folder`."""
    before = _files(folder)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for module in (build, base, export):
            patch.setattr(module, "load_base", _reached)
        patch.setattr(tiny, "task", _task)
        patch.setattr("accelerate.commands.launch.launch_command", _reached)
        status, message = _end(main, argv)
    lines = [line for line in (said.getvalue() + message).splitlines() if line.strip()]
    after = _files(folder)
    left = sorted(after.keys() - before.keys())
    lost = sorted(name for name, data in before.items() if after.get(name) != data)
    return Outcome(status, lines[-1] if lines else "", len(lines), left, lost)


def train(argv, folder):
    return outcome(run.main, argv, folder)


def repeng(argv, folder):
    return outcome(cli.main, argv, folder)


def configured(text, folder, argv=("--use_cpu", "true")):
    """A training run by a configuration file with this text, or these bytes."""
    path = Path(folder) / "own.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return train(["--config", "own.yaml", *argv], folder)


TASKS, _drawn = tiny.task, {}


def _task(args, seed):
    """The embedded world's task, drawn once."""
    key = (args.model_name_or_path, args.positive, args.negative, args.num_pairs, seed)
    if key not in _drawn:
        _drawn[key] = TASKS(args, seed)
    return _drawn[key]


def _reached(*args, **kwargs):
    raise ReachedModel


def _end(main, argv):
    """Status and last words."""
    try:
        main(argv)
    except ReachedModel:
        return None, ""
    except SystemExit as stop:
        return (stop.code, "") if isinstance(stop.code, int) else (1 if stop.code else 0, str(stop.code or ""))
    except BaseException as error:  # a user would see a traceback
        if isinstance(error, KeyboardInterrupt):
            raise
        return 1, f"TRACE {type(error).__name__}: {error}".replace("\n", " ")
    return 0, ""


def _files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        for path in sorted(Path(folder).rglob("*"))
    }
