"""`repeng new`: from a sentence such as "more concise" to a configuration that a model's personas were tried with."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from repeng.cli.parsing import Commands, add_base, add_json, asked, check_base, parsed, tell
from repeng.data.behaviours import behaviour_of, opposite_of


def add(commands: Commands) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "new",
        help='make a behaviour of your own from a few words, such as "more concise"',
        description='Make a behaviour from a few words, such as "more concise" or "less formal". The command tries '
        "templates on the model, keeps those whose personas change what the model says, writes a configuration, and "
        "prints the commands that extract a vector and train an adapter. It asks for what is missing.",
        allow_abbrev=False,
    )
    command.add_argument("sentence", nargs="*", metavar="WORDS", help='the behaviour, such as "more concise"')
    command.add_argument("--opposite", metavar="WORD", help="the word for c = -1; common opposites are known")
    command.add_argument("--output", type=Path, help="the configuration to write; by default WORD.yaml")
    add_base(command, "by default smollm2")
    command.add_argument("--use_cpu", action="store_true", help="run on the CPU even if there is a GPU")
    add_json(command)


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Find the two words, then try them on the model."""
    options = parsed(parser, argv)
    check_base(options)
    asks = sys.stdin is not None and sys.stdin.isatty() and not options.json
    sentence = " ".join(options.sentence)
    if not sentence:
        sentence = _asked("What should the model be more of? Such as: more concise", asks, "WORDS")
    word, sign = behaviour_of(sentence)
    other = options.opposite or opposite_of(word)
    if other is None:
        other = _asked(f"What is the opposite of {word!r}?", asks, "--opposite")
    positive, negative = (word, other) if sign > 0 else (other, word)
    if positive == negative:
        raise ValueError(f"the word and its opposite are both {word!r}; give two different words")
    output = options.output or Path(f"{positive.replace(' ', '-')}.yaml")
    if output.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--output should end in .yaml; got {str(output)!r}")
    if output.exists():
        raise ValueError(f"{output} exists already; give another --output, or move it away")
    from repeng.commands.new import new

    base = options.model_name_or_path or "smollm2", options.gguf_file
    tell(options.json, lambda: new(positive, negative, output, *base, use_cpu=options.use_cpu))


def _asked(question: str, asks: bool, flag: str) -> str:
    """The answer to a question; raises ValueError where nobody can be asked, or nothing is answered."""
    answer = asked(f"{question}\n> ") if asks else ""
    if not answer:
        raise ValueError(f"{question} Give {flag}")
    return answer
