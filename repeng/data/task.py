"""A task: the pairs, texts and questions of one behaviour."""

import json
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.data.arguments import TaskArguments
from repeng.data.configuration import data_file
from repeng.data.files import load_texts, write_json
from repeng.data.lengths import check_pair_lengths, check_question_lengths, check_texts
from repeng.data.pairs import PLACEHOLDER, ContrastPair, draw_pairs, load_pairs, require_sound
from repeng.data.probes import Probe, other_traits, robustness
from repeng.data.questions import Question, choice_tokens, load_questions
from repeng.data.word_questions import (
    NEUTRAL_REQUEST,
    persona_sentences,
    shared_sentences,
    without_persona,
    word_questions,
)
from repeng.model.cache import cache_folder
from repeng.model.identity import model_key
from repeng.model.script import words as split_words
from repeng.model.tokens import encode, special_id

MAX_PAIRS = 1024
MAX_QUESTIONS = 48
SAME_OPENING = 0.2  # share of the pairs that must have the same opening for it to be used as the persona prompt
NEUTRAL_TRAIN, NEUTRAL_TEST = 256, 64
SAMPLED_TRAIN, SAMPLED_TEST = 128, 16  # fewer for a real model, which takes time for each text
HELD_OUT_SHARE = 0.1
NEUTRAL_LENGTH = 32
MOST_WRITTEN = 10  # the model writes at most this many texts per text that is needed
KEPT_TEXTS = 1  # version of the sampling method; increase it when the method changes
DEFAULT_TEMPLATES = (
    "Pretend you are a {persona} person making statements about the world.",
    "Answer as a {persona} person would.",
    "You are a {persona} speaker.",
)


@dataclass
class Task:
    """The data of one behaviour.

    Attributes:
        behaviour: a few words for the behaviour that is steered.
        pairs: contrast pairs from which vectors and adapters are made.
        neutral_texts: texts on which training must not change the model.
        unseen_neutral_texts: further neutral texts, for the evaluation.
        questions: the questions of the evaluation.
        personas: openings of the prompt baseline, + and −; None if they are unknown.
        words: the words for the persona, + and −; None if the behaviour is given by a pairs file only.
        persona_effect: difference of the questions' log-odds between the personas, + minus −, in nats, and its
            standard error; None if the questions were not made from pairs.
        probes: further questions, by name. The dial is measured on them at the coefficients where it costs as much as
            the personas.
        accepts: tells whether a generated sentence belongs to the language of the model; None if that is unknown.
    """

    behaviour: str
    pairs: list[ContrastPair]
    neutral_texts: list[str]
    unseen_neutral_texts: list[str]
    questions: list[Question]
    personas: tuple[str, str] | None = None
    words: tuple[str, str] | None = None
    persona_effect: tuple[float, float] | None = None
    probes: dict[str, Probe] = field(default_factory=dict)
    accepts: Callable[[str], bool] | None = None


def read_pairs(
    args: TaskArguments, tokenizer: PreTrainedTokenizerBase, *, seed: int, own: Task | None = None
) -> list[ContrastPair]:
    """Pairs from the pairs file, from templates and suffixes, or from the model's own task; `seed` draws the order.

    Args:
        args: the user's arguments.
        tokenizer: tokenizer with which the pairs are checked.
        seed: seed of the random choice and order of the pairs.
        own: the model's own task, if it has one; see `repeng.tiny.task`.

    Raises:
        ValueError, FileNotFoundError: an argument does not fit; the message names it and how to correct it.
    """
    pairs = draft_pairs(args, seed=seed, own=own)
    if own is None or pairs is not own.pairs:  # the model's own pairs were checked when they were made
        require_sound(pairs, tokenizer)
    return random.Random(seed).sample(pairs, len(pairs)) if args.pairs_file else pairs


