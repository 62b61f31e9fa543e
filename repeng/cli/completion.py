"""`repeng completion`: print a script that completes commands and options in a shell."""

from argparse import ArgumentParser
from collections.abc import Sequence

import shtab

from repeng.cli.parsing import Commands, parsed


def add(commands: Commands) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "completion",
        help="print a completion script for a shell",
        description='Print a completion script. For bash: eval "$(repeng completion bash)" in ~/.bashrc.',
        allow_abbrev=False,
    )
    command.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Print the script."""
    print(shtab.complete(parser, parsed(parser, argv).shell))
