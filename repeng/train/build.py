"""From arguments to what the trainer needs: model, data, adapter. Every check comes before any expensive work."""

import importlib.util
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list
from peft import PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from repeng.data import PLACEHOLDER, ContrastPair, encode, load_pairs, load_texts, make_pairs, pad_rows, require_sound
from repeng.questions import Question, choice_id, choice_ids, load_questions
from repeng.sites import decoder_layers, site_module
from repeng.train.arguments import SteeringArguments
from repeng.train.bases import pair_differences
from repeng.train.sharding import check_parallelism
from repeng.tuner import SvdSteeringConfig
from repeng.tuner.config import PREFIX
from repeng.tuner.targets import max_rank, resolve, select_layers

MAX_PAIRS = 1024
MAX_VALIDATION = 32  # pairs and texts: an evaluation takes a small share of the time between two
DEFAULT_RANK = 64
NEUTRAL_TRAIN, NEUTRAL_TEST = 256, 64
HELD_OUT_SHARE = 0.1
NEUTRAL_LENGTH = 32
DEFAULT_TEMPLATES = (
    "Pretend you are a {persona} person making statements about the world.",
    "Answer as a {persona} person would.",
    "You are a {persona} speaker.",
)


@dataclass
class Data:
    """What a task brings along (`repeng.tiny.task`), for all that the arguments leave unsaid."""

    path: str
    pairs: list[ContrastPair]
    neutral_texts: list[str]
    unseen_neutral_texts: list[str]
    questions: list[Question]
    personas: tuple[str, str]
    accepts: Callable[[str], bool]


@dataclass
class Run:
    """Everything that training and evaluation need.

    `personas` are the openings of the prompt baseline, + and −; `accepts` says of a generated sentence whether it
    belongs to the language, where that is known; `examples`, `validation` and `validation_texts` are for the trainer.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    pairs: list[ContrastPair]
    neutral_texts: list[str]
    questions: list[Question]
    personas: tuple[str, str] | None
    accepts: Callable[[str], bool] | None = None
    examples: list[dict] = field(default_factory=list)
    validation: list[Question] | None = None
    validation_texts: list[str] = field(default_factory=list)


def build(args: SteeringArguments, task: Data | None = None, *, training: bool = True) -> Run:
    """Load, check and assemble; fills in the arguments that follow the model: `layers`, `loss_layer`, `r`.

    Args:
        args: what the user asked for.
        task: data for what `args` does not name files for.
        training: False leaves the base model as it is and makes no training examples: for evaluation.

    Raises:
        ValueError, FileNotFoundError: naming what does not fit and what would.
    """
    set_seed(args.seed)
    check_files(args)
    check_parallelism(args)
    path = task.path if task else args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(path)
    pairs = training_pairs(args, tokenizer, task)
    model = load_base(args, path)
    if training:
        resolve_defaults(args, model)
        site_module(model, args.loss_layer, args.loss_site)

    own_questions = task is not None and not args.pairs_file and not args.questions_file
    if args.questions_file:
        questions = load_questions(args.questions_file)
    elif own_questions:
        questions = task.questions
    else:
        pairs, held_out = hold_out(pairs)
        questions = questions_from_pairs(model, tokenizer, held_out)
    for question in questions:
        choice_ids(tokenizer, question)  # raises now what the evaluation would drop after the training
    neutral, unseen = neutral_texts(args, model, tokenizer, task)
    run = Run(
        model, tokenizer, pairs, unseen, questions, personas(args, task), task.accepts if own_questions else None
    )
    if training:
        if args.eval_strategy != "no":
            run.pairs, held_back = hold_out(pairs, MAX_VALIDATION)
            run.validation = questions_from_pairs(model, tokenizer, held_back)
            n_texts = min(MAX_VALIDATION, len(neutral) // 2)
            run.validation_texts, neutral = list(neutral[:n_texts]), neutral[n_texts:]
        add_adapter(args, run, neutral)
        agree(run)
    return run


def load_base(args: SteeringArguments, path: str) -> PreTrainedModel:
    """The base model on the device of this process, in its own precision or in 4 bits.

    Raises:
        ValueError: 4 bits without bitsandbytes.
    """
    options: dict[str, Any] = {}
    if args.device.type != "cpu":
        options["device_map"] = {"": args.device}  # else it would pass through main memory, once for each process
    if args.load_in_4bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("load_in_4bit needs bitsandbytes: pip install 'repeng[bnb]'")
        compute = torch.bfloat16 if args.bf16 else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    for module in model.modules():
        # bitsandbytes would repack weights on some CPUs in the first evaluation, for a kernel without gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def hold_out(pairs: list[ContrastPair], most: int = MAX_PAIRS) -> tuple[list[ContrastPair], list[ContrastPair]]:
    """The pairs without a share of them, and that share, at least one pair and at most `most`.

    No suffix is on both sides, unless all pairs have the same.
    """
    n = min(most, max(1, round(HELD_OUT_SHARE * len(pairs))))
    counts = Counter(pair.suffix for pair in pairs)
    if len(counts) == 1:
        return pairs[n:], pairs[:n]
    held_back: set[str] = set()
    total = 0
    for suffix, count in counts.items():
        if total >= n:
            break
        held_back.add(suffix)
        total += count
    held = [pair for pair in pairs if pair.suffix in held_back]
    return [pair for pair in pairs if pair.suffix not in held_back], held[:n]


def add_adapter(args: SteeringArguments, run: Run, neutral: Sequence[str]) -> None:
    """Put a fresh adapter around the run's model and make its training examples."""
    if len(run.pairs) < args.pairs_a_step:
        raise ValueError(
            f"{len(run.pairs)} training pairs do not fill one optimizer step of {args.pairs_a_step} "
            f"(per_device_train_batch_size={args.per_device_train_batch_size}, gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}, {args.world_size} processes); give more pairs or a smaller batch"
        )
    run.model = get_peft_model(run.model, adapter_config(args))
    run.examples = tokenize_examples(run.tokenizer, run.pairs, neutral, args.seed)
    if args.directions == "pairs":
        run.model.base_model.select_directions(
            pair_differences(run.model, run.tokenizer, run.examples, args.last_n_tokens)
        )


