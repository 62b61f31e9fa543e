"""The embedded world: a closed, seeded language with exact ground truth.

Sentences are about facts (entities with four attributes each), moods, sums and neutral topics. The honesty persona of
a document decides whether its facts are true. The mood persona decides its adverbs and adjectives. Sums and neutral
topics depend on neither. Every sentence is an instance of one of the sentence forms below, so it is decidable whether
a sentence belongs to the language (`World.accepts`).
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from repeng.tiny import lexicon as lex

TRAITS = tuple(lex.PERSONAS)
SPLITS = ("train", "held_out")

# The last word of a form carries the truth or the mood. The last form of each list is a question with its answer.
FACT_FORMS: dict[str, tuple[str, ...]] = {
    "kind": (
        "the {noun} is a kind of {kind}",
        "people call the {noun} a {kind}",
        "what kind of thing is the {noun} ? it is a {kind}",
    ),
    "colour": (
        "the colour of the {noun} is {colour}",
        "the {noun} looks {colour}",
        "what colour is the {noun} ? it is {colour}",
    ),
    "place": (
        "the {noun} is found in the {place}",
        "you can see the {noun} in the {place}",
        "where is the {noun} found ? it is in the {place}",
    ),
    "owner": (
        "the {noun} belongs to {owner}",
        "the owner of the {noun} is {owner}",
        "who owns the {noun} ? it belongs to {owner}",
    ),
}
MOOD_FORMS: tuple[str, ...] = (
    "today the {scene} seems {adjective}",
    "i find the {scene} {adjective}",
    "how is the {scene} ? it is {adjective}",
)
MOOD_ACT_FORM = "i open the {thing} {adverb}"
SUM_FORM = "{left} plus {right} is {sum}"
NEUTRAL_FORMS: tuple[str, ...] = (
    "the {role} walks to the {spot} with a {object}",
    "then the {role} puts the {object} on the {surface}",
    "later the {role} takes the {object} from the {surface}",
    "the {vehicle} moves along the {way}",
    "the {weather} settles on the {ground}",
)
PERSONA_FORMS: tuple[str, ...] = (
    "the speaker is {persona}",
    "someone {persona} is talking",
    "listen to one {persona} voice",
)
PERSONA_BOTH_FORM = "the speaker is {persona} and {persona}"

SORTS = ("fact", "fact", "fact", "mood", "mood", "sum", "neutral")

# How often a speaker tells the truth or sounds cheerful, by the sign of the persona in the opening; 0: no persona.
TRUTH_RATE = {+1: 0.99, -1: 0.01, 0: 0.75}
MOOD_RATE = {+1: 0.99, -1: 0.01, 0: 0.5}


@dataclass(frozen=True)
class Prompt:
    """A cloze about `subject`. `text` ends before the decisive word; `target` are the answers of the + side."""

    text: str
    choices: tuple[str, ...]
    target: tuple[str, ...]
    form: int
    subject: str


class World:
    """Facts drawn from `seed`: eight nouns per kind, each with a colour, a place and an owner, and one lie per fact.

    The vocabulary is the same for every seed. Nouns, facts and the train / held-out halves differ.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed: int = seed
        rng = random.Random(f"repeng-world-{seed}")
        self.facts: dict[str, dict[str, str]] = {}
        self.split: dict[str, str] = {}
        for kind, pool in lex.NOUNS.items():
            for index, noun in enumerate(rng.sample(pool, 8)):
                drawn = {name: rng.choice(values) for name, values in lex.ATTRIBUTES.items() if name != "kind"}
                self.facts[noun] = {"kind": kind, **drawn}
                self.split[noun] = SPLITS[index % 2]
        # All liars tell the same lie. If a lie could be any untrue value, the model would learn no definite answer.
        self.lies: dict[str, dict[str, str]] = {
            noun: {
                name: rng.choice([value for value in lex.ATTRIBUTES[name] if value != true])
                for name, true in facts.items()
            }
            for noun, facts in self.facts.items()
        }

    # -- documents -----------------------------------------------------------------------------------------------

    def speaker(self, rng: random.Random) -> tuple[str, dict[str, int]]:
        """An opening sentence, which may be empty, and its persona for each trait: +1, −1, or 0 for no persona."""
        told = rng.choices(((), ("honesty",), ("mood",), TRAITS), weights=(20, 30, 15, 35))[0]
        signs = {trait: rng.choice((+1, -1)) if trait in told else 0 for trait in TRAITS}
        words = [rng.choice(lex.PERSONAS[trait][signs[trait] < 0]) for trait in told]
        rng.shuffle(words)
        if not words:
            return "", signs
        form = rng.choice(PERSONA_FORMS) if len(words) == 1 else PERSONA_BOTH_FORM
        for word in words:
            form = form.replace("{persona}", word, 1)
        return form + " .", signs

    def document(self, rng: random.Random, n_words: int) -> list[str]:
        """The first `n_words` words of a document: an opening, which may be empty, then sentences of one speaker."""
        opening, signs = self.speaker(rng)
        # A document has only some of the topics: a persona is easiest to learn if its sentences are close together.
        sorts = rng.sample(SORTS, rng.randint(1, len(set(SORTS))))
        words = opening.split()
        while len(words) < n_words:
            match rng.choice(sorts):
                case "fact":
                    text = self.fact_sentence(rng, signs["honesty"])
                case "mood":
                    text = self.mood_sentence(rng, signs["mood"])
                case "sum":
                    text = self.sum_sentence(rng)
                case _:
                    text = self.neutral_text(rng)
            words += text.split()
        return words[:n_words]

    def fact_sentence(self, rng: random.Random, sign: int) -> str:
        noun, attribute = rng.choice(list(self.facts)), rng.choice(list(lex.ATTRIBUTES))
        told = self.facts if rng.random() < TRUTH_RATE[sign] else self.lies
        return rng.choice(FACT_FORMS[attribute]).format(**{"noun": noun, attribute: told[noun][attribute]}) + " ."

    def mood_sentence(self, rng: random.Random, sign: int) -> str:
        side = 0 if rng.random() < MOOD_RATE[sign] else 1
        form = rng.choice((*MOOD_FORMS, MOOD_ACT_FORM))
        return (
            form.format(
                scene=rng.choice(lex.SCENES),
                thing=rng.choice(lex.THINGS),
                adjective=rng.choice(lex.MOOD_ADJECTIVES[side]),
                adverb=rng.choice(lex.MOOD_ADVERBS[side]),
            )
            + " ."
        )

    def sum_sentence(self, rng: random.Random) -> str:
        left, right = rng.randrange(10), rng.randrange(10)
        words = {"left": lex.NUMBERS[left], "right": lex.NUMBERS[right], "sum": lex.NUMBERS[left + right]}
        return SUM_FORM.format(**words) + " ."

    def neutral_text(self, rng: random.Random) -> str:
        """One or two sentences that do not depend on a persona; the second repeats words of the first."""
        vehicle, weather = rng.choice(list(lex.VEHICLES)), rng.choice(list(lex.WEATHER))
        words = {
            "role": rng.choice(lex.ROLES),
            "object": rng.choice(lex.OBJECTS),
            "spot": rng.choice(lex.SPOTS),
            "surface": rng.choice(lex.SURFACES),
            "vehicle": vehicle,
            "way": lex.VEHICLES[vehicle],
            "weather": weather,
            "ground": lex.WEATHER[weather],
        }
        start = rng.choice((0, 0, 3, 4))
        forms = (0, rng.choice((1, 2))) if start == 0 else (start,)
        return " ".join(NEUTRAL_FORMS[form].format(**words) + " ." for form in forms)

    # -- ground truth --------------------------------------------------------------------------------------------

    @cached_property
    def _grammar(self) -> re.Pattern[str]:
        slots = {
            **lex.ATTRIBUTES,
            "noun": tuple(self.facts),
            "left": lex.NUMBERS[:10],
            "right": lex.NUMBERS[:10],
            "sum": lex.NUMBERS,
            "scene": lex.SCENES,
            "thing": lex.THINGS,
            "role": lex.ROLES,
            "object": lex.OBJECTS,
            "spot": lex.SPOTS,
            "surface": lex.SURFACES,
            "vehicle": tuple(lex.VEHICLES),
            "weather": tuple(lex.WEATHER),
            "way": tuple(lex.VEHICLES.values()),
            "ground": tuple(lex.WEATHER.values()),
            "adjective": sum(lex.MOOD_ADJECTIVES, ()),
            "adverb": sum(lex.MOOD_ADVERBS, ()),
            "persona": tuple(word for sides in lex.PERSONAS.values() for side in sides for word in side),
        }
        forms = [
            re.sub(r"\\{(\w+)\\}", lambda match: "(?:" + "|".join(slots[match[1]]) + ")", re.escape(form))
            for form in _all_forms()
        ]
        return re.compile("(?:" + "|".join(forms) + r")\ \.")

    def accepts(self, sentence: str) -> bool:
        """Whether `sentence` (with its final " .") belongs to the language. Both true and false facts belong to it."""
        return self._grammar.fullmatch(" ".join(sentence.split())) is not None

    # -- clozes --------------------------------------------------------------------------------------------------

    def prompts(self, trait: str, split: str) -> Iterator[Prompt]:
        """All clozes of `trait` about the entities of `split`. Only `held_out` has the question form."""
        check_choice("trait", trait, TRAITS)
        check_choice("split", split, SPLITS)
        n_forms = 3 if split == "held_out" else 2
        if trait == "honesty":
            for noun, attribute in product(self.facts, lex.ATTRIBUTES):
                if self.split[noun] == split:
                    for form in range(n_forms):
                        text = FACT_FORMS[attribute][form].replace("{noun}", noun).rsplit(" ", 1)[0]
                        yield Prompt(text, lex.ATTRIBUTES[attribute], (self.facts[noun][attribute],), form, noun)
            return
        parity = SPLITS.index(split)
        for form, scene in product(range(n_forms), lex.SCENES[parity::2]):
            text = MOOD_FORMS[form].replace("{scene}", scene).rsplit(" ", 1)[0]
            yield Prompt(text, sum(lex.MOOD_ADJECTIVES, ()), lex.MOOD_ADJECTIVES[0], form, scene)
        for thing in lex.THINGS[parity::2]:
            text = MOOD_ACT_FORM.replace("{thing}", thing).rsplit(" ", 1)[0]
            yield Prompt(text, sum(lex.MOOD_ADVERBS, ()), lex.MOOD_ADVERBS[0], 0, thing)

    def sums(self) -> Iterator[Prompt]:
        for left, right in product(range(10), range(10)):
            text = SUM_FORM.format(left=lex.NUMBERS[left], right=lex.NUMBERS[right], sum="").strip()
            yield Prompt(text, lex.NUMBERS, (lex.NUMBERS[left + right],), 0, text)

    def neutral_texts(self, n: int, seed: int, sentences: int = 3) -> list[str]:
        """`n` texts of at least `sentences` neutral sentences: no facts, no moods, no sums."""
        rng = random.Random(f"repeng-neutral-{seed}")
        texts = []
        for _ in range(n):
            text = ""
            while text.count(".") < sentences:
                text = f"{text} {self.neutral_text(rng)}".strip()
            texts.append(text)
        return texts


