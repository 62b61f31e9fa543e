"""Parsers of the commands, and what all commands do alike: errors, exit statuses and results as JSON."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from repeng.data.configuration import built, defaults_of, hints_for, names_of, read_configs, split_configs
from repeng.data.schema import refuse_unknown
from repeng.data.words import LINE, name_of, read_words

Commands = Any  # the object that `add_subparsers` returns; argparse has no public name for its class
Result = Mapping[str, Any]
PATH = "folder of an adapter, file of a vector, or owner/name on the hub"


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors as ValueError, and prints no usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists what is allowed")


def add_json(command: argparse.ArgumentParser) -> None:
    """Add the switch that `tell` obeys."""
    command.add_argument(
        "--json", action="store_true", help="print the result as one JSON object; all other text goes to stderr"
    )


def add_path(command: argparse.ArgumentParser, told: str = PATH) -> None:
    """Add the positional argument PATH."""
    command.add_argument("path", type=Path, metavar="PATH", help=told)


def add_paths(command: argparse.ArgumentParser) -> None:
    """Add the positional arguments that `repeng.serve.names.named_paths` reads."""
    command.add_argument(
        "paths",
        nargs="+",
        metavar="[NAME=]PATH",
        help="folders of adapters, files of vectors, and repositories owner/name on the hub; NAME is by default the "
        "name of the folder, the file or the repository",
    )


def add_base(command: argparse.ArgumentParser, default: str) -> None:
    """Add the options that name the base model; `default` says which one is used without them."""
    command.add_argument("--model_name_or_path", help=f"the base model; {default}")
    command.add_argument("--gguf_file", help="name of a GGUF file in the base model's folder or hub repository")


def check_base(options: argparse.Namespace) -> None:
    """Raise ValueError if a GGUF file is named without the model that it belongs to."""
    if options.gguf_file and not options.model_name_or_path:
        raise ValueError(
            f"--gguf_file {options.gguf_file} needs --model_name_or_path, the folder or hub id with the file"
        )


def add_config(
    command: argparse.ArgumentParser,
    told: str = "YAML files or names of configurations; later ones override earlier ones",
) -> None:
    """Add `--config`."""
    command.add_argument("--config", nargs="+", metavar="NAME_OR_FILE", help=told)


def tell(as_json: bool, work: Callable[[], Result]) -> Result:
    """Do the work of a command. With `as_json`, its result is the only text on the standard output."""
    if not as_json:
        return work()
    with redirect_stdout(sys.stderr), _descriptor_to_stderr():
        result = work()
    print(json.dumps(result, indent=1, default=str))
    return result


@contextmanager
def _descriptor_to_stderr() -> Iterator[None]:
    """Let the standard output of processes that start in the block be the standard error."""
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def asked(question: str, default: str = "") -> str:
    """What the user answers in the terminal; `default` for an empty answer or Ctrl-D."""
    try:
        return input(question).strip() or default
    except EOFError:
        print()
        return default


def path_first(words: Sequence[str]) -> list[str]:
    """The words of a command with PATH moved to the front.

    At the end, an option with several values could take the path as one of its values.
    """
    switches = [word for word in words if word == "--json"]  # one in front would hide that PATH follows
    rest = [word for word in words if word != "--json"]
    if rest and switches and words[0] == "--json" and not rest[0].startswith("-"):
        return [*rest, *switches]
    if rest and rest[0].startswith("-") and not rest[-1].startswith("-"):
        rest = [rest[-1], *rest[:-1]]
    return [*rest, *switches]


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. An unknown key raises a ValueError that names the nearest key."""
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse_unknown([name_of(unknown[0]) if unknown[0].startswith("--") else unknown[0]], vars(options), LINE)
    return options


def keys_of(
    kinds: Sequence[type], words: Sequence[str], *, needs: Sequence[str] = (), without: Sequence[str] = ()
) -> tuple[tuple[Any, ...], list[str], bool]:
    """The values of `--config …` and of the other words of a command line.

    Keys of the training in a configuration are ignored.

    Args:
        kinds: argument dataclasses.
        words: the command line.
        needs: keys that must be given although they have defaults.
        without: keys that are ignored in configurations.

    Returns:
        One object of each dataclass, the configurations, and whether `--json` was given.

    Raises:
        ValueError, FileNotFoundError: a key, a value or a configuration is wrong or missing.
    """
    hints = hints_for(kinds)
    configs, rest = split_configs(words)
    on_the_line = read_words(rest, {**hints, "json": bool}, defaults_of(kinds))
    as_json = on_the_line.pop("json", False)
    in_files = read_configs(configs or [], hints, aside=lambda name: True)
    given = {name: value for name, value in in_files.items() if name not in without} | on_the_line
    for name in needs:
        if name not in given:
            raise ValueError(f"give --{name}, or a configuration that sets it, such as --config smollm2")
    return built(kinds, given), configs or [], as_json


def refuse_unknown_keys(configs: Sequence[str], kinds: Sequence[type]) -> None:
    """Raise ValueError if a configuration has a key that neither `kinds` nor the training knows. Imports slowly."""
    from repeng.train.arguments import SteeringArguments

    read_configs(configs, hints_for(kinds), aside=names_of([SteeringArguments]).__contains__)


def finite(word: str) -> float:
    """A number from a command line that is neither NaN nor infinite."""
    if not math.isfinite(float(word)):
        raise argparse.ArgumentTypeError(f"should be a finite number; got {word!r}")
    return float(word)
