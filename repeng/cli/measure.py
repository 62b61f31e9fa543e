"""`repeng evaluate` and `repeng calibrate`: measure an adapter or a vector."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from repeng._command import FAILED, end
from repeng.cli.keys import MEASURES
from repeng.cli.parsing import (
    Commands,
    add_config,
    add_json,
    add_path,
    path_first,
    refuse_unknown_keys,
    tell,
)
from repeng.data.arguments import TaskArguments
from repeng.data.configuration import add_keys, built, defaults_of, hints_for, read_configs, split_configs
from repeng.data.paths import WANTED, named_after, steerable
from repeng.data.trust import check_followed, own_config, say_model
from repeng.data.words import read_words

HELP = {
    "evaluate": "measure the effect and the costs of an adapter or a vector, and compare them with baselines",
    "calibrate": "scale an adapter or a vector so that c = ±1 spends a stated budget, and store the scale",
}


def add(commands: Commands) -> None:
    """Add the parsers of both commands."""
    for name, kind in MEASURES.items():
        command = commands.add_parser(name, help=HELP[name], description=HELP[name], allow_abbrev=False)
        add_path(command)
        add_config(
            command,
            "YAML files or names of configurations; by default PATH/config.yaml, which training writes. "
            "Keys of the training in them are ignored.",
        )
        add_json(command)
        add_keys(command, [kind], "keys of this command")
        add_keys(command, [TaskArguments], "keys of the task: model, behaviour and data")


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Check the command line, then run the command."""
    command, *given = argv
    if {"-h", "--help"} & set(given):
        parser.parse_args([command, "--help"])
    words = path_first(given)
    if not words or words[0].startswith("-"):
        raise ValueError(f"repeng {command} needs a PATH; {WANTED}")
    kinds = (MEASURES[command], TaskArguments)
    hints = hints_for(kinds)
    configs, rest = split_configs(words[1:])
    on_the_line = read_words(rest, {**hints, "json": bool}, defaults_of(kinds))
    as_json = on_the_line.pop("json", False)
    path, beside = steerable(words[0]), named_after(words[0])
    if command == "calibrate" and str(beside) != words[0]:
        raise ValueError(
            f"PATH: a calibration is stored in the adapter or vector, and {words[0]} is on the hub; get it with "
            f"hf download {words[0].partition('@')[0]} --local-dir {beside}, and give that folder or file"
        )
    own = configs is None
    if configs is None:
        found = own_config(path)
        configs = [] if found is None else [str(found)]
    in_files = read_configs(configs, hints, aside=lambda name: True)
    if own and configs:
        followed = {name: value for name, value in in_files.items() if name not in on_the_line}
        check_followed(followed, Path(configs[0]))
        if not as_json:
            say_model(followed, Path(configs[0]))
    arguments, task_args = built(kinds, in_files | on_the_line)
    if on_the_line.get("bf16") and not task_args.load_in_4bit:
        raise ValueError("bf16 has no effect without load_in_4bit: the base keeps its own precision; leave bf16 out")

    refuse_unknown_keys(configs, kinds)
    from repeng.commands.measure import DO

    options = vars(arguments)
    required = options.pop("require_steering", False)
    if command == "evaluate" and str(beside) != words[0] and options["output"] is None:
        options["output"] = f"{beside}-report"
    result = tell(as_json, lambda: DO[command](path, task_args, **options))
    if required and result["shortcomings"]:
        end("this does not steer: " + "; ".join(result["shortcomings"]), FAILED)
