"""The command line: `repeng train`, `repeng evaluate|calibrate|export PATH` and `repeng serve PATH …`.

The command line is parsed, and the names in it are checked, before any slow module is imported.
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
    """A parser that raises its errors as ValueError, and prints no usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists what is allowed")


@_command.command()
def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line. Bad input exits with an error message of one sentence."""
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
        raise  # the reader of the output has closed the pipe; `_command.command` handles this
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. It reads the values of keys as text."""
    parser = Parser(prog="repeng", description="Steer language models from the inside.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    helps = {
        "evaluate": "measure the effect and the costs of an adapter or a vector, and compare them with baselines",
        "calibrate": "scale an adapter or a vector so that c = ±1 spends a stated budget, and store the scale",
    }
    for name, kind in MEASURES.items():
        command = commands.add_parser(name, help=helps[name], description=helps[name], allow_abbrev=False)
        command.add_argument("path", type=Path, metavar="PATH", help="folder of an adapter, or file of a vector")
        command.add_argument(
            "--config",
            nargs="+",
            metavar="NAME_OR_FILE",
            help="YAML files or names of configurations; by default PATH/config.yaml, which training writes. "
            "Keys of the training in them are ignored.",
        )
        add_keys(command, [kind], "keys of this command")
        add_keys(command, [TaskArguments], "keys of the task: model, behaviour and data")
    exporting = commands.add_parser(
        "export",
        help="write an adapter or a vector in a format for other software",
        description="lora: a plain PEFT LoRA per coefficient. dial: LoRAs whose scales depend on one coefficient. "
        "merged: a whole model at one coefficient; if --output ends in .gguf, a steered copy of the base's GGUF file. "
        "gguf: files for llama.cpp. For an adapter these are a dial, or a LoRA per coefficient with --coefficients. "
        "For a vector or an adapter of biases, which must leave out layer 0, it is a control vector, by default in "
        "the file NAME-MODEL-add-residual-layersFIRST-LAST.gguf. Existing files are never overwritten.",
        allow_abbrev=False,
    )
    exporting.add_argument("path", type=Path, metavar="PATH", help="folder of an adapter, or file of a vector")
    exporting.add_argument("--to", choices=EXPORTS, required=True)
    exporting.add_argument(
        "--coefficients",
        nargs="+",
        type=_finite,
        metavar="C",
        help="coefficients for lora and merged (default: 1), and for gguf of an adapter (default: write a dial)",
    )
    exporting.add_argument("--output", type=Path, help="destination; by default beside PATH, with --to in its name")
    exporting.add_argument(
        "--model_name_or_path", help="the base model; by default the one in PATH/config.yaml or adapter_config.json"
    )
    exporting.add_argument("--gguf_file", help="name of a GGUF file in the base model's folder or hub repository")
    serving = commands.add_parser(
        "serve",
        help="run an OpenAI-compatible server with a coefficient per request",
        description='Serve OpenAI\'s chat completions and completions. A request sets coefficients with "steer": '
        '{"NAME": C}; adapters and vectors that it does not name are at 0. Requests with different coefficients share '
        f"one batch. The API key is read from the environment variable {KEY_VARIABLE}.",
        allow_abbrev=False,
    )
    serving.add_argument(
        "paths",
        nargs="+",
        metavar="[NAME=]PATH",
        help="folders of adapters and files of vectors; NAME is by default the name of the folder or file",
    )
    serving.add_argument(
        "--model_name_or_path", help="the base model; by default the one in PATH/config.yaml or adapter_config.json"
    )
    serving.add_argument("--gguf_file", help="name of a GGUF file in the base model's folder or hub repository")
    serving.add_argument("--host", default="127.0.0.1", help="address; any but a loopback address needs an API key")
    serving.add_argument("--port", type=int, default=8000, help="port; 0 takes a free port. Default: 8000")
    for one in fields(Limits):
        told = "" if one.default is None else f". Default: {one.default:g}"
        kind = float if isinstance(one.default, float) else int
        serving.add_argument(f"--{one.name}", type=kind, default=one.default, help=one.metadata["help"] + told)
    serving.add_argument("--use_cpu", action="store_true", help="run on the CPU even if there is a GPU")
    training = commands.add_parser(
        "train",
        help="train an adapter",
        usage=TRAIN_USAGE,
        allow_abbrev=False,
        description="Train an adapter, save it, and print its effect. Every key of transformers.TrainingArguments "
        "and every flag of `accelerate launch` is accepted too.",
        epilog=f"configurations in the package: {', '.join(shipped_configs())}",
    )
    training.add_argument(
        "--config",
        nargs="+",
        metavar="NAME_OR_FILE",
        help="YAML files or names of configurations; later ones override earlier ones",
    )
    add_keys(training, [TaskArguments], "keys of the task: model, behaviour and data")
    add_keys(training, [Recipe], "keys of the training")
    return parser


