"""`repeng demo`: dial a real model, with one command."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from repeng.cli.parsing import Commands, Result, add_json, asked, parsed, tell
from repeng.data.configuration import CONFIGS
from repeng.data.files import nearest
from repeng.data.words import LINE

MODEL = "smollm2"  # and in `repeng.commands.demo`, which is slow to import


def traits() -> list[str]:
    """The names of the package's traits."""
    return sorted(path.stem for path in CONFIGS.glob("traits/*.yaml"))


def add(commands: Commands) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "demo",
        help="dial a small real model, in about a minute",
        description="Extract a steering vector for a trait on SmolLM2-135M, set c = ±1 to the cost of a persona "
        "prompt, and print the answers to some prompts at c = −1, 0 and +1. The vector is written to the working "
        "folder, and a later call uses it again. The command asks for the trait.",
        allow_abbrev=False,
    )
    command.add_argument("trait", nargs="?", metavar="TRAIT", help=f"one of {', '.join(traits())}; by default mood")
    command.add_argument("--prompt", nargs="+", metavar="TEXT", help="prompts of your own")
    command.add_argument(
        "--train", action="store_true", help="train an adapter instead of a vector: minutes instead of seconds"
    )
    command.add_argument("--use_cpu", action="store_true", help="run on the CPU even if there is a GPU")
    add_json(command)


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Choose the trait, then show it."""
    options = parsed(parser, argv)
    trait = options.trait or _chosen(sys.stdin is not None and sys.stdin.isatty() and not options.json)
    if trait not in traits():
        raise ValueError(f"{LINE}: unknown trait {trait!r}{nearest(trait, traits())}; give {', '.join(traits())}")
    folder = Path(f"outputs/demo-{trait}") if options.train else None

    def shown() -> Result:
        if folder is not None and not (folder / "adapter_config.json").is_file():
            from repeng.train.launch import launch

            cpu = ["--use_cpu", "true"] if options.use_cpu else []
            launch(["--config", MODEL, trait, "--output_dir", str(folder), *cpu])
        from repeng.commands.demo import demo

        return demo(trait, options.prompt, folder, use_cpu=options.use_cpu)

    tell(options.json, shown)


def _chosen(asks: bool) -> str:
    """The trait that the user chooses from a list; `mood` where nobody can be asked."""
    if not asks:
        return "mood"
    names = traits()
    print("\n".join(f"{number}  {name}" for number, name in enumerate(names, start=1)))
    answer = asked("Which trait? [mood] ", "mood")
    if answer.isdigit() and 1 <= int(answer) <= len(names):
        return names[int(answer) - 1]
    return answer
