"""Compare wordings of a persona: `python -m benchmarks.wordings --config smollm2`.

For each trait of the package, measures its own templates and some general ones. On axis: how far a template moves the
log-odds of words that the trait's other templates select, both sides together, in nats. Off axis: the mean absolute
effect on the questions of the other traits. Cost: KL divergence from the model without a persona on neutral texts, in
nats per token. Adds the measurements to `docs/results/wordings.json` and writes `docs/wordings.md` from that file.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

from benchmarks.results import ROOT
from repeng._command import command
from repeng.data.files import write_json
from repeng.data.pairs import PLACEHOLDER
from repeng.data.probes import some_suffixes, trait_arguments, trait_pairs
from repeng.data.questions import Question
from repeng.data.task import neutral_texts
from repeng.data.word_questions import next_logp, questions_of
from repeng.eval.eval_report import ARMS
from repeng.eval.measure import Meter, prompt_dial
from repeng.eval.report.tables import markdown
from repeng.model.loading import load_base, load_tokenizer
from repeng.train.arguments import parse_arguments

FILE, PAGE = ROOT / "docs" / "results" / "wordings.json", ROOT / "docs" / "wordings.md"
GENERAL = ("Pretend you're {persona}.", "Use the priorities of a {persona} person.", "You are a {persona} person.")
SUFFIXES, TEXTS, SEED = 12, 6, 42
HEAD = """# Wordings of a persona

`python -m benchmarks.wordings` writes this page. A template is measured on words that the trait's other templates
select. **On axis**: how far the template moves the log-odds of these words, both sides together, in nats. **Off
axis**: the mean absolute effect on the questions of the seven other traits. **Cost**: KL divergence from the model
without a persona on neutral texts, in nats per token, mean of both sides. Templates with a star are from
`configs/traits`.
"""


def templates_of(name: str) -> list[str]:
    """A trait's own templates and the general ones."""
    return list(dict.fromkeys([*trait_arguments()[name][2], *GENERAL]))


def measure(config: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Effect on axis, effect off axis and cost, by trait and template."""
    task_args, args = parse_arguments(["--config", *config])
    tokenizer = load_tokenizer(task_args.model_name_or_path, task_args.gguf_file)
    model = load_base(task_args.model_name_or_path, args.device, gguf_file=task_args.gguf_file).eval()
    suffixes = some_suffixes(tokenizer, SUFFIXES)
    if not suffixes:
        raise ValueError("the tokenizer of this model knows no words of the package's suffixes; choose another model")
    _, texts = neutral_texts(task_args, model, tokenizer, seed=SEED, own=None)

    pairs = {name: trait_pairs(name, suffixes, templates_of(name)) for name in trait_arguments()}
    logp = {name: next_logp(model, tokenizer, some) for name, some in tqdm(pairs.items(), desc="traits")}

    def questions(name: str, left_out: str | None = None) -> list[Question]:
        """Questions on a trait, with words that are selected without the pairs of the template `left_out`."""
        kept = [i for i, template in enumerate(templates_of(name) * len(suffixes)) if template != left_out]
        some = [pairs[name][i] for i in kept]
        return questions_of(tokenizer, some, logp[name][kept], SUFFIXES // 2).questions

    whole = {name: questions(name) for name in pairs}
    meter = Meter(model, tokenizer, [q for some in whole.values() for q in some], texts[:TEXTS], base=nullcontext)
    traits = [name for name, some in whole.items() for _ in some]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, (positive, negative, _) in tqdm(trait_arguments().items(), desc="templates"):
        found[name] = {}
        for template in templates_of(name):
            dial = prompt_dial(*(template.replace(PLACEHOLDER, word) for word in (positive, negative)))
            others = questions(name, template)
            if not others:
                continue  # no word differs between the two sides
            own, points = [], []
            for _, sign in ARMS:
                points.append(meter.at(dial, float(sign)))
                with dial(float(sign)) as rewrite:
                    own.append(meter.ask(others, rewrite).odds)
            moved = (points[0].target.odds - points[1].target.odds).tolist()
            by_trait = {other: [v for v, t in zip(moved, traits, strict=True) if t == other] for other in whole}
            off = [fmean(values) for other, values in by_trait.items() if other != name and values]
            tokens = meter.neutral_tokens.sum()
            found[name][template] = {
                "on axis": (own[0] - own[1]).mean().item(),
                "off axis": fmean(map(abs, off)),
                "cost": fmean((point.texts.kl.sum() / tokens).item() for point in points),
            }
    return found


def page(results: dict[str, Any]) -> str:
    """The page of the documentation."""
    parts = [HEAD]
    for model, traits in results.items():
        for name, (positive, negative, own) in trait_arguments().items():
            rows = {
                f"{template}{' *' if template in own else ''}": {key: f"{value:.2f}" for key, value in row.items()}
                for template, row in sorted(traits[name].items(), key=lambda item: -item[1]["on axis"])
            }
            parts.append(f"## {model}: {positive} / {negative}\n\n{markdown(rows, 'template')}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", help="as in train.py; without it, only the page is written")
    options, flags = parser.parse_known_args()
    results = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    if options.config:
        results[Path(options.config[0]).name.removesuffix(".yaml")] = measure([*options.config, *flags])
        write_json(FILE, results)
    PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    with command():
        main()
