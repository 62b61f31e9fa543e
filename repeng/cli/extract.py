"""`repeng extract`: extract a steering vector."""

from argparse import ArgumentParser
from collections.abc import Sequence

from repeng.cli.keys import ExtractArguments
from repeng.cli.parsing import Commands, add_config, add_json, keys_of, refuse_unknown_keys, tell
from repeng.data.arguments import TaskArguments
from repeng.data.configuration import add_keys


def add(commands: Commands) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "extract",
        help="extract a steering vector, in seconds and without training",
        description="Extract a steering vector from the pairs of a behaviour, and write it to a safetensors file. "
        "An existing file is never overwritten.",
        allow_abbrev=False,
    )
    add_config(command)
    add_json(command)
    add_keys(command, [ExtractArguments], "keys of this command")
    add_keys(command, [TaskArguments], "keys of the task: model, behaviour and data")


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Check the command line, then extract the vector."""
    _, *words = argv
    if {"-h", "--help"} & set(words):
        parser.parse_args(["extract", "--help"])
    # In a configuration, `layers` are those of an adapter.
    (arguments, task_args), configs, as_json = keys_of((ExtractArguments, TaskArguments), words, without=("layers",))
    refuse_unknown_keys(configs, (ExtractArguments, TaskArguments))
    from repeng.commands.extract import extract_vector

    tell(as_json, lambda: extract_vector(task_args, **vars(arguments)))
