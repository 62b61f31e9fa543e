"""What a run leaves behind: the adapter, a comparison with baselines as table, JSON and picture, a model card."""

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments

from repeng.control import steer
from repeng.data import ContrastPair
from repeng.eval import ARMS, EvalReport, evaluate, prompt_dial
from repeng.extract import extract
from repeng.sites import RESIDUAL, decoder_layers
from repeng.train.arguments import SteeringArguments
from repeng.train.build import Run
from repeng.vector import SteeringVector

ADAPTER_COEFFICIENTS = tuple(sign * step / 4 for sign in (-1, 1) for step in range(1, 9))
VECTOR_COEFFICIENTS = tuple(sign * size for sign in (-1, 1) for size in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8))
MAX_VECTOR_LAYERS = 8
ADAPTER, PROMPTS, MEAN_DIFF, RANDOM = "this adapter", "persona prompts", "mean difference", "random direction"


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the adapter whole or not at all: beside its place, read back and compared, then moved.

    Raises:
        OSError: the folder cannot be written, or what was written differs from the adapter.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        model.save_pretrained(temporary)
        written = Path(temporary) / "adapter_model.safetensors"
        state = {key.removesuffix(".default"): tensor for key, tensor in model.state_dict().items()}
        with safe_open(written, framework="pt") as file:
            for key in file.keys():
                if not torch.equal(file.get_tensor(key), state[key].cpu()):
                    raise OSError(f"{written} was not written whole: {key} differs from the adapter")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(Path(temporary) / name, folder / name)