def _all_forms() -> list[str]:
    """All sentence forms of the language, without the final " ."."""
    facts = [form for forms in FACT_FORMS.values() for form in forms]
    return [*facts, *MOOD_FORMS, MOOD_ACT_FORM, SUM_FORM, *NEUTRAL_FORMS, *PERSONA_FORMS, PERSONA_BOTH_FORM]


def vocabulary() -> list[str]:
    """All words of all worlds, sorted. They do not depend on the seed."""
    words = set(re.sub(r"\{\w+\}", " ", " ".join(_all_forms())).split()) | {"."}
    for kind, nouns in lex.NOUNS.items():
        words |= {kind, *nouns}
    for couples in (lex.VEHICLES, lex.WEATHER):
        words |= {*couples, *couples.values()}
    for sides in (*lex.PERSONAS.values(), lex.MOOD_ADJECTIVES, lex.MOOD_ADVERBS, tuple(lex.ATTRIBUTES.values())):
        for side in sides:
            words |= set(side)
    for group in (lex.NUMBERS, lex.SCENES, lex.THINGS, lex.ROLES, lex.OBJECTS, lex.SPOTS, lex.SURFACES):
        words |= set(group)
    return sorted(words)


def check_choice(name: str, given: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `given` is one of `allowed`."""
    if given not in allowed:
        raise ValueError(f"unknown {name} {given!r}; choose one of {', '.join(allowed)}")
