"""Questions beyond those of the behaviour: which other traits a dial moves, and whether its effect is robust."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.data.arguments import TaskArguments
from repeng.data.configuration import CONFIGS, data_file
from repeng.data.files import load_texts
from repeng.data.pairs import PLACEHOLDER, ContrastPair
from repeng.data.questions import Question
from repeng.data.word_questions import WordQuestions, next_logp, questions_of
from repeng.model.script import joined
from repeng.model.tokens import plain_ids

TRAIT_SUFFIXES, TRAIT_TEMPLATES = 6, 2
MOST = 16  # questions per probe
ROBUSTNESS = ("argued against", "reworded", "another language", "several turns")
REWORDED = "I have something for you. {prompt} Thank you in advance."
FOREIGN = "Hola, tengo una petición. {prompt} Muchas gracias por tu ayuda."
TURNS = ("Hello! How are you?", "Hello! I am here to help. What can I do for you?")


class Probe(NamedTuple):
    """The questions on which the + arm is measured, and those for the − arm. Mostly they are the same."""

    plus: list[Question]
    minus: list[Question]


def trait_arguments() -> dict[str, tuple[str, str, list[str]]]:
    """The package's traits by name: the words for the persona, + and −, and the templates."""
    found = {}
    for path in sorted(CONFIGS.glob("traits/*.yaml")):
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
        found[path.stem] = keys["positive"], keys["negative"], keys["templates"]
    return found


def trait_pairs(name: str, suffixes: Sequence[str], templates: Sequence[str] | None = None) -> list[ContrastPair]:
    """Pairs for a trait of the package: each suffix with each template, by default the trait's first templates."""
    positive, negative, own = trait_arguments()[name]
    return [
        ContrastPair(template.replace(PLACEHOLDER, positive), template.replace(PLACEHOLDER, negative), suffix)
        for suffix in suffixes
        for template in templates or own[:TRAIT_TEMPLATES]
    ]


def some_suffixes(tokenizer: PreTrainedTokenizerBase, n: int = TRAIT_SUFFIXES) -> list[str]:
    """`n` of the package's answer beginnings, always the same; an empty list if the tokenizer cannot encode them."""
    drawn = random.Random(0).sample(load_texts(data_file("suffixes")), n)
    unknown = tokenizer.unk_token_id
    return [] if any(unknown is not None and unknown in plain_ids(tokenizer, text) for text in drawn) else drawn


def other_traits(args: TaskArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Probe]:
    """Questions on the package's traits except the steered one; empty if the tokenizer cannot encode English."""
    own = {args.positive, args.negative}
    names = [name for name, (positive, negative, _) in trait_arguments().items() if {positive, negative} != own]
    found = _trait_questions(names, model, tokenizer)
    return {name: Probe(of_it.questions, of_it.questions) for name, of_it in found.items() if of_it.questions}


def traits_that_move(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, least: float) -> dict[str, float]:
    """Traits of the package whose personas move this model by `least` nats or more, with the effect, largest first."""
    found = _trait_questions([*trait_arguments()], model, tokenizer)
    effects = {name: of_it.effect for name, of_it in found.items()}
    return {name: effect for name, effect in sorted(effects.items(), key=lambda item: -item[1]) if effect >= least}


def _trait_questions(
    names: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, WordQuestions]:
    """Questions on some of the package's traits, by name; empty if the tokenizer cannot encode English."""
    suffixes = some_suffixes(tokenizer)
    if not suffixes or not names:
        return {}
    pairs = {name: trait_pairs(name, suffixes) for name in names}
    logp = next_logp(model, tokenizer, [pair for some in pairs.values() for pair in some])
    parts = logp.split([len(some) for some in pairs.values()])
    return {name: questions_of(tokenizer, pairs[name], part) for name, part in zip(names, parts, strict=True)}


def _some_units(questions: Sequence[Question]) -> list[Question]:
    """About `MOST` of the questions, spread evenly. A unit, such as both orders of the options, is never split."""
    units = list(dict.fromkeys(q.unit or str(index) for index, q in enumerate(questions)))
    kept = set(units[:: max(1, -(-len(questions) // MOST))])
    return [q for index, q in enumerate(questions) if (q.unit or str(index)) in kept]


def robustness(
    questions: Sequence[Question], personas: tuple[str, str] | None, *, has_template: bool
) -> dict[str, Probe]:
    """The target questions under changed conditions.

    With personas, each question follows the persona of the opposite direction. For a model with a chat template, the
    questions are also reworded, embedded in a request in another language, and asked after other turns.
    """
    targets = _some_units([q for q in questions if q.kind == "target"])
    probes = {}
    if personas is not None:
        plus, minus = ([replace(q, prompt=joined(opening, q.prompt).strip()) for q in targets] for opening in personas)
        probes[ROBUSTNESS[0]] = Probe(minus, plus)
    asked = [q for q in targets if q.prompt]
    if has_template and asked:
        changes = (
            [replace(q, prompt=REWORDED.replace("{prompt}", q.prompt)) for q in asked],
            [replace(q, prompt=FOREIGN.replace("{prompt}", q.prompt)) for q in asked],
            [replace(q, history=TURNS) for q in asked],
        )
        probes |= {name: Probe(some, some) for name, some in zip(ROBUSTNESS[1:], changes, strict=True)}
    return probes
