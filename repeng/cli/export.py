"""`repeng export`: write an adapter or a vector in a format for other software."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from repeng.cli.parsing import Commands, add_base, add_json, add_path, check_base, finite, parsed, path_first, tell
from repeng.data.paths import named_after, steerable

EXPORTS = ("lora", "dial", "merged", "gguf")


def add(commands: Commands) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "export",
        help="write an adapter or a vector in a format for other software",
        description="lora: a plain PEFT LoRA per coefficient. dial: LoRAs whose scales depend on one coefficient. "
        "merged: a whole model at one coefficient; if --output ends in .gguf, a steered copy of the base's GGUF file. "
        "gguf: files for llama.cpp. For an adapter these are a dial, or a LoRA per coefficient with --coefficients. "
        "For a vector or an adapter of biases, which must leave out layer 0, it is a control vector, by default in "
        "the file NAME-MODEL-add-residual-layersFIRST-LAST.gguf. Existing files are never overwritten.",
        allow_abbrev=False,
    )
    add_path(command)
    command.add_argument("--to", choices=EXPORTS, required=True)
    command.add_argument(
        "--coefficients",
        nargs="+",
        type=finite,
        metavar="C",
        help="coefficients for lora and merged (default: 1), and for gguf of an adapter (default: write a dial)",
    )
    command.add_argument("--output", type=Path, help="destination; by default beside PATH, with --to in its name")
    add_base(command, "by default the one in PATH/config.yaml or adapter_config.json")
    add_json(command)


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Check the options, then write the export."""
    options = parsed(parser, [argv[0], *path_first(argv[1:])])
    check_base(options)
    beside, options.path = named_after(str(options.path)), steerable(str(options.path))
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
    from repeng.commands.export import export

    named = options.model_name_or_path, options.gguf_file
    tell(options.json, lambda: export(options.path, beside, options.to, options.coefficients, options.output, *named))
