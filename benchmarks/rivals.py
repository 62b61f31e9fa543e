"""Compare all methods at equal cost on a real model: `python -m benchmarks.rivals --config smollm2 mood`.

Measures the requested methods and adds their reports to a file (`--out`), so that a long run can be split into parts.
All methods answer the same questions. The seed changes the order of training and the initial weights of an adapter.
Unknown flags are passed on to the training, for example `--model_name_or_path FILE.gguf`.
`python -m benchmarks.results` makes the tables of the documentation from these files.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from benchmarks import baselines
from benchmarks.training import train
from repeng import EvalReport, SteeringVector, extract, fit_gate, steer, tiny
from repeng._command import command
from repeng.data.pairs import PLACEHOLDER, ContrastPair
from repeng.data.task import Task, make_task, read_pairs
from repeng.data.word_questions import without_persona
from repeng.eval.compare import (
    ADAPTER,
    PROMPTS,
    Progress,
    Tracer,
    best_layer,
    measure_baselines,
    screened_layers,
)
from repeng.eval.measure import Dial, Meter, prompt_dial
from repeng.eval.stored import load_reports, save_reports
from repeng.model.generate import continuations
from repeng.model.loading import load_base, load_tokenizer
from repeng.model.sites import decoder_layers
from repeng.model.tokens import encode, encode_text
from repeng.model.types import CausalLM
from repeng.train.arguments import parse_arguments
from repeng.train.build import resolve_sites

DATA_SEED = 42
ONE_CORE = "one core"
SHOTS = 4
TUNE_TEXTS, TUNE_TOKENS = 64, 24
VECTORS = {
    "PCA (vgel/repeng)": {"method": "pca_center"},
    "SVD, k = 4": {"method": "svd", "k": 4},
    "gradient": {"method": "gradient"},
    "natural gradient": {"method": "fisher"},
}
# Templates as in the persona-steering-template-library (MIT), where they were the best of 100.
WORDINGS = {
    "prompt: priorities": "Use the priorities of a {persona} person.",
    "prompt: pretend": "Pretend you're {persona}.",
    "prompt: engineered": (
        "You are a deeply {persona} person. Everything you say is {persona}: the words you choose, what you notice, "
        "what you leave out. Stay {persona} whatever you are asked, and never step out of this role."
    ),
}


class Rival(NamedTuple):
    """A dial; the adapted copy of the model that it steers, or None for the base; whether it is only a prompt."""

    dial: Dial
    model: nn.Module | None = None
    discrete: bool = False


class Bench:
    """A real model, its task, and the meter for all measurements."""

    def __init__(self, config: list[str], folder: Path) -> None:
        self.config, self.folder = config, folder
        self.task_args, self.args = parse_arguments(["--config", *config, "--seed", str(DATA_SEED)])
        self.tokenizer = load_tokenizer(self.task_args.model_name_or_path, self.task_args.gguf_file)
        own = tiny.task(self.task_args, DATA_SEED)
        pairs = read_pairs(self.task_args, self.tokenizer, seed=DATA_SEED, own=own)
        self.model = load_base(self.task_args.model_name_or_path, self.args.device, gguf_file=self.task_args.gguf_file)
        self.task: Task = make_task(self.task_args, self.model, self.tokenizer, pairs, seed=DATA_SEED, own=own)
        self.progress = Progress(1)
        self.meter = Meter(
            self.model, self.tokenizer, self.task.questions, self.task.unseen_neutral_texts, base=nullcontext
        )
        self.tracer = Tracer(self.meter, self.progress, self.task)

    def measured(self, rival: Rival) -> EvalReport:
        """Measure a rival on the same items as all others."""
        self.meter.model = cast(CausalLM, rival.model or self.model)
        self.meter.base_context = nullcontext if rival.model is None else partial(rival.dial, 0.0)
        return self.tracer.discrete(rival.dial) if rival.discrete else self.tracer.trace(rival.dial)

    def best(self, **options: Any) -> SteeringVector:
        """Extract a vector with these options of `extract`, and return it at its best layer."""
        layers = screened_layers(len(decoder_layers(self.model)))
        whole = extract(self.model, self.tokenizer, self.task.pairs, layers=layers, held_out=0, **options)
        single = {layer: whole.select(layers=[layer]) for layer in whole.layers}
        return single[best_layer(self.model, self.tokenizer, self.task, single, self.progress.step)]

    def vector(self, **options: Any) -> Rival:
        return Rival(partial(steer, self.model, vector=self.best(**options)))

    def gated(self) -> Rival:
        """The mean difference with a coefficient per token (PSR)."""
        vector = self.best()
        gate = fit_gate(self.model, self.tokenizer, vector, self.task.pairs)
        return Rival(partial(steer, self.model, vector=vector, gate=gate))

    def wording(self, template: str) -> Rival:
        assert self.task.words is not None
        plus, minus = (template.replace(PLACEHOLDER, word) for word in self.task.words)
        return Rival(prompt_dial(plus, minus), discrete=True)

    def few_shot(self) -> Rival:
        """Continuations by the model itself after each persona, used as examples before the request."""
        openings = []
        for side, persona in enumerate(self.task.personas or ()):
            shots = self.said(side, self.task.pairs[:SHOTS])
            examples = " ".join(f"{pair.suffix}{text}." for pair, text in zip(self.task.pairs, shots, strict=False))
            openings.append(f"{persona} For example: {examples}")
        return Rival(prompt_dial(openings[0], openings[1]), discrete=True)

    def said(self, side: int, pairs: list[ContrastPair]) -> list[str]:
        """Continuations of each pair after its persona of this side, drawn at temperature 1."""
        prompts = [(pair.chosen, pair.rejected)[side] for pair in pairs]
        rows = [encode(self.tokenizer, p, pair.suffix).ids for p, pair in zip(prompts, pairs, strict=True)]
        drawn = continuations(self.model, self.tokenizer, rows, TUNE_TOKENS, 32, seed=side)
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids, _ in drawn]

    def trained(self, seed: int, flags: Sequence[str] = (), dial: Callable[..., Any] = steer, **options: Any) -> Rival:
        """Train the default adapter, or the method that `flags` and `options` select instead.

        All seeds use the same pairs, but in a different order and with different neutral texts. Each method gets the
        learning rate that is found for it.
        """
        seen = self.args.max_steps * self.args.pairs_per_step if self.args.max_steps > 0 else None
        task = replace(self.task, pairs=self.task.pairs[:seen])
        run = train(seed, flags, config=self.config, task=task, keep=self.folder, **options)
        return Rival(partial(dial, run.model), run.model)

    def contrastive_weights(self, seed: int) -> Rival:
        """Contrastive weight steering (arXiv 2511.05408): the difference of the weights of two small fine-tunes.

        Each fine-tune learns to write, without a persona, the text that the model writes after its persona.
        """
        torch.manual_seed(seed)
        pairs, template = self.task.pairs[:TUNE_TEXTS], bool(self.tokenizer.chat_template)
        asked = [without_persona(pair, has_template=template) for pair in pairs]
        layers = resolve_sites(self.args, self.model).layers
        names = ("plus", "minus")
        texts = [self.said(side, pairs) for side in range(len(names))]
        model = baselines.lora_on(copy.deepcopy(self.model), self.args, layers, names)
        for name, said in zip(names, texts, strict=True):
            encoded = [
                encode_text(self.tokenizer, prompt, f"{pair.suffix}{text}")
                for prompt, pair, text in zip(asked, pairs, said, strict=True)
            ]
            model.set_adapter(name)
            baselines.fine_tune(model, self.tokenizer, encoded, seed=seed)
        model.base_model.set_adapter(list(names))
        return Rival(partial(baselines.weight_dial, model), model)


UNTRAINED: dict[str, Callable[[Bench], Rival]] = {
    **{name: partial(Bench.wording, template=template) for name, template in WORDINGS.items()},
    "prompt: few-shot": Bench.few_shot,
    **{name: partial(Bench.vector, **options) for name, options in VECTORS.items()},
    "mean difference, gated": Bench.gated,
}
TRAINED: dict[str, Callable[[Bench, int], Rival]] = {
    ADAPTER: Bench.trained,
    "SVD, same loss": partial(Bench.trained, flags=("--adapter", "svd")),
    "learned biases, same loss": partial(Bench.trained, flags=("--adapter", "bias")),
    "LoRA, prompt distillation": partial(
        Bench.trained,
        dial=baselines.arms_dial,
        steer_fn=baselines.arms_dial,
        prepare=baselines.use_two_loras,
        trainer=baselines.DistillationTrainer,
    ),
    "contrastive weights": Bench.contrastive_weights,
}
SITES: dict[str, Callable[[Bench, int], Rival]] = {
    f"{ADAPTER}, {' and '.join(sites)}": partial(Bench.trained, flags=("--target_modules", *sites))
    for sites in (("residual-writers",), ("up_proj",), ("k_proj", "v_proj"))
}
METHODS = (*UNTRAINED, *TRAINED)
REPEATED = TRAINED | SITES  # over seeds


def clock() -> float:
    """Time in seconds: process time on a CPU, so that other processes do not count; wall-clock time with a GPU."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True, help="as in train.py")
    parser.add_argument(
        "--out", type=Path, required=True, help="file of reports; reports that are already in it are kept"
    )
    parser.add_argument(
        "--methods", nargs="+", default=[*METHODS], help=f"by default {', '.join(METHODS)}; also {', '.join(SITES)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds")
    options, flags = parser.parse_known_args()
    config = [*options.config, *flags]
    bench = Bench(config, Path("outputs") / "rivals" / options.out.stem)
    reports, more = load_reports(options.out) if options.out.exists() else ({}, {"probes": {}, "seconds": {}})
    own = {
        "config": config,
        "device": torch.cuda.get_device_name() if bench.args.device.type == "cuda" else ONE_CORE,
        "recipe": {"adapter": bench.args.adapter, **asdict(resolve_sites(bench.args, bench.model))},
    }
    other = [f"{key} {more[key]}" for key in own if reports and more[key] != own[key]]
    if other:
        parser.error(f"{options.out} holds reports of another run, with {'; '.join(other)}; give another --out")
    more = {"seeds": {}, "model": Path(bench.task_args.model_name_or_path).name, **own, **more}
    if PROMPTS not in reports:
        start = clock()
        known = measure_baselines(bench.model, bench.tokenizer, bench.task, bench.tracer, nullcontext)
        reports |= known.reports
        more |= {"untrained": known.untrained, "behaviour": bench.task.behaviour}
        more |= {
            "persona_effect": bench.task.persona_effect and bench.task.persona_effect[0],
            "questions": len(bench.meter.targets),
        }
        more["probes"] |= known.probes
        more["seconds"]["baselines"] = clock() - start
        save_reports(options.out, reports, **more)
    bench.tracer.set_yardstick(reports[PROMPTS][0])
    for name in options.methods:
        runs = [REPEATED[name]] if name in REPEATED else []
        for seed in options.seeds if runs else [0]:
            if seed in more["seeds"].get(name, []):
                continue  # it is measured already
            start = clock()
            rival = REPEATED[name](bench, seed) if runs else UNTRAINED[name](bench)
            report = bench.measured(rival)
            if name not in reports:  # samples and probes are for the first seed only
                report, more["probes"][name] = bench.tracer.look(rival.dial, report)
            reports.setdefault(name, []).append(report)
            more["seeds"].setdefault(name, []).append(seed)
            more["seconds"][name] = more["seconds"].get(name, 0.0) + clock() - start
            save_reports(options.out, reports, **more)
            print(f"{name}, seed {seed}: {clock() - start:.0f} s", flush=True)


if __name__ == "__main__":
    with command():
        main()