def train(argv: list[str]) -> None:
    """Check the configurations as far as possible without slow imports, then launch the training."""
    if {"-h", "--help"} & set(argv):
        make_parser().parse_args(["train", "--help"])
    configs, _ = split_configs(argv)
    read_configs(configs or [], hints_for([TaskArguments, Recipe]), aside=lambda name: True)
    from repeng.train.launch import launch

    launch(argv)


def export(argv: list[str]) -> None:
    """Check the options of `repeng export`, then write the export."""
    options = _parsed(_path_first(argv))
    steerable(str(options.path))
    is_vector = options.path.is_file()
    if is_vector and options.to != "gguf":
        raise ValueError(
            f"{options.path} is the file of a vector, which changes activations, not weights: use --to gguf. For an "
            "adapter give its folder"
        )
    if options.coefficients and (is_vector or options.to == "dial"):
        served = "control vector" if is_vector else "dial"
        raise ValueError(f"--coefficients are for lora, merged and gguf of an adapter; a {served} serves all of them")
    if options.to == "merged" and options.coefficients and len(options.coefficients) != 1:
        raise ValueError(f"a merged model is fixed at one coefficient; got {options.coefficients}")
    if options.gguf_file and not options.model_name_or_path:
        raise ValueError(
            f"--gguf_file {options.gguf_file} needs --model_name_or_path, the folder or hub id with the file"
        )
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
    """Check the options of `repeng serve`, then serve."""
    options = _parsed(argv)
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port should be 0 to {2**16 - 1}; got {options.port}")
    paths = named_paths(options.paths)
    limits = Limits(**{one.name: getattr(options, one.name) for one in fields(Limits)})
    if options.gguf_file and not options.model_name_or_path:
        raise ValueError(
            f"--gguf_file {options.gguf_file} needs --model_name_or_path, the folder or hub id with the file"
        )
    api_key = os.environ.get(KEY_VARIABLE) or None
    if options.host not in LOOPBACK and api_key is None:
        raise ValueError(
            f"--host {options.host} admits other machines: set an API key for the requests in the environment "
            f"variable {KEY_VARIABLE}"
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
    """Parse a command line. An unknown key raises a ValueError that names the nearest key."""
    options, unknown = make_parser().parse_known_args(argv)
    if unknown:
        refuse_unknown([name_of(unknown[0]) if unknown[0].startswith("--") else unknown[0]], vars(options), LINE)
    return options


def _finite(word: str) -> float:
    if not math.isfinite(float(word)):
        raise argparse.ArgumentTypeError(f"should be a finite number; got {word!r}")
    return float(word)


def _path_first(argv: list[str]) -> list[str]:
    """The words with PATH moved to directly after the command.

    At the end, an option with several values could take the path as one of its values.
    """
    words = argv[1:]
    if words and words[0].startswith("-") and not words[-1].startswith("-"):
        words = [words[-1], *words[:-1]]
    return [*argv[:1], *words]


def measure(argv: list[str]) -> None:
    """Check the options of `repeng evaluate` or `repeng calibrate`, then run the command."""
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
        raise ValueError("bf16 has no effect without load_in_4bit: the base keeps its own precision; leave bf16 out")

    from repeng.commands import COMMANDS as DO
    from repeng.train.arguments import SteeringArguments

    read_configs(configs, hints, aside=names_of([SteeringArguments]).__contains__)  # raises for unknown keys
    DO[command](path, task_args, **vars(arguments))


if __name__ == "__main__":
    main()