def agree(run: Run) -> None:
    """Give all processes the first one's data and bases: sampled texts and SVDs may differ in the last digit."""
    if PartialState().num_processes == 1:
        return
    names = ("pairs", "neutral_texts", "questions", "examples", "validation", "validation_texts")
    for name, value in zip(names, broadcast_object_list([getattr(run, name) for name in names]), strict=True):
        setattr(run, name, value)
    for name, buffer in run.model.named_buffers():
        if f".{PREFIX}" in name:
            buffer.copy_(broadcast(buffer.contiguous()))


def check_files(args: SteeringArguments) -> None:
    """Raise FileNotFoundError for a named file that does not exist."""
    for name in ("pairs_file", "suffixes_file", "neutral_file", "questions_file"):
        path = getattr(args, name)
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"{name}: there is no file {path!r}")


def training_pairs(
    args: SteeringArguments, tokenizer: PreTrainedTokenizerBase, task: Data | None
) -> list[ContrastPair]:
    """Pairs from the file, from the task, or from templates and suffixes."""
    if args.pairs_file:
        pairs = load_pairs(args.pairs_file)
        require_sound(pairs, tokenizer)
        return random.Random(args.seed).sample(pairs, len(pairs))
    if task and args.suffixes_file is None:
        return task.pairs
    if args.suffixes_file is None:
        raise ValueError("positive and negative need suffixes_file: incomplete answers, one a line")
    suffixes, templates = load_texts(args.suffixes_file), args.templates or list(DEFAULT_TEMPLATES)
    n = min(args.num_pairs or MAX_PAIRS, len(suffixes) * len(templates))
    return make_pairs(
        args.positive, args.negative, templates=templates, suffixes=suffixes, tokenizer=tokenizer, n=n, seed=args.seed
    )


def personas(args: SteeringArguments, task: Data | None) -> tuple[str, str] | None:
    """Openings for the prompt baseline; None if only a pairs file says what the behaviour is."""
    if args.positive is None:
        return None
    if task and not args.templates:
        return task.personas
    template = (args.templates or DEFAULT_TEMPLATES)[0]
    return template.replace(PLACEHOLDER, args.positive), template.replace(PLACEHOLDER, args.negative)