def draft_pairs(args: TaskArguments, *, seed: int, own: Task | None = None) -> list[ContrastPair]:
    """Do as `read_pairs`, without the check with a tokenizer. The pairs of a file keep their order."""
    if args.pairs_file:
        return load_pairs(args.pairs_file)
    if own is not None and args.suffixes_file is None:
        if args.templates:
            raise ValueError(
                f"templates {args.templates} need suffixes_file. This model has its own pairs with its own persona "
                "sentences: give only positive and negative"
            )
        return own.pairs
    if args.suffixes_file is None or args.positive is None or args.negative is None:
        raise ValueError("positive and negative need suffixes_file: incomplete answers, one per line")
    suffixes, templates = load_texts(data_file(args.suffixes_file)), args.templates or list(DEFAULT_TEMPLATES)
    n = min(args.num_pairs or MAX_PAIRS, len(suffixes) * len(templates))
    return draw_pairs(args.positive, args.negative, templates=templates, suffixes=suffixes, n=n, seed=seed)


def make_task(
    args: TaskArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[ContrastPair],
    *,
    seed: int,
    own: Task | None = None,
) -> Task:
    """Make the task from these pairs, with the questions and neutral texts that the arguments name.

    Without a questions file, the questions are the model's own, or they are made from held-out pairs.

    Args:
        args: the user's arguments.
        model: base model. It writes the neutral texts and the questions for which no file is given.
        tokenizer: its tokenizer.
        pairs: pairs from `read_pairs`.
        seed: seed for sampling neutral texts.
        own: the model's own task, if it has one.

    Raises:
        ValueError, FileNotFoundError: an argument does not fit; the message names it and how to correct it.
    """
    check_pair_lengths(model, tokenizer, pairs)
    learned_from, held_out = split_pairs(args, pairs, own)
    accepts, effect = None, None
    if args.questions_file:
        questions = load_questions(args.questions_file)
    elif own is not None and not held_out:
        questions, accepts = own.questions, own.accepts
    else:
        made = word_questions(model, tokenizer, held_out, most=MAX_QUESTIONS)
        questions, effect = made.questions, (made.effect, made.error)
        if not questions:
            raise ValueError(
                f"this model continues both sides of the {len(held_out)} held-out pairs alike, so no question can be "
                "made from them. Use other personas or suffixes, or give questions_file"
            )
    for question in questions:
        choice_tokens(tokenizer, question)  # raise before the training: the evaluation would drop the question
    check_question_lengths(model, tokenizer, questions)
    neutral, unseen = neutral_texts(args, model, tokenizer, seed=seed, own=own)
    words = (args.positive, args.negative) if args.positive and args.negative else None
    openings = personas(args, pairs, own)
    others = own.probes if own is not None and accepts else other_traits(args, model, tokenizer)
    return Task(
        args.behaviour,
        learned_from,
        neutral,
        unseen,
        questions,
        openings,
        words,
        effect,
        {**others, **robustness(questions, openings, has_template=bool(tokenizer.chat_template))},
        accepts,
    )


def split_pairs(
    args: TaskArguments, pairs: list[ContrastPair], own: Task | None = None
) -> tuple[list[ContrastPair], list[ContrastPair]]:
    """Pairs to learn from, and pairs to make questions from; the latter are empty if the questions are given."""
    if args.questions_file or (own is not None and not args.pairs_file):
        return pairs, []
    return hold_out(pairs)


def hold_out(pairs: list[ContrastPair], most: int = MAX_PAIRS) -> tuple[list[ContrastPair], list[ContrastPair]]:
    """Split the pairs into a training part and a held-out part of at least one and about `most` pairs at most.

    No suffix is in both parts. Pairs without a suffix are told apart by the text after the persona, and the rarest
    texts are held out. If all pairs have the same suffix or text, single pairs are held out. All pairs of a suffix are
    held out together, so the held-out part can be slightly larger than `most`.

    Raises:
        ValueError: there are fewer than two pairs.
    """
    if len(pairs) < 2:
        raise ValueError(
            f"{len(pairs)} pair cannot serve for both training and questions; give more pairs, or questions_file"
        )
    n = min(most, max(1, round(HELD_OUT_SHARE * len(pairs))))
    ends = [pair.suffix or without_persona(pair, has_template=False) for pair in pairs]
    counts = Counter(ends)
    if len(counts) == 1:
        return pairs[n:], pairs[:n]
    held_back: set[str] = set()
    total = 0
    order = counts.items() if any(pair.suffix for pair in pairs) else sorted(counts.items(), key=lambda item: item[1])
    for end, count in order:
        if total < n and total + count <= len(pairs) / 2:
            held_back.add(end)
            total += count
    held = [pair for pair, end in zip(pairs, ends, strict=True) if end in held_back]
    return [pair for pair, end in zip(pairs, ends, strict=True) if end not in held_back], held