def compare(run: Run) -> dict[str, EvalReport]:
    """The adapter and its baselines on the run's questions: base, persona prompts, mean difference, random direction.

    The mean difference, like the adapter, sees training pairs only; its layer is the one with the largest range on the
    questions themselves, which favours this baseline.
    """
    model, tokenizer = run.model, run.tokenizer
    depth = len(decoder_layers(model))
    step = max(1, -(-depth // MAX_VECTOR_LAYERS))
    bar = tqdm(total=3 + len(range(0, depth, step)), desc="evaluation", leave=False)

    def measure(dial, coefficients) -> EvalReport:
        report = evaluate(model, tokenizer, run.questions, dial, coefficients, neutral_texts=run.neutral_texts)
        bar.update()
        return report

    reports = {ADAPTER: measure(lambda c: steer(model, c), ADAPTER_COEFFICIENTS)}
    with steer(model, 0.0):
        if run.personas:
            reports[PROMPTS] = measure(prompt_dial(*run.personas), (-1, 1))
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


def mean_differences(
    model: PeftModel, tokenizer, pairs: Sequence[ContrastPair], layers: Sequence[int]
) -> dict[int, SteeringVector]:
    """One mean-difference vector on the residual stream for each layer."""
    together = extract(model, tokenizer, pairs, sites=[RESIDUAL], layers=list(layers))
    return {layer: together.select(layers=[layer]) for layer in together.layers}


def find(reports: dict[str, EvalReport], name: str) -> EvalReport | None:
    """The report of the row whose name begins with `name`."""
    return next((report for key, report in reports.items() if key.startswith(name)), None)


def verdict(reports: dict[str, EvalReport]) -> str:
    """One sentence on how far the adapter moves the behaviour inside the budget, and against what."""
    own = reports[ADAPTER].range
    against = []
    for name in (MEAN_DIFF, PROMPTS, RANDOM):
        other = find(reports, name)
        if other is not None and other.range > 0:
            against.append(f"{own / other.range:.2f} x {name} ({other.range:.2f})")
    gains = ", ".join(f"{name} {reports[ADAPTER].arm(sign)[0]:.2f}" for name, sign in ARMS)
    return f"range inside the budget: {own:.2f} nats ({gains}); {'; '.join(against) or 'no baseline moved anything'}"


def print_table(reports: dict[str, EvalReport]) -> None:
    """One table: log-odds at both coefficients, range, items moved the wrong way, and the worst cost at c = ±1."""
    table = Table(title="Effect and cost (vectors: c = 1 is one mean difference)")
    table.add_column("")
    for title in ("log-odds −1", "log-odds +1", "range", "wrong way", "controls logp", "neutral NLL", "answer mass"):
        table.add_column(title, justify="right")
    first = reports[ADAPTER]
    table.add_row("base", *[f"{first.mean_log_odds(0.0):.2f}"] * 2, "–", "–", *costs_text(first, (0.0,)))
    order = sorted(reports, key=lambda name: name == ADAPTER)
    for name in order:
        report = reports[name]
        wrong = "–" if report.wrong_way != report.wrong_way else f"{report.wrong_way:.1%}"
        odds = [f"{report.mean_log_odds(c):.2f}" for c in (-1.0, 1.0)]
        style = "bold" if name == ADAPTER else None
        table.add_row(name, *odds, f"{report.range:.2f}", wrong, *costs_text(report, (-1.0, 1.0)), style=style)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a log file has no edge at which to break words
    console.print(table)


def costs_text(report: EvalReport, coefficients: Sequence[float]) -> list[str]:
    """Control log-probability, neutral NLL and answer mass, each at the worst of the coefficients."""
    rows = [report.at(c) for c in coefficients]
    controls = min(report.control_logp[row].mean().item() for row in rows)
    nll = max(report.neutral_nll[row].item() for row in rows)
    mass = min(report.answer_mass[row].mean().item() for row in rows)
    return ["–" if value != value else f"{value:.3f}" for value in (controls, nll, mass)]


def plot(reports: dict[str, EvalReport], path: Path) -> bool:
    """Dose and response of target and costs over c; False, and a plain sentence, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} was not drawn: matplotlib is not installed (pip install 'repeng[plot]')")
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    effect, cost = figure.subplots(1, 2)
    for name, report in reports.items():
        inside = [(c, report.mean_log_odds(c)) for c in report.coefficients if abs(c) <= 2]
        style = {"marker": "o", "linewidth": 2.5} if name == ADAPTER else {"marker": ".", "alpha": 0.7}
        effect.plot(*zip(*inside, strict=True), label=f"{name}: range {report.range:.2f}", **style)
    own = reports[ADAPTER]
    shade_outside(effect, own)
    effect.set(xlabel="coefficient c", ylabel="log-odds of the target answer, nats", title="Target")
    effect.legend(fontsize=8)
    shade_outside(cost, own)
    for name in own.cost(0.0):
        shares = [own.cost(c)[name] / getattr(own.budget, name) for c in own.coefficients]
        cost.plot(own.coefficients, shares, marker="o", label=name.replace("_", " "))
    cost.axhline(1.0, color="black", linestyle="--", linewidth=1, label="budget")
    cost.set(xlabel="coefficient c", ylabel="cost as a share of its budget", title="Controls of this adapter")
    cost.set_ylim(-0.5, 3)
    cost.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    return True


def shade_outside(axes, report: EvalReport) -> None:
    """Grey out the coefficients at which the adapter is outside the budget."""
    for c in report.coefficients:
        if not report.inside_budget(c):
            axes.axvspan(c - 0.125, c + 0.125, color="0.88", linewidth=0)


def write_folder(args: SteeringArguments, run: Run, trainer: Trainer, reports: dict[str, EvalReport]) -> None:
    """Everything beside the adapter: resolved configuration, training log, report.json, report.png, README.md."""
    folder = Path(args.output_dir)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved(args), sort_keys=False), encoding="utf-8")
    log = [json.dumps(row) for row in trainer.state.log_history]
    (folder / "training_log.jsonl").write_text("\n".join(log) + "\n", encoding="utf-8")
    packages = ("repeng", "torch", "transformers", "peft", "accelerate")
    result = {
        "verdict": verdict(reports),
        "seed": args.seed,
        "optimizer_steps": trainer.state.global_step,
        "training_pairs": len(run.pairs),
        "adapted": sorted(name for name in trainer.model.base_model.targeted_module_names),
        "trainable_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "rows": {name: report.to_dict() for name, report in reports.items()},
    }
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    drawn = plot(reports, folder / "report.png")
    (folder / "README.md").write_text(model_card(args, reports, drawn), encoding="utf-8")


def resolved(args: SteeringArguments) -> dict:
    """The arguments that `--config` takes: all of this package's, and others where they differ from the defaults."""
    own = {f.name for f in fields(SteeringArguments)} - {f.name for f in fields(TrainingArguments)}
    default = SteeringArguments(positive="a", negative="b").to_dict()
    given = args.to_dict()
    chosen = {
        f.name: given[f.name]
        for f in fields(args)
        if f.init and (f.name in own or given[f.name] != default[f.name]) and not f.name.endswith("_token")
    }
    return {name: value for name, value in chosen.items() if value is not None}


def model_card(args: SteeringArguments, reports: dict[str, EvalReport], drawn: bool) -> str:
    """The README of the adapter: what it does, and how to load it."""
    tiny = args.model_name_or_path == "tiny"
    behaviour = f"{args.positive} (+1) / {args.negative} (−1)" if args.positive else f"the pairs of {args.pairs_file}"
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
# Steering adapter: {behaviour}

Base model: `{args.model_name_or_path}`. {verdict(reports)}.

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

`config.yaml` repeats the run: `accelerate launch train.py --config config.yaml`.
"""


def check_writable(folder: str | Path) -> None:
    """Raise OSError, before any work, if `folder` cannot be made or written."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tempfile.mkdtemp(dir=folder, prefix=".probe-"))
