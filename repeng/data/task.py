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
from repeng.data.files import cache_folder, load_texts, write_json
from repeng.data.lengths import check_pair_lengths, check_question_lengths, check_texts
from repeng.data.pairs import PLACEHOLDER, ContrastPair, load_pairs, make_pairs, require_sound
from repeng.data.probes import Probe, other_traits, robustness
from repeng.data.questions import Question, choice_tokens, load_questions
from repeng.data.word_questions import (
    NEUTRAL_REQUEST,
    persona_sentences,
    shared_sentences,
    without_persona,
    word_questions,
)
from repeng.model.identity import model_key
from repeng.model.script import words as split_words
from repeng.model.tokens import encode, special_id

MAX_PAIRS = 1024
MAX_QUESTIONS = 48
SAME_OPENING = 0.2  # share of pairs that must open alike for that to be the persona prompt
NEUTRAL_TRAIN, NEUTRAL_TEST = 256, 64
SAMPLED_TRAIN, SAMPLED_TEST = 128, 16  # of a real model, where each takes time
HELD_OUT_SHARE = 0.1
NEUTRAL_LENGTH = 32
MOST_WRITTEN = 10  # texts that a model writes for each that is used
KEPT_TEXTS = 1  # counts up when the model is asked for them in another way
DEFAULT_TEMPLATES = (
    "Pretend you are a {persona} person making statements about the world.",
    "Answer as a {persona} person would.",
    "You are a {persona} speaker.",
)


@dataclass
class Task:
    """The data of one behaviour.

    Attributes:
        behaviour: what is dialled, in a few words.
        pairs: what vectors and adapters are made from.
        neutral_texts: texts that training must leave alone.
        unseen_neutral_texts: such texts for the evaluation.
        questions: what the evaluation asks.
        personas: openings of the prompt baseline, + and −; None if nothing says what they are.
        words: the persona's words, + and −; None if only a pairs file says what the behaviour is.
        persona_effect: how far the personas move the log-odds of the questions, + against −, in nats, and the standard
            error of that; None where questions were not made of pairs.
        probes: other questions, by name, at which a dial is looked at where it costs as much as the personas.
        accepts: says of a generated sentence whether it belongs to the language; None where that is not known.
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
    """Pairs from the file, from templates and suffixes, or from the model's own task, in an order drawn by `seed`.

    Args:
        args: what the user asked for.
        tokenizer: checks the pairs.
        seed: draws them.
        own: the task that belongs to the model, if it has one; see `repeng.tiny.task`.

    Raises:
        ValueError, FileNotFoundError: naming what does not fit and what would.
    """
    if args.pairs_file:
        pairs = load_pairs(args.pairs_file)
        require_sound(pairs, tokenizer)
        return random.Random(seed).sample(pairs, len(pairs))
    if own is not None and args.suffixes_file is None:
        if args.templates:
            raise ValueError(
                f"templates {args.templates} need suffixes_file. This model has pairs of its own, with persona "
                "sentences that it knows: give only positive and negative"
            )
        return own.pairs
    if args.suffixes_file is None or args.positive is None or args.negative is None:
        raise ValueError("positive and negative need suffixes_file: incomplete answers, one per line")
    suffixes, templates = load_texts(data_file(args.suffixes_file)), args.templates or list(DEFAULT_TEMPLATES)
    n = min(args.num_pairs or MAX_PAIRS, len(suffixes) * len(templates))
    return make_pairs(
        args.positive, args.negative, templates=templates, suffixes=suffixes, tokenizer=tokenizer, n=n, seed=seed
    )


def make_task(
    args: TaskArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[ContrastPair],
    *,
    seed: int,
    own: Task | None = None,
) -> Task:
    """The task on these pairs, with the questions and texts that were asked for.

    Without a questions file, the questions are the model's own, or are made of pairs that are held out.

    Args:
        args: what the user asked for.
        model: writes neutral texts and answers held-out pairs, where no file has them.
        tokenizer: its tokenizer.
        pairs: from `read_pairs`.
        seed: draws neutral texts.
        own: the task that belongs to the model, if it has one.

    Raises:
        ValueError, FileNotFoundError: naming what does not fit and what would.
    """
    check_pair_lengths(model, tokenizer, pairs)
    learned_from, held_out = split_pairs(args, pairs, own)
    accepts, effect = None, None
    if args.questions_file:
        questions = load_questions(args.questions_file)
    elif own is not None and not held_out:
        questions, accepts = own.questions, own.accepts
    else:
        questions, *effect = word_questions(model, tokenizer, held_out, most=MAX_QUESTIONS)
        if not questions:
            raise ValueError(
                f"this model continues both sides of the {len(held_out)} held-out pairs alike: there is nothing "
                "to ask. Use other personas or suffixes, or give questions_file"
            )
    for question in questions:
        choice_tokens(tokenizer, question)  # raises now what the evaluation would drop after the training
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
        None if effect is None else (effect[0], effect[1]),
        {**others, **robustness(questions, openings, has_template=bool(tokenizer.chat_template))},
        accepts,
    )


def split_pairs(
    args: TaskArguments, pairs: list[ContrastPair], own: Task | None = None
) -> tuple[list[ContrastPair], list[ContrastPair]]:
    """Pairs to learn from, and pairs that questions are made of: none if the questions come from elsewhere."""
    if args.questions_file or (own is not None and not args.pairs_file):
        return pairs, []
    return hold_out(pairs)


def hold_out(pairs: list[ContrastPair], most: int = MAX_PAIRS) -> tuple[list[ContrastPair], list[ContrastPair]]:
    """The pairs without a share of them, and that share: at least one pair, about `most` at most, and no pair is lost.

    No suffix is on both sides, or, of pairs without one, no text behind the persona, the rarest of which are held out;
    unless all pairs have the same. A suffix is held out with all its pairs, so that they may be a few more.

    Raises:
        ValueError: a single pair cannot be on both sides.
    """
    if len(pairs) < 2:
        raise ValueError(
            f"{len(pairs)} pair cannot be both learned from and asked about; give more pairs, or questions_file"
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
    """Openings for the prompt baseline; None where only whole texts say what the behaviour is."""
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
    """Texts for the coherence region, and unseen ones for the evaluation."""
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
    """Texts that the base model itself writes at temperature 1: neutral for any model and language.

    With a chat template they are answers to a neutral request; without, plain text. They are kept in the cache folder.
    """
    if tokenizer.chat_template:
        start = encode(tokenizer, NEUTRAL_REQUEST).ids
    else:
        start = special_id(tokenizer, "bos", "eos")
    if not start:
        raise ValueError("this tokenizer has no token to begin a text with (bos, eos); give neutral_file")
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
                    f"of {written} texts that this model wrote, {len(texts)} have three words or more, and {n} are "
                    "needed; give neutral_file"
                )
            bar.update(len(found))
    try:
        write_json(path, texts[:n])
    except OSError as error:
        warnings.warn(f"the neutral texts are not kept for another run: {error}", stacklevel=2)
    return texts[:n]


def _kept_texts(path: Path) -> list[str]:
    """The texts of an earlier run; none if there is no such file, or it holds something else."""
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else []