def resolve_defaults(args: SteeringArguments, model: PreTrainedModel) -> None:
    """Fill in what follows the model's depth and width; raises ValueError for sites and layers that it lacks."""
    depth = len(decoder_layers(model))
    wanted = list(range(round(depth / 3), 2 * depth // 3 + 1)) if args.layers is None else args.layers
    args.layers = select_layers(depth, wanted)
    args.loss_layer = max(args.layers) if args.loss_layer is None else args.loss_layer
    names = resolve(model, adapter_config(args))
    if args.r is None:
        args.r = min(DEFAULT_RANK, *(max_rank(model, name) for name in names))


def adapter_config(args: SteeringArguments) -> SvdSteeringConfig:
    """The adapter's configuration; at the lowest rank while the rank is not resolved."""
    return SvdSteeringConfig(
        r=args.r or 2,
        target_modules=args.target_modules,
        layers_to_transform=args.layers,
        task_type=TaskType.CAUSAL_LM,
    )


def neutral_texts(
    args: SteeringArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Data | None
) -> tuple[list[str], list[str]]:
    """Texts for the coherence region, and unseen ones for the evaluation."""
    if args.neutral_file:
        texts = load_texts(args.neutral_file)
        n_test = max(1, round(HELD_OUT_SHARE * len(texts)))
        return texts[n_test:] or texts, texts[:n_test]
    if task:
        return task.neutral_texts, task.unseen_neutral_texts
    texts = sample_texts(model, tokenizer, NEUTRAL_TRAIN + NEUTRAL_TEST, args.seed)
    return texts[NEUTRAL_TEST:], texts[:NEUTRAL_TEST]


@torch.no_grad()
def sample_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int, seed: int) -> list[str]:
    """Texts that the base model itself writes at temperature 1: neutral for any model and language."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prompt = torch.full((min(n, 32), 1), start, device=model.device)
    texts: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while len(texts) < n:
            out = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, top_p=1.0,
                temperature=1.0, max_new_tokens=NEUTRAL_LENGTH, pad_token_id=tokenizer.pad_token_id or start,
            )  # fmt: skip
            decoded = tokenizer.batch_decode(out, skip_special_tokens=True)
            texts += [text.strip() for text in decoded if len(text.split()) > 2]
    return texts[:n]


@torch.no_grad()
def questions_from_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[ContrastPair], top: int = 5
) -> list[Question]:
    """Questions for data without any: the next words that the base's own personas favour on held-out pairs.

    The target choices are the `top` tokens whose probability the chosen prompt raises most over the rejected one, the
    other choices those that it lowers most.
    """
    questions = []
    for index, pair in enumerate(pairs):
        rows = [encode(tokenizer, side, pair.suffix).ids for side in (pair.chosen, pair.rejected)]
        logits = model(**pad_rows(rows, tokenizer, model.device, side="left"), use_cache=False).logits[:, -1].float()
        chosen, rejected = logits.softmax(dim=-1)
        shift = chosen - rejected
        targets = distinct_words(tokenizer, shift.argsort(descending=True).tolist(), top, pair)
        others = distinct_words(tokenizer, shift.argsort().tolist(), top, pair)
        for side in (pair.chosen, pair.rejected):
            questions.append(Question(side, (*targets, *others), targets, suffix=pair.suffix, unit=f"pair {index}"))
    return questions


def distinct_words(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], n: int, pair: ContrastPair
) -> tuple[str, ...]:
    """The first `n` of `ids` that, written as a word, are encoded as that very token again."""
    words: list[str] = []
    for token in ids:
        word = tokenizer.decode([token]).strip()
        if word and word not in words and token not in tokenizer.all_special_ids:
            probe = Question(pair.chosen, (word, ""), (word,), suffix=pair.suffix)
            if choice_id(tokenizer, probe, word) == token:
                words.append(word)
        if len(words) == n:
            break
    return tuple(words)


def tokenize_examples(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[ContrastPair], neutral: Sequence[str], seed: int
) -> list[dict]:
    """One example a pair, each with a neutral text: all texts are used before one is used again."""
    rng = random.Random(seed)
    order = [text for _ in range(-(-len(pairs) // len(neutral))) for text in rng.sample(list(neutral), len(neutral))]
    return [
        {
            "chosen_ids": encode(tokenizer, pair.chosen, pair.suffix).ids,
            "rejected_ids": encode(tokenizer, pair.rejected, pair.suffix).ids,
            "neutral_ids": encode(tokenizer, "", text).ids,
        }
        for pair, text in zip(pairs, order, strict=False)
    ]
