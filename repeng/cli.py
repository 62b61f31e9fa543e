"""The command line: `repeng train`, `repeng evaluate|calibrate|export PATH` and `repeng serve PATH …`.

It is parsed, and the names in it are checked, before anything slow is imported.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from repeng import _command
from repeng.data.arguments import TaskArguments
from repeng.data.configuration import (
    add_keys,
    built,
    defaults_of,
    hints_for,
    names_of,
    read_configs,
    shipped_configs,
    split_configs,
)
from repeng.data.files import nearest
from repeng.data.paths import WANTED, steerable
from repeng.data.schema import refuse_unknown
from repeng.data.trust import check_followed, own_config, say_model
from repeng.data.words import LINE, name_of, read_words
from repeng.measures import MEASURES
from repeng.serve.limits import Limits
from repeng.serve.names import named_paths
from repeng.train.recipe import Recipe

KEY_VARIABLE = "REPENG_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EXPORTS = ("lora", "dial", "merged", "gguf")
COMMANDS = ("train", *MEASURES, "export", "serve")
TRAIN_USAGE = "repeng train [--config NAME_OR_FILE ...] [--KEY VALUE ...] [FLAGS OF accelerate launch]"


class Parser(argparse.ArgumentParser):
    """Its errors are sentences, without a screen of usage above them."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help says what is taken")


