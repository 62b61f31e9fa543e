"""`repeng push`: publish an adapter or a vector on the Hugging Face hub."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from repeng.cli.parsing import Commands, add_json, add_path, parsed, tell
from repeng.data.paths import steerable
from repeng.model.hub import check_repo_id, repository


def add(commands: Commands) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "push",
        help="publish an adapter or a vector on the Hugging Face hub",
        description="Publish an adapter or a vector with a model card. Of an adapter's folder the adapter, the report "
        "and the configuration without local paths are published, with plain LoRAs of c = +1 and c = -1. The token is "
        "the one of `hf auth login`, or in the environment variable HF_TOKEN.",
        allow_abbrev=False,
    )
    add_path(command, "folder of an adapter, or file of a vector")
    command.add_argument("repo_id", metavar="REPO_ID", help="owner/name; the repository is made if it is missing")
    command.add_argument("--base_model", help="hub id of the base model; by default the one that PATH names")
    command.add_argument("--private", action="store_true", help="make a private repository; a public one is refused")
    command.add_argument("--revision", help="branch to publish to; by default the main one")
    command.add_argument("--dry_run", type=Path, metavar="FOLDER", help="write the files to FOLDER, publish nothing")
    add_json(command)


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Check the options, then publish."""
    options = parsed(parser, argv)
    if repository(str(options.path)) is not None:
        raise ValueError(f"PATH should be on this machine; got {str(options.path)!r}")
    steerable(str(options.path))
    check_repo_id(options.repo_id)
    from repeng.commands.push import push

    tell(
        options.json,
        lambda: push(
            options.path,
            options.repo_id,
            base_model=options.base_model,
            private=options.private or None,
            revision=options.revision,
            dry_run=options.dry_run,
        ),
    )
