"""`repeng train`: hand a training run to `accelerate launch`."""

import argparse
from collections.abc import Collection, Sequence

from repeng.data.arguments import TaskArguments
from repeng.data.configuration import CONFIGS, names_of, refuse_unknown


def launch(argv: Sequence[str]) -> None:
    """Start `python -m repeng.train` in as many processes as accelerate is told to.

    Flags that only `accelerate launch` knows go to it; `--config_file` also takes the name of one of the package's own
    configurations, such as `fsdp2`. All others go to the training.

    Raises:
        ValueError: neither knows a flag.
        SystemExit: the training failed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    from repeng.train.arguments import SteeringArguments

    parser = launch_command_parser()
    flags, rest = split_flags(argv, parser, {"config", *names_of((TaskArguments, SteeringArguments))})
    launch_command(parser.parse_args([*flags, "--quiet", "--module", "repeng.train", *rest]))


def split_flags(
    argv: Sequence[str], parser: argparse.ArgumentParser, own: Collection[str]
) -> tuple[list[str], list[str]]:
    """The words of a command line that are the launcher's, and those that are ours; what both know is ours.

    Args:
        argv: the command line.
        parser: the launcher's.
        own: names of our keys.

    Raises:
        ValueError: neither knows a flag.
    """
    known = {option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"}
    launchers: list[str] = []
    ours: list[str] = []
    into = ours
    for word in argv:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            refuse_unknown([name], {*own, *known}, "the command line")
            into = ours if name in own else launchers
            if name == "config_file" and value:
                into += ["--config_file", _accelerate_config(value)]
                continue
        into.append(_accelerate_config(word) if into is launchers and into[-1:] == ["--config_file"] else word)
    return launchers, ours


def _accelerate_config(word: str) -> str:
    """The path of one of the package's configurations of accelerate, or the word as it is."""
    shipped = {path.stem: str(path) for path in CONFIGS.glob("accelerate/*.yaml")}
    return shipped.get(word, word)
