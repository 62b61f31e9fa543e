"""`repeng train`: train an adapter."""

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from repeng._file_names import REPORT
from repeng.cli.parsing import Commands, Result, add_config, add_json, tell
from repeng.data.arguments import TaskArguments
from repeng.data.configuration import add_keys, defaults_of, hints_for, read_configs, shipped_configs, split_configs
from repeng.data.words import flags_and_words, name_of
from repeng.train.recipe import Recipe

USAGE = "repeng train [--config NAME_OR_FILE ...] [--KEY VALUE ...] [FLAGS OF accelerate launch]"


def add(commands: Commands) -> None:
    """Add the parser of this command. It serves `--help` only."""
    command = commands.add_parser(
        "train",
        help="train an adapter",
        usage=USAGE,
        allow_abbrev=False,
        description="Train an adapter, save it, and print its effect. Every key of transformers.TrainingArguments "
        "and every flag of `accelerate launch` is accepted too.",
        epilog=f"configurations in the package: {', '.join(shipped_configs())}",
    )
    add_config(command)
    add_json(command)
    add_keys(command, [TaskArguments], "keys of the task: model, behaviour and data")
    add_keys(command, [Recipe], "keys of the training")


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Check the configurations as far as possible without slow imports, then launch the training."""
    _, *words = argv
    if {"-h", "--help"} & set(words):
        parser.parse_args(["train", "--help"])
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    configs, rest = split_configs(words)
    in_files = read_configs(configs or [], hints_for([TaskArguments, Recipe]), aside=lambda name: True)

    def trained() -> Result:
        from repeng.train.launch import launch

        launch(words)
        on_the_line = [given for flag, given in flags_and_words(rest) if name_of(flag) == "output_dir"]
        folder = on_the_line[-1][0] if on_the_line else in_files.get("output_dir", defaults_of([Recipe])["output_dir"])
        path = Path(folder) / REPORT
        return {"output_dir": folder, **(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})}

    tell(as_json, trained)