@_command.command()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line: exits with a sentence on bad input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv and argv[0] not in (*COMMANDS, "-h", "--help"):
            raise ValueError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}; give {', '.join(COMMANDS)}")
        if argv[:1] == ["train"]:
            train(argv[1:])
        elif argv[:1] == ["export"]:
            export(argv)
        elif argv[:1] == ["serve"]:
            serve(argv)
        elif argv and argv[0] in MEASURES:
            measure(argv)
        else:
            make_parser().parse_args(argv)
    except BrokenPipeError:
        raise  # nobody reads on
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands, with every key as text."""
    parser = Parser(prog="repeng", description="Steer language models from the inside.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    helps = {
        "evaluate": "what an adapter or a vector does and what it costs, beside baselines",
        "calibrate": "make c = ±1 spend a stated budget, and store that",
    }
    for name, kind in MEASURES.items():
        command = commands.add_parser(name, help=helps[name], description=helps[name], allow_abbrev=False)
        command.add_argument("path", type=Path, metavar="PATH", help="folder of an adapter, or file of a vector")
        command.add_argument(
            "--config",
            nargs="+",
            metavar="NAME_OR_FILE",
            help="YAML files or names of configurations; by default PATH/config.yaml, which training writes. "
            "Keys of training in them are left aside.",
        )
        add_keys(command, [kind], "keys of this command")
        add_keys(command, [TaskArguments], "keys of the task: which model, behaviour and data")
    exporting = commands.add_parser(
        "export",
        help="write an adapter or a vector in a form that other software reads",
        description="lora: a plain PEFT LoRA for each coefficient. dial: LoRAs whose scales follow one coefficient. "
        "merged: a whole model at one coefficient; as an --output that ends in .gguf a copy of the base's GGUF file. "
        "gguf: for llama.cpp; of an adapter the dial, or with --coefficients a LoRA for each; of a vector or of "
        "biases, which must leave out layer 0, a control vector, by default in a file named "
        "NAME-MODEL-add-residual-layersFIRST-LAST.gguf. Nothing is written over.",
        allow_abbrev=False,
    )
    exporting.add_argument("path", type=Path, metavar="PATH", help="folder of an adapter, or file of a vector")
    exporting.add_argument("--to", choices=EXPORTS, required=True)
    exporting.add_argument(
        "--coefficients",
        nargs="+",
        type=_finite,
        metavar="C",
        help="of lora and merged, where the default is 1, and of an adapter in gguf, where without them it is a dial",
    )
    exporting.add_argument("--output", type=Path, help="where to; by default beside PATH, named after --to")
    exporting.add_argument(
        "--model_name_or_path", help="the base; by default as PATH/config.yaml or adapter_config.json says"
    )
    exporting.add_argument("--gguf_file", help="name of a GGUF file in that folder or on the hub")
    serving = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server with a coefficient for each request",
        description='OpenAI\'s chat completions and completions, with "steer": {"NAME": C} in a request; what it does '
        "not name stands at 0. Requests at different coefficients share one batch. An API key is read from the "
        f"environment variable {KEY_VARIABLE}.",
        allow_abbrev=False,
    )
    serving.add_argument(
        "paths",
        nargs="+",
        metavar="[NAME=]PATH",
        help="folders of adapters and files of vectors; NAME is by default that of the folder or file",
    )
    serving.add_argument(
        "--model_name_or_path", help="the base; by default as PATH/config.yaml or adapter_config.json says"
    )
    serving.add_argument("--gguf_file", help="name of a GGUF file in that folder or on the hub")
    serving.add_argument("--host", default="127.0.0.1", help="any but a loopback address needs an API key")
    serving.add_argument("--port", type=int, default=8000, help="0 takes a free one. Default: 8000")
    for one in fields(Limits):
        told = "" if one.default is None else f". Default: {one.default:g}"
        kind = float if isinstance(one.default, float) else int
        serving.add_argument(f"--{one.name}", type=kind, default=one.default, help=one.metadata["help"] + told)
    serving.add_argument("--use_cpu", action="store_true", help="leave a GPU alone")
    training = commands.add_parser(
        "train",
        help="train an adapter",
        usage=TRAIN_USAGE,
        allow_abbrev=False,
        description="Train an adapter, save it, and print what it does. Every key of transformers.TrainingArguments "
        "and every flag of `accelerate launch` is taken as well.",
        epilog=f"configurations in the package: {', '.join(shipped_configs())}",
    )
    training.add_argument(
        "--config",
        nargs="+",
        metavar="NAME_OR_FILE",
        help="YAML files or names of configurations; later ones override earlier ones",
    )
    add_keys(training, [TaskArguments], "keys of the task: which model, behaviour and data")
    add_keys(training, [Recipe], "keys of the training")
    return parser


def train(argv: list[str]) -> None:
    """Check the configurations, as far as nothing slow need be imported, then launch."""
    if {"-h", "--help"} & set(argv):
        make_parser().parse_args(["train", "--help"])
    configs, _ = split_configs(argv)
    read_configs(configs or [], hints_for([TaskArguments, Recipe]), aside=lambda name: True)
    from repeng.train.launch import launch

    launch(argv)


def export(argv: list[str]) -> None:
    """Check what was asked for, then write."""
    options = _parsed(_path_first(argv))
    steerable(str(options.path))
    is_vector = options.path.is_file()
    if is_vector and options.to != "gguf":
        raise ValueError(
            f"{options.path} is a file, so a vector, which adds to activations and not to weights: use --to gguf. "
            "An adapter is a folder"
        )
    if options.coefficients and (is_vector or options.to == "dial"):
        served = "control vector" if is_vector else "dial"
        raise ValueError(f"--coefficients are for lora, merged and gguf of an adapter; a {served} serves all of them")
    if options.to == "merged" and options.coefficients and len(options.coefficients) != 1:
        raise ValueError(f"a merged model stands at one coefficient; got {options.coefficients}")
    if options.gguf_file and not options.model_name_or_path:
        raise ValueError(f"--gguf_file {options.gguf_file} needs --model_name_or_path: the folder or hub id it is in")
    from repeng.commands import export as write

    write(
        options.path,
        options.to,
        options.coefficients,
        options.output,
        options.model_name_or_path,
        options.gguf_file,
    )


def serve(argv: list[str]) -> None:
    """Check what was asked for, then serve."""
    options = _parsed(argv)
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port should be 0 to {2**16 - 1}; got {options.port}")
    paths = named_paths(options.paths)
    limits = Limits(**{one.name: getattr(options, one.name) for one in fields(Limits)})
    if options.gguf_file and not options.model_name_or_path:
        raise ValueError(f"--gguf_file {options.gguf_file} needs --model_name_or_path: the folder or hub id it is in")
    api_key = os.environ.get(KEY_VARIABLE) or None
    if options.host not in LOOPBACK and api_key is None:
        raise ValueError(
            f"--host {options.host} lets other machines in: set the environment variable {KEY_VARIABLE}, whose value "
            "requests must send as API key"
        )
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if not find_spec(name)]
    if missing:
        raise ImportError(f"serving needs {', '.join(missing)}: pip install 'repeng[serve]'")
    from repeng.commands import serve as start

    start(
        paths,
        options.model_name_or_path,
        options.gguf_file,
        host=options.host,
        port=options.port,
        api_key=api_key,
        use_cpu=options.use_cpu,
        limits=limits,
    )


def _parsed(argv: list[str]) -> argparse.Namespace:
    """What a command line says; raises ValueError, with the nearest key, for a key that there is not."""
    options, unknown = make_parser().parse_known_args(argv)
    if unknown:
        refuse_unknown([name_of(unknown[0]) if unknown[0].startswith("--") else unknown[0]], vars(options), LINE)
    return options


def _finite(word: str) -> float:
    if not math.isfinite(float(word)):
        raise argparse.ArgumentTypeError(f"should be a finite number; got {word!r}")
    return float(word)


def _path_first(argv: list[str]) -> list[str]:
    """The words after a command with PATH in front, where options with several values cannot take it for theirs."""
    words = argv[1:]
    if words and words[0].startswith("-") and not words[-1].startswith("-"):
        words = [words[-1], *words[:-1]]
    return [*argv[:1], *words]


def measure(argv: list[str]) -> None:
    """Evaluate or calibrate what lies at a path."""
    if {"-h", "--help"} & set(argv):
        make_parser().parse_args([argv[0], "--help"])
    command, *words = _path_first(argv)
    if not words or words[0].startswith("-"):
        raise ValueError(f"repeng {command} needs a PATH; {WANTED}")
    kinds = (MEASURES[command], TaskArguments)
    hints = hints_for(kinds)
    configs, rest = split_configs(words[1:])
    on_the_line = read_words(rest, hints, defaults_of(kinds))
    path = steerable(words[0])
    own = configs is None
    if configs is None:
        found = own_config(path)
        configs = [] if found is None else [str(found)]
    in_files = read_configs(configs, hints, aside=lambda name: True)
    if own and configs:
        followed = {name: value for name, value in in_files.items() if name not in on_the_line}
        check_followed(followed, Path(configs[0]))
        say_model(followed, Path(configs[0]))
    arguments, task_args = built(kinds, in_files | on_the_line)
    if on_the_line.get("bf16") and not task_args.load_in_4bit:
        raise ValueError("bf16 has no effect without load_in_4bit: the base keeps its own precision; leave it out")

    from repeng.commands import COMMANDS as DO
    from repeng.train.arguments import SteeringArguments

    read_configs(configs, hints, aside=names_of([SteeringArguments]).__contains__)  # unknown keys
    DO[command](path, task_args, **vars(arguments))


if __name__ == "__main__":
    main()
