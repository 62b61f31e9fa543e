"""What a run leaves behind: the adapter, a comparison with baselines in several forms, a model card."""

import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments

from repeng.control import steer
from repeng.data import ContrastPair
from repeng.eval import ADAPTER_COEFFICIENTS, Dial, evaluate, prompt_dial
from repeng.eval_report import ARMS, EvalReport, bootstrap
from repeng.extract import extract
from repeng.questions import Question
from repeng.report import figures
from repeng.report.page import write_page
from repeng.report.tables import ratio, write_csv
from repeng.sharded import is_sharded
from repeng.sites import RESIDUAL, decoder_layers
from repeng.train.arguments import SteeringArguments
from repeng.train.build import Run
from repeng.train.checkpoints import check_saved
from repeng.train.sharding import adapter_state
from repeng.vector import SteeringVector

VECTOR_COEFFICIENTS = tuple(sign * size for sign in (-1, 1) for size in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8))
MAX_VECTOR_LAYERS = 8
SAMPLES = 8
WRONG_WAY = 0.05  # share of items that may move against an arm
ADAPTER, PROMPTS, MEAN_DIFF, RANDOM = "this adapter", "persona prompts", "mean difference", "random direction"


def save_adapter(model: PeftModel, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write the adapter whole or not at all: beside its place, read back and compared, then moved.

    Args:
        model: the PEFT model.
        folder: where to.
        state: what `adapter_state` gave, which all processes of a sharded model must have called.

    Raises:
        OSError: the folder cannot be written, or what was written differs from the adapter.
    """
    folder = Path(folder)
    state = adapter_state(model) if state is None else state
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        model.save_pretrained(temporary, state_dict=state)
        check_saved(model, temporary, state)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(Path(temporary) / name, folder / name)


def compare(
    run: Run, dial: Dial | None = None, coefficients: Sequence[float] = ADAPTER_COEFFICIENTS, name: str = ADAPTER
) -> dict[str, EvalReport]:
    """The run's adapter and its baselines on the run's questions: persona prompts, mean difference, random direction.

    The mean difference, like the adapter, sees training pairs only; its layer is the one with the largest range on the
    questions themselves, which favours this baseline.

    Args:
        run: model and data.
        dial: another method to compare, instead of the adapter.
        coefficients: where it is measured.
        name: what it is called in the reports.
    """
    model, tokenizer = run.model, run.tokenizer
    adapted = isinstance(model, PeftModel)
    depth = len(decoder_layers(model))
    step = max(1, -(-depth // MAX_VECTOR_LAYERS))
    bar = tqdm(total=3 + len(range(0, depth, step)), desc="evaluation", leave=False)

    def measure(dial, coefficients, samples: Sequence[Question] = ()) -> EvalReport:
        report = evaluate(
            model, tokenizer, run.questions, dial, coefficients, neutral_texts=run.neutral_texts,
            sample_prompts=samples, accepts=run.accepts,
        )  # fmt: skip
        bar.update()
        return report

    samples = sample_questions(run)
    reports = {name: measure(dial or (lambda c: steer(model, c)), coefficients, samples)}
    with steer(model, 0.0) if adapted else nullcontext():
        if run.personas:
            reports[PROMPTS] = measure(prompt_dial(*run.personas), (-1, 1), samples)
        vectors = mean_differences(model, tokenizer, run.pairs, range(0, depth, step))
        by_layer = {
            layer: measure(lambda c, v=vector: steer(model, c, vector=v), VECTOR_COEFFICIENTS)
            for layer, vector in vectors.items()
        }
        best = max(by_layer, key=lambda layer: by_layer[layer].range)
        reports[f"{MEAN_DIFF} (layer {best})"] = by_layer[best]
        noise = vectors[best].random_like(seed=0)
        reports[RANDOM] = measure(lambda c: steer(model, c, vector=noise), VECTOR_COEFFICIENTS)
    bar.close()
    return reports


def sample_questions(run: Run) -> list[Question]:
    """Some of the target questions, evenly spaced."""
    asked = [q for q in run.questions if q.cluster == "target"]
    return asked[:: max(1, len(asked) // SAMPLES)][:SAMPLES]


def mean_differences(
    model: PeftModel, tokenizer, pairs: Sequence[ContrastPair], layers: Sequence[int]
) -> dict[int, SteeringVector]:
    """One mean-difference vector on the residual stream for each layer."""
    together = extract(model, tokenizer, pairs, sites=[RESIDUAL], layers=list(layers))
    return {layer: together.select(layers=[layer]) for layer in together.layers}


def find(reports: dict[str, EvalReport], name: str) -> EvalReport | None:
    """The report of the row whose name begins with `name`."""
    return next((report for key, report in reports.items() if key.startswith(name)), None)


def verdict(reports: dict[str, EvalReport], name: str = ADAPTER) -> str:
    """One sentence on how far a method moves the behaviour inside the budget, and against what."""
    own = reports[name]
    against = []
    for baseline in (MEAN_DIFF, PROMPTS, RANDOM):
        other = find(reports, baseline)
        if other is not None and other.range > 0:
            times, (low, high) = ratio([own], [other])
            against.append(f"{times:.2f} x {baseline} ({other.range:.2f}; 95 % interval {low:.2f} to {high:.2f})")
    gains = ", ".join(f"{arm} {own.arm(sign)[0]:.2f}" for arm, sign in ARMS)
    rest = "; ".join(against) or "no baseline moved anything"
    return f"range inside the budget: {own.range:.2f} nats ({gains}); {rest}"


def shortcomings(reports: dict[str, EvalReport], name: str = ADAPTER) -> list[str]:
    """Why a method cannot be said to steer; empty if it does.

    Each arm must gain more inside the budget than a random direction of the mean difference's length does, with the
    lower end of the paired 95 % interval above 0, and at most 5 % of the items may move against it.
    """
    own, noise = reports[name], reports[RANDOM]
    found = []
    for arm, sign in ARMS:
        low, _ = bootstrap([own, noise], lambda a, b, s=sign: a.arm(s)[0] - b.arm(s)[0], n=300)
        if not low > 0:
            found.append(
                f"the {arm} arm gains {own.arm(sign)[0]:.2f} nats and a random direction {noise.arm(sign)[0]:.2f}: "
                f"the 95 % interval of the difference begins at {low:.2f}"
            )
        if own.against(sign) > WRONG_WAY:
            found.append(
                f"{own.against(sign):.1%} of the items move against the {arm} arm; at most {WRONG_WAY:.0%} may"
            )
    return found


def finish(args: SteeringArguments, run: Run, trainer: Trainer) -> dict[str, EvalReport] | None:
    """Save the adapter, compare it, write the report; all processes must call, and the first one gets the reports."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    first, sharded, state = trainer.is_world_process_zero(), is_sharded(model), adapter_state(model)
    if first:
        save_adapter(model, args.output_dir, state)
        config = yaml.safe_dump(resolved(args), sort_keys=False)
        (Path(args.output_dir) / "config.yaml").write_text(config, encoding="utf-8")
    reports = compare(run) if sharded else None  # what the processes hold together they can only run together
    # The others end here. One that left its group behind could crash in leaving, and take the first one along.
    trainer.accelerator.end_training()
    if not first:
        return None
    reports = reports or compare(run)
    write_folder(args, run, trainer, reports)
    return reports


def write_folder(args: SteeringArguments, run: Run, trainer: Trainer, reports: dict[str, EvalReport]) -> None:
    """The training log, the report as JSON, CSV, PNG and HTML, README."""
    folder = Path(args.output_dir)
    log = [json.dumps(row) for row in trainer.state.log_history]
    (folder / "training_log.jsonl").write_text("\n".join(log) + "\n", encoding="utf-8")
    curve = figures.learning_curve(trainer.state.log_history) if figures.available() else None
    if curve is not None:
        curve.savefig(folder / "learning_curve.png", dpi=110)
    packages = ("repeng", "torch", "transformers", "peft", "accelerate")
    about = {
        "seed": args.seed,
        "optimizer_steps": trainer.state.global_step,
        "training_pairs": len(run.pairs),
        "adapted": sorted(name for name in trainer.model.base_model.targeted_module_names),
        "trainable_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
    }
    write_report(reports, folder, title=f"Steering adapter: {behaviour(args)}", about=about)
    (folder / "README.md").write_text(model_card(args, verdict(reports), figures.available()), encoding="utf-8")


def write_report(
    reports: dict[str, EvalReport], folder: Path, *, title: str, name: str = ADAPTER, about: dict | None = None
) -> None:
    """report.json, report.csv, report.html and, with matplotlib, report.png; `about` goes into the first."""
    sentence = verdict(reports, name)
    rows = {key: report.to_dict() for key, report in reports.items()}
    result = {"verdict": sentence, "shortcomings": shortcomings(reports, name), **(about or {}), "rows": rows}
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_csv(reports, folder / "report.csv")
    if figures.available():
        figures.dose_response(reports, name).savefig(folder / "report.png", dpi=130)
    else:
        print("report.png was not drawn: matplotlib is not installed (pip install 'repeng[plot]')")
    write_page(reports, folder / "report.html", title=title, verdict=f"{sentence}.", own=name)


def behaviour(args: SteeringArguments) -> str:
    """What is dialled, in a few words."""
    return f"{args.positive} (+1) / {args.negative} (−1)" if args.positive else f"the pairs of {args.pairs_file}"


class Defaults(SteeringArguments):
    """The default arguments, without setting up devices: that would reset those of the run, and its processes."""

    _setup_devices, _n_gpu = torch.device("cpu"), 0


def resolved(args: SteeringArguments) -> dict:
    """The arguments that `--config` takes: all of this package's, and others where they differ from the defaults."""
    own = {f.name for f in fields(SteeringArguments)} - {f.name for f in fields(TrainingArguments)}
    default = Defaults(positive="a", negative="b").to_dict()
    given = args.to_dict()
    chosen = {
        f.name: given[f.name]
        for f in fields(args)
        if f.init and (f.name in own or given[f.name] != default[f.name]) and not f.name.endswith("_token")
    }
    return {name: value for name, value in chosen.items() if value is not None}


def model_card(args: SteeringArguments, sentence: str, drawn: bool) -> str:
    """The README of the adapter: what it does, and how to load it."""
    tiny = args.model_name_or_path == "tiny"
    load = "base, tokenizer = tiny.load()" if tiny else (
        f'base = AutoModelForCausalLM.from_pretrained("{args.model_name_or_path}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{args.model_name_or_path}")'
    )  # fmt: skip
    imports = "from repeng import steer, tiny" if tiny else (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\nfrom repeng import steer"
    )  # fmt: skip
    picture = "![dose and response](report.png)\n" if drawn else ""
    return f"""---
library_name: peft
tags: [steering, repeng]
---
# Steering adapter: {behaviour(args)}

Base model: `{args.model_name_or_path}`. {sentence}.

{picture}
```python
from peft import PeftModel
{imports}

{load}
model = PeftModel.from_pretrained(base, "{args.output_dir}")
prompt = tokenizer("the lime is", return_tensors="pt")
for coefficient in (-1.0, 0.0, 1.0):
    with steer(model, coefficient):
        print(coefficient, tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))
```

`report.html` shows what it does and what it costs. `config.yaml` repeats the run:
`accelerate launch train.py --config config.yaml`.
"""


def check_writable(folder: str | Path) -> None:
    """Raise OSError, before any work, if `folder` cannot be made or written."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryDirectory(dir=folder, prefix=".probe-").cleanup()
