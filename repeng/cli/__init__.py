"""The command line: one module per command. A module adds its parser (`add`) and does what it says (`run`).

The command line is parsed, and the names in it are checked, before any slow module is imported.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version

from repeng._command import command, end
from repeng.cli import chat, completion, demo, export, extract, info, measure, new, pairs, push, serve, train
from repeng.cli.parsing import Parser
from repeng.data.files import nearest

COMMANDS = {
    "demo": demo,
    "new": new,
    "pairs": pairs,
    "extract": extract,
    "train": train,
    "evaluate": measure,
    "calibrate": measure,
    "chat": chat,
    "export": export,
    "serve": serve,
    "push": push,
    "info": info,
    "completion": completion,
}


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line. Bad input ends it with an error message of one sentence and status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if not argv or argv[0] in ("-h", "--help", "--version"):
            make_parser().parse_args(argv)
        elif argv[0] not in COMMANDS:
            raise ValueError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}; give {', '.join(COMMANDS)}")
        else:
            COMMANDS[argv[0]].run(make_parser(), argv)
    except BrokenPipeError:
        raise  # the reader of the output has closed the pipe; `_command.command` handles this
    except (ValueError, OSError, ImportError) as error:
        end(str(error))


def make_parser() -> Parser:
    """The parser of all commands. It reads the values of keys as text."""
    parser = Parser(prog="repeng", description="Steer language models from the inside.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"repeng {version('repeng')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for module in dict.fromkeys(COMMANDS.values()):
        module.add(commands)
    return parser