def personas(args: TaskArguments, pairs: Sequence[ContrastPair], own: Task | None) -> tuple[str, str] | None:
    """Openings for the prompt baseline, + and −; None if the pairs are whole texts without a common opening."""
    if args.positive is None or args.negative is None:
        if not all(
            pair.suffix or without_persona(pair, has_template=False) == shared_sentences(pair) for pair in pairs
        ):
            return None
        ((opening, count), *_) = Counter(map(persona_sentences, pairs)).most_common(1)
        return opening if count >= SAME_OPENING * len(pairs) else None
    if own is not None and not args.templates:
        return own.personas
    template = (args.templates or DEFAULT_TEMPLATES)[0]
    return template.replace(PLACEHOLDER, args.positive), template.replace(PLACEHOLDER, args.negative)


def neutral_texts(
    args: TaskArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int, own: Task | None
) -> tuple[list[str], list[str]]:
    """Neutral texts for the coherence region of the training, and unseen neutral texts for the evaluation."""
    if args.neutral_file:
        texts = load_texts(args.neutral_file)
        check_texts(args.neutral_file, texts, model, tokenizer)
        n_test = max(1, round(HELD_OUT_SHARE * len(texts)))
        return texts[n_test:], texts[:n_test]
    if own is not None:
        return own.neutral_texts, own.unseen_neutral_texts
    texts = _sample_texts(model, tokenizer, SAMPLED_TRAIN + SAMPLED_TEST, seed)
    return texts[SAMPLED_TEST:], texts[:SAMPLED_TEST]


@torch.no_grad()
def _sample_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int, seed: int) -> list[str]:
    """`n` texts that the base model writes at temperature 1. They are neutral for any model and language.

    With a chat template the texts are answers to a neutral request, otherwise plain text. They are stored in the cache
    folder.
    """
    if tokenizer.chat_template:
        start = encode(tokenizer, NEUTRAL_REQUEST).ids
    else:
        start = special_id(tokenizer, "bos", "eos")
    if not start:
        raise ValueError("this tokenizer has no token that begins a text (bos or eos); give neutral_file")
    settings = model.generation_config.to_dict() if model.generation_config else {}
    where = str(model.dtype), model.device.type
    key = model_key(model, tokenizer, KEPT_TEXTS, start, n, seed, NEUTRAL_LENGTH, settings, where)
    path = cache_folder() / f"texts-{key}.json"
    known = _kept_texts(path)
    if len(known) == n:
        return known
    prompt = torch.tensor([start] * min(n, 32), device=model.device)
    texts: list[str] = []
    written = 0
    with torch.random.fork_rng(), tqdm(total=n, desc="neutral texts", leave=False) as bar:
        torch.manual_seed(seed)
        while len(texts) < n:
            out = cast(Any, model).generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=NEUTRAL_LENGTH,
                pad_token_id=(special_id(tokenizer, "pad", "eos") or start)[0],
            )
            decoded = tokenizer.batch_decode(out[:, len(start) :], skip_special_tokens=True)
            found = [text.strip() for text in decoded if len(split_words(text)) > 2]
            texts += found
            written += len(decoded)
            if written >= MOST_WRITTEN * n and len(texts) < n:
                raise ValueError(
                    f"this model wrote {written} texts, of which {len(texts)} have three words or more; {n} are "
                    "needed; give neutral_file"
                )
            bar.update(len(found))
    try:
        write_json(path, texts[:n])
    except OSError as error:
        warnings.warn(f"the neutral texts cannot be stored for later runs: {error}", stacklevel=2)
    return texts[:n]


def _kept_texts(path: Path) -> list[str]:
    """The texts that an earlier run stored; an empty list if the file is missing or does not hold texts."""
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else []
