"""`repeng evaluate PATH` and `repeng calibrate PATH`, for the folder of an adapter or the file of a vector."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from peft import PeftModel

from repeng import tiny
from repeng.calibrate import KLBudget, calibrate, kl_spender, store
from repeng.control import steer
from repeng.eval import ADAPTER_COEFFICIENTS, Dial
from repeng.eval_report import ARMS
from repeng.report.tables import print_doses, print_table
from repeng.train.arguments import SteeringArguments, parse_arguments
from repeng.train.build import Run, build
from repeng.train.report import (
    VECTOR_COEFFICIENTS,
    behaviour,
    check_writable,
    compare,
    save_adapter,
    shortcomings,
    verdict,
    write_report,
)
from repeng.vector import SteeringVector

OWN = "this dial"
LARGEST = 4.0  # coefficient of an adapter, which is trained at 1: far beyond, effects fade while costs may not
TOLERANCE = 0.1
USAGE = """Keys of train.py may follow, such as --questions_file, --pairs_file, --positive and --negative; the folder
of an adapter that train.py wrote says them all. For a vector, give --config or the keys that name model and pairs."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: exits with a sentence on bad input."""
    options, rest = parse(argv)
    try:
        args = parse_arguments(rest, options.config)
        run = build(args, tiny.task(args), training=False)
        options.run(options, args, run)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="repeng", description=__doc__, epilog=USAGE)
    commands = parser.add_subparsers(required=True)
    measure = commands.add_parser("evaluate", help="what it does and what it costs, beside baselines", epilog=USAGE)
    measure.set_defaults(run=run_evaluate)
    measure.add_argument("--output", type=Path, help="folder of the report; default PATH/evaluation, or PATH-report")
    scale = commands.add_parser("calibrate", help="make c = ±1 spend a stated budget, and store that", epilog=USAGE)
    scale.set_defaults(run=run_calibrate)
    scale.add_argument("--nats", type=float, default=KLBudget.nats, help="KL to the base that a token may have")
    scale.add_argument("--sequences", type=int, default=KLBudget.sequences, help="continuations to draw")
    scale.add_argument("--percentile", type=float, default=KLBudget.percentile, help="of the tokens' KL")
    for command in (measure, scale):
        command.add_argument("path", type=Path, metavar="PATH", help="folder of an adapter, or file of a vector")
        command.add_argument(
            "--config", type=Path, help="YAML file with keys of train.py; by default PATH/config.yaml"
        )
    options, rest = parser.parse_known_args(argv)
    if not options.path.exists():
        sys.exit(f"error: there is no adapter and no vector at {str(options.path)!r}")
    if options.config is None and (options.path / "config.yaml").is_file():
        options.config = options.path / "config.yaml"
    return options, rest


def load(path: Path, args: SteeringArguments, run: Run) -> tuple[Dial, Sequence[float], SteeringVector | None]:
    """The dial at `path` on the run's model, where to measure it, and the vector if it is one."""
    if path.is_dir():
        run.model = PeftModel.from_pretrained(run.model, path)
        return partial(steer, run.model), ADAPTER_COEFFICIENTS, None
    vector = SteeringVector.load_gguf(path) if path.suffix == ".gguf" else SteeringVector.load(path)
    vector.check(run.model)
    coefficients = ADAPTER_COEFFICIENTS if "calibration" in vector.metadata else VECTOR_COEFFICIENTS
    return partial(steer, run.model, vector=vector), coefficients, vector


def run_evaluate(options: argparse.Namespace, args: SteeringArguments, run: Run) -> None:
    """Print the table and the verdict, and write the report."""
    path = options.path
    folder = options.output or (path / "evaluation" if path.is_dir() else path.with_name(f"{path.stem}-report"))
    check_writable(folder)
    dial, coefficients, _ = load(path, args, run)
    reports = compare(run, dial, coefficients, OWN)
    print_doses(reports[OWN], f"{path}: {behaviour(args)}")
    print_table(reports, OWN)
    write_report(reports, folder, title=f"{path.name}: {behaviour(args)}", name=OWN)
    print(verdict(reports, OWN))
    print(f"report: {folder / 'report.html'}")
    failed = shortcomings(reports, OWN)
    if failed and args.require_steering:
        sys.exit("error: this does not steer: " + "; ".join(failed))


def run_calibrate(options: argparse.Namespace, args: SteeringArguments, run: Run) -> None:
    """Find and store the calibration, and check it on other prompts of the training set."""
    place = options.path if options.path.suffix != ".gguf" else options.path.with_suffix(".safetensors")
    if place != options.path and place.exists():
        raise ValueError(f"a GGUF file holds no calibration, and {place} exists: move it, or calibrate that file")
    budget = KLBudget(options.nats, options.percentile, sequences=options.sequences)
    prompts = training_prompts(run)
    if len(prompts) < 2:
        raise ValueError(
            f"the pairs have {len(prompts)} prompt to continue; a calibration and its check need two or more"
        )
    dial, _, vector = load(options.path, args, run)
    chosen, checked = prompts[::2], prompts[1::2]
    found = calibrate(run.model, run.tokenizer, dial, chosen, budget, largest=LARGEST if vector is None else 8.0)
    if vector is None:
        store(run.model, found)
        save_adapter(run.model, place)
    else:
        vector = vector.calibrated(found.to_dict())
        vector.save(place)
        dial = partial(steer, run.model, vector=vector)
    spend = kl_spender(run.model, run.tokenizer, dial, checked, budget)
    for arm, sign in ARMS:
        there = budget.nats * spend(float(sign))
        print(
            f"c = {sign:+d} is now {getattr(found, arm):.3g} of the former unit: on {len(checked)} other prompts, "
            f"percentile {budget.percentile:g} of the KL per token is {there:.3g} nats, of {budget.nats:g}"
        )
        if found.spent[arm] < 1 - TOLERANCE:
            print(
                f"  this arm does not spend the whole budget at any coefficient that was tried: {found.spent[arm]:.0%}"
            )
    print(f"stored: {place}")


def training_prompts(run: Run) -> list[str]:
    """What is continued: the persona-free ends of the pairs; with a chat template or without such ends, both sides."""
    if run.tokenizer.chat_template or not all(pair.suffix for pair in run.pairs):
        texts = [side for pair in run.pairs for side in (pair.chosen, pair.rejected)]
    else:
        texts = [pair.suffix for pair in run.pairs]
    return list(dict.fromkeys(texts))


if __name__ == "__main__":
    main()
