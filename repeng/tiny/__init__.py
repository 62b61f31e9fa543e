"""The embedded language model and its world, the offline default of training, evaluation and tests."""

import json
import random
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from repeng.data.arguments import TaskArguments
from repeng.data.files import nearest
from repeng.data.pairs import ContrastPair, make_pairs
from repeng.data.probes import Probe
from repeng.data.questions import Question
from repeng.data.task import NEUTRAL_TEST, NEUTRAL_TRAIN, Task
from repeng.tiny import lexicon
from repeng.tiny.world import PERSONA_FORMS, SPLITS, TRAITS, World, check_choice

WEIGHTS = Path(__file__).parent / "weights"
PERSONA_SPLIT = "personas"
QUESTION_FORM = 2
UNSEEN_SEED = 1_000_003  # seed of the neutral texts that only the evaluation uses
FILLER_SHARE = 0.5  # share of pairs that have a neutral sentence between persona and cloze


def load(path: str | Path = WEIGHTS) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model (float32, in evaluation mode) and its tokenizer, without the network."""
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True)


def world_of(path: str | Path) -> World | None:
    """The world that the model in a folder was trained on, or None if `repeng.tiny.pretrain` did not make it."""
    manifest = Path(path) / "manifest.json"
    if not manifest.is_file():
        return None
    contents = json.loads(manifest.read_text())
    return World(contents["seed"]) if "repeng.tiny.pretrain" in contents.get("command", "") else None


def trait_of(positive: str, negative: str) -> str:
    """The trait of two persona words.

    Raises:
        ValueError: the embedded world has no such pair of personas.
    """
    for trait, (plus, minus) in lexicon.PERSONAS.items():
        if positive in plus and negative in minus:
            return trait
    words = [word for sides in lexicon.PERSONAS.values() for side in sides for word in side]
    unknown = [(key, word) for key, word in (("positive", positive), ("negative", negative)) if word not in words]
    if unknown:
        key, word = unknown[0]
        what = f"{key}: the embedded world has no persona {word!r}{nearest(word.lower(), words)}"
    else:
        what = f"positive {positive!r} and negative {negative!r} must be the + side and the − side of the same trait"
    known = "; ".join(f"{', '.join(plus)} against {', '.join(minus)}" for plus, minus in lexicon.PERSONAS.values())
    raise ValueError(f"{what}; the personas are: {known}")


def persona_templates() -> list[str]:
    """Opening sentences with a `{persona}` placeholder."""
    return [f"{form} ." for form in PERSONA_FORMS]


def pairs(
    trait: str,
    n: int,
    seed: int,
    *,
    world: World | None = None,
    words: tuple[str, str] | None = None,
) -> list[ContrastPair]:
    """`n` pairs about the training half of the entities. They end where the next word depends on the persona.

    Raises:
        ValueError: the trait is unknown, or `n` is more than the number of pairs of the world.
    """
    check_choice("trait", trait, TRAITS)
    world = world or World()
    rng = random.Random(f"pairs-{seed}")
    suffixes = []
    for prompt in world.prompts(trait, "train"):
        filler = world.neutral_text(rng) + " " if rng.random() < FILLER_SHARE else ""
        suffixes.append(filler + prompt.text)
    plus, minus = words or tuple(side[0] for side in lexicon.PERSONAS[trait])
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS, local_files_only=True)
    return make_pairs(
        plus, minus, templates=persona_templates(), suffixes=suffixes, tokenizer=tokenizer, n=n, seed=seed
    )


def questions(trait: str, split: str, *, world: World | None = None) -> list[Question]:
    """Clozes of `trait` about the entities of `split`, and all sums as controls.

    The held-out split also has a group of the question forms, which never occur in pairs. The split "personas" has
    clozes about the held-out entities after an opening sentence with a persona. Its persona words never occur in
    pairs, and its groups are the two sides of the trait.

    Raises:
        ValueError: the trait or the split is unknown.
    """
    world = world or World()
    check_choice("split", split, (*SPLITS, PERSONA_SPLIT))
    prompts = list(world.prompts(trait, "held_out" if split == PERSONA_SPLIT else split))
    if split == PERSONA_SPLIT:
        statements = [p for p in prompts if p.form == 0]
        sides = zip(("behind + personas", "behind − personas"), lexicon.PERSONAS[trait], strict=True)
        asked = [
            (PERSONA_FORMS[0].replace("{persona}", word) + f" . {p.text}", p, group)
            for group, words in sides
            for word in words[1:]
            for p in statements
        ]
    else:
        asked = [(p.text, p, "questions" if p.form == QUESTION_FORM else "statements") for p in prompts]
    targets = [Question("", p.choices, p.target, suffix=text, group=group, unit=p.subject) for text, p, group in asked]
    controls = [Question("", p.choices, p.target, "control", suffix=p.text) for p in world.sums()]
    return targets + controls


def neutral_texts(n: int, seed: int, *, world: World | None = None) -> list[str]:
    """`n` texts without facts, moods or sums. No trait of this world should change them."""
    return (world or World()).neutral_texts(n, seed)


def _probes(trait: str, world: World) -> dict[str, Probe]:
    """Probes with questions on the other traits."""
    probes = {}
    for other in TRAITS:
        if other != trait:
            asked = [q for q in questions(other, "held_out", world=world) if q.kind == "target"]
            probes[other] = Probe(asked, asked)
    return probes


def task(args: TaskArguments, seed: int) -> Task | None:
    """The task of the embedded world if the arguments name its model; None for any other model.

    A folder that `repeng.tiny.pretrain` wrote counts as such a model. Its world is drawn from the seed in its
    manifest.

    Raises:
        ValueError: the world does not have these personas, or not as many pairs as `num_pairs`.
    """
    world = world_of(WEIGHTS if args.model_name_or_path == "tiny" else args.model_name_or_path)
    if world is None:
        return None
    words = None if args.positive is None or args.negative is None else (args.positive, args.negative)
    trait = TRAITS[0] if words is None else trait_of(*words)
    n_all = len(PERSONA_FORMS) * sum(1 for _ in world.prompts(trait, "train"))
    if args.num_pairs is not None and args.num_pairs > n_all:
        raise ValueError(f"num_pairs={args.num_pairs} is too large: this behaviour has {n_all} pairs; lower it")
    template = persona_templates()[0]
    plus, minus = words or tuple(side[0] for side in lexicon.PERSONAS[trait])
    return Task(
        behaviour=args.behaviour,
        pairs=pairs(trait, args.num_pairs or n_all, seed, world=world, words=words),
        neutral_texts=world.neutral_texts(NEUTRAL_TRAIN, seed),
        unseen_neutral_texts=world.neutral_texts(NEUTRAL_TEST, UNSEEN_SEED),
        questions=questions(trait, "held_out", world=world),
        personas=(template.replace("{persona}", plus), template.replace("{persona}", minus)),
        words=(plus, minus),
        probes=_probes(trait, world),
        accepts=world.accepts,
    )
