"""`repeng train`: train an adapter."""

from argparse import ArgumentParser
from collections.abc import Sequence

from repeng.cli.parsing import Commands, add_config
from repeng.data.arguments import TaskArguments
from repeng.data.configuration import add_keys, hints_for, read_configs, shipped_configs, split_configs
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
    add_config(command, "YAML files or names of configurations; later ones override earlier ones")
    add_keys(command, [TaskArguments], "keys of the task: model, behaviour and data")
    add_keys(command, [Recipe], "keys of the training")


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Check the configurations as far as possible without slow imports, then launch the training."""
    _, *words = argv
    if {"-h", "--help"} & set(words):
        parser.parse_args(["train", "--help"])
    configs, _ = split_configs(words)
    read_configs(configs or [], hints_for([TaskArguments, Recipe]), aside=lambda name: True)
    from repeng.train.launch import launch

    launch(words)
