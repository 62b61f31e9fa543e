"""`repeng pairs make` and `repeng pairs check`: make pairs of prompts, or check them with a model's tokenizer."""

from argparse import ArgumentParser
from collections.abc import Sequence

from repeng._command import FAILED, end
from repeng.cli.keys import PairsArguments
from repeng.cli.parsing import Commands, add_config, add_json, keys_of, refuse_unknown_keys, tell
from repeng.data.arguments import TaskArguments
from repeng.data.configuration import add_keys

ACTIONS = ("check", "make")
BEHAVIOUR = ("positive", "negative", "templates", "suffixes_file", "num_pairs")  # keys that a pairs file replaces


def add(commands: Commands) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "pairs",
        help="check pairs with a model's tokenizer, or make them from two words",
        description="check: list the problems of the pairs in FILE; the status is 1 if there are any. make: write "
        "the pairs of a behaviour to the file --output. Both load the model's tokenizer only.",
        usage="repeng pairs check|make [FILE] [--config NAME_OR_FILE ...] [--KEY VALUE ...]",
        allow_abbrev=False,
    )
    command.add_argument("action", choices=ACTIONS)
    command.add_argument("file", nargs="?", metavar="FILE", help="a pairs file, the same as --pairs_file FILE")
    add_config(command)
    add_json(command)
    add_keys(command, [PairsArguments], "keys of this command")
    add_keys(command, [TaskArguments], "keys of the task: model, behaviour and data")


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Check the command line, then check or make the pairs."""
    _, *words = argv
    if {"-h", "--help"} & set(words):
        parser.parse_args(["pairs", "--help"])
    if not words or words[0] not in ACTIONS:
        raise ValueError(f"repeng pairs needs one of {', '.join(ACTIONS)}; got {words[0] if words else 'nothing'!r}")
    action, *words = words
    without: tuple[str, ...] = ()
    if words and not words[0].startswith("-"):
        words, without = ["--pairs_file", *words], BEHAVIOUR
    kinds = (PairsArguments, TaskArguments)
    (arguments, task_args), configs, as_json = keys_of(kinds, words, needs=("model_name_or_path",), without=without)
    if action == "make" and arguments.output is None:
        raise ValueError("repeng pairs make needs --output, the file to write")
    if action == "check" and arguments.output is not None:
        raise ValueError("--output is for repeng pairs make; leave it out")
    refuse_unknown_keys(configs, kinds)
    from repeng.commands.pairs import check, make

    if action == "make":
        tell(as_json, lambda: make(task_args, arguments.output, arguments.seed))
        return
    result = tell(as_json, lambda: check(task_args, arguments.seed))
    if result["problems"]:
        end(f"{len(result['problems'])} problems in {result['pairs']} pairs", FAILED)
