"""Make a behaviour of the user's own: try templates on a model, and write those that move it to a configuration."""

import math
import shlex
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from repeng.commands.base import device_for
from repeng.data.behaviours import takes_an
from repeng.data.files import write_text
from repeng.data.folders import check_writable
from repeng.data.kinds import PLACEHOLDER
from repeng.data.pairs import ContrastPair, require_sound
from repeng.data.probes import some_suffixes, traits_that_move
from repeng.data.word_questions import next_logp, questions_of
from repeng.model.generate import continuations
from repeng.model.loading import load_model
from repeng.model.script import printable
from repeng.model.tokens import encode

LEAST = 1.0  # nats; below it, a training finds little to learn
KEPT = 3  # templates
SUFFIXES, SAID, SAID_TOKENS = 8, 3, 12
# Templates with an article are left out if the two words take different ones.
TEMPLATES = (
    "You are a {persona} person.",
    "Pretend you are a {persona} person.",
    "Use the priorities of a {persona} person.",
    "Pretend you are {persona}.",
    "You are {persona} with everyone you talk to.",
    "You are {persona} whatever the subject.",
    "Answer in a very {persona} way.",
)
PLAIN_TEXT = (
    "Here is what a {persona} person says.",
    "These are the words of a {persona} person.",
    "A {persona} person writes:",
    "The text below is very {persona}.",
)


def new(
    positive: str, negative: str, output: Path, model_name_or_path: str, gguf_file: str | None, *, use_cpu: bool
) -> dict[str, Any]:
    """Measure each template's persona effect, write the configuration, and print what comes next.

    Raises:
        ValueError: the tokenizer does not know the words or the package's answer beginnings.
    """
    check_writable(output.parent, "the folder of --output")
    model, tokenizer = load_model(model_name_or_path, gguf_file=gguf_file, device=device_for(use_cpu))
    suffixes = some_suffixes(tokenizer, SUFFIXES)
    if not suffixes:
        raise ValueError(
            f"the tokenizer of {model_name_or_path} does not know the package's answer beginnings, which are English; "
            "write pairs or suffixes of your own, as docs/own_behaviour.md says"
        )
    templates = _fitting(TEMPLATES if tokenizer.chat_template else PLAIN_TEXT, positive, negative)
    pairs = [
        ContrastPair(template.replace(PLACEHOLDER, positive), template.replace(PLACEHOLDER, negative), suffix)
        for template in templates
        for suffix in suffixes
    ]
    require_sound(pairs, tokenizer)
    logp = next_logp(model, tokenizer, pairs)
    found = questions_of(tokenizer, pairs, logp)
    single = {
        template: [found.by_pair.get(n * len(suffixes) + i, 0.0) for i in range(len(suffixes))]
        for n, template in enumerate(templates)
    }
    effects = {template: fmean(values) for template, values in single.items()}
    errors = {template: stdev(values) / math.sqrt(len(values)) for template, values in single.items()}
    ranked = sorted(templates, key=lambda one: -effects[one])
    kept = [one for one in ranked if effects[one] >= LEAST][:KEPT] or ranked[:KEPT]
    moves = fmean(effects[one] for one in kept) >= LEAST
    _print_effects(effects, errors, ranked, kept)
    said = _said(model, tokenizer, kept[0], positive, negative, suffixes[:SAID])
    others = {} if moves else traits_that_move(model, tokenizer, LEAST)
    if not moves:
        listed = ", ".join(f"{name} ({effect:.1f})" for name, effect in others.items()) or "none"
        print(
            f"warning: these personas move this model by less than {LEAST:g} nat: expect little. "
            f"Traits of the package that move it: {listed}"
        )
    base = {"model_name_or_path": model_name_or_path, **({"gguf_file": gguf_file} if gguf_file else {})}
    keys = {**base, "positive": positive, "negative": negative, "templates": kept, "suffixes_file": "suffixes"}
    text = yaml.safe_dump({**keys, "num_pairs": 400}, sort_keys=False, allow_unicode=True, width=100)
    write_text(output, f"# +1 = {positive}, −1 = {negative}\n{text}")
    name = output.stem
    commands = _next_commands(model_name_or_path, output, name)
    print(f"written: {output}\nnext:")
    for command in commands.values():
        print(f"  {command}")
    return {
        "written": str(output),
        "positive": positive,
        "negative": negative,
        "effects": effects,
        "standard_errors": errors,
        "templates": kept,
        "moves": moves,
        "traits_that_move": others,
        "said": said,
        "commands": commands,
    }


def _fitting(templates: tuple[str, ...], positive: str, negative: str) -> list[str]:
    """The templates with the article that both words take; those without an article if they take different ones."""
    ans = [takes_an(word) for word in (positive, negative)]
    if ans[0] != ans[1]:
        return [one for one in templates if f"a {PLACEHOLDER}" not in one.lower()]
    if not ans[0]:
        return list(templates)
    return [one.replace(f"a {PLACEHOLDER}", f"an {PLACEHOLDER}").replace("A {", "An {") for one in templates]


def _print_effects(effects: dict[str, float], errors: dict[str, float], ranked: list[str], kept: list[str]) -> None:
    table = Table(title="What the personas do to this model")
    table.add_column("template")
    table.add_column("nats ± standard error", justify="right")
    table.add_column("kept")
    for template in ranked:
        table.add_row(
            Text(template), f"{effects[template]:.2f} ± {errors[template]:.2f}", "yes" if template in kept else ""
        )
    Console().print(table)


def _said(
    model: Any, tokenizer: Any, template: str, positive: str, negative: str, suffixes: list[str]
) -> list[dict[str, str]]:
    """What both personas say after some answer beginnings. The texts are printed."""
    rows = [
        encode(tokenizer, template.replace(PLACEHOLDER, word), suffix).ids
        for suffix in suffixes
        for word in (positive, negative)
    ]
    texts = [tokenizer.decode(ids) for ids, _ in continuations(model, tokenizer, rows, SAID_TOKENS)]
    said = []
    for index, suffix in enumerate(suffixes):
        plus, minus = (" ".join(text.split()) for text in texts[2 * index : 2 * index + 2])
        print(printable(f"{suffix} …\n  {positive}: {plus}\n  {negative}: {minus}"))
        said.append({"suffix": suffix, "plus": plus, "minus": minus})
    return said


def _next_commands(model: str, output: Path, name: str) -> dict[str, str]:
    """Commands that go on from the configuration. A configuration of the same model brings its training keys."""
    from repeng.data.configuration import shipped_configs

    config = f"{model} {shlex.quote(str(output))}" if model in shipped_configs() else shlex.quote(str(output))
    vector, adapter = shlex.quote(f"{name}.safetensors"), shlex.quote(f"outputs/{name}")
    return {
        "extract": f"repeng extract --config {config} --output {vector}",
        "chat": f"repeng chat {vector}",
        "train": f"repeng train --config {config} --output_dir {adapter}",
    }
