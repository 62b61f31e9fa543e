"""`repeng info`: say what a file or folder is, and how to use it."""

from argparse import ArgumentParser
from collections.abc import Sequence

from repeng.cli.parsing import Commands, add_json, add_path, parsed, tell


def add(commands: Commands) -> None:
    """Add the parser of this command."""
    told = "say what an adapter, a vector, a report, a pairs file or a model is, and how to use it"
    command = commands.add_parser("info", help=told, description=told, allow_abbrev=False)
    add_path(command, "a file or a folder")
    add_json(command)


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Check that there is something at PATH, then describe it."""
    options = parsed(parser, argv)
    if not options.path.exists():
        raise ValueError(f"PATH: there is no file or folder {str(options.path)!r}")
    from repeng.commands.info import info

    tell(options.json, lambda: info(options.path))
