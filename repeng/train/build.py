"""Make model, data and adapter from the arguments. Every check comes before any expensive work."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from repeng.control.acting import check_sites
from repeng.data.arguments import TaskArguments
from repeng.data.kinds import layer_request
from repeng.data.pairs import ContrastPair
from repeng.data.probes import traits_that_move
from repeng.data.questions import Question
from repeng.data.task import Task, hold_out, make_task, read_pairs
from repeng.data.word_questions import word_questions
from repeng.model.loading import check_bits, load_base, load_shape, load_tokenizer, model_name
from repeng.model.sites import RESIDUAL, decoder_layers, eval_mode, layers_of, site_module, site_widths
from repeng.model.sources import find_source
from repeng.model.whole import check_vocabulary
from repeng.train.arguments import SteeringArguments
from repeng.train.collator import Example, tokenize_examples
from repeng.train.reference import pair_differences
from repeng.train.sharding import check_parallelism
from repeng.tuner import SvdSteeringConfig, SvdSteeringModel
from repeng.tuner.config import PREFIX
from repeng.tuner.targets import max_rank, resolve, select_layers

MAX_VALIDATION = 32  # pairs, and texts: small, so that evaluations take a small share of the training time
DEFAULT_RANK = {"svd": 64, "lora": 8, "bias": 2}  # for a bias the rank has no effect
MOVES = 1.0  # nats between the two sides: personas with a smaller effect lead to a warning


@dataclass(frozen=True)
class Sites:
    """Where the adapter acts and where the loss measures, as the arguments ask for it on a model of this size.

    Attributes:
        layers: indices of the adapted decoder layers.
        loss_layer: index of the layer of the loss site.
        r: the rank.
    """

    layers: list[int]
    loss_layer: int
    r: int


@dataclass
class Run:
    """Everything that a training run needs.

    Attributes:
        model: the base with a fresh adapter.
        tokenizer: its tokenizer.
        base: hub id or folder of the base model, or the name of an embedded one.
        task: the data; its pairs are those that are trained on.
        sites: where the adapter acts.
        examples: one example per pair.
        validation: questions about pairs that are held back; None without evaluations during training.
        validation_texts: neutral texts that are held back.
        doubt: a warning that this run may achieve little, with the reason; None if there is no such reason.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    task: Task
    sites: Sites
    examples: list[Example] = field(default_factory=list)
    validation: list[Question] | None = None
    validation_texts: list[str] = field(default_factory=list)
    doubt: str | None = None


def build(
    task_args: TaskArguments,
    args: SteeringArguments,
    own: Task | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    task: Task | None = None,
) -> Run:
    """Load the model and the data, check them, and put an adapter on the model.

    Args:
        task_args: model, behaviour and data that the user asked for.
        args: the training run that the user asked for.
        own: the task that belongs to the model, if it has one. It supplies data for which `task_args` names no file.
        model: the base model, on its device; by default the one that `task_args` names is loaded.
        tokenizer: the tokenizer of `model`.
        task: the data; by default `task_args` says where they come from.

    Raises:
        ValueError, FileNotFoundError: an argument or a file is wrong. The message says which, and what is allowed.
    """
    if (model is None) != (tokenizer is None):
        raise ValueError("give both model and tokenizer, or neither")
    set_seed(args.seed)
    check_parallelism(args, load_in_4bit=task_args.load_in_4bit)
    if tokenizer is None:
        if task_args.load_in_4bit:
            check_bits(find_source(task_args.model_name_or_path, task_args.gguf_file))
        tokenizer = load_tokenizer(task_args.model_name_or_path, task_args.gguf_file)
    pairs = read_pairs(task_args, tokenizer, seed=args.seed, own=own) if task is None else task.pairs
    base = task_args.model_name_or_path
    _check_batch(args, len(pairs))
    if model is not None:
        base = model_name(model)
    else:
        shape = load_shape(task_args.model_name_or_path, task_args.gguf_file)
        if shape is not None:
            _check_sizes(args, shape, len(pairs))
        model = load_base(
            task_args.model_name_or_path,
            args.device,
            gguf_file=task_args.gguf_file,
            load_in_4bit=task_args.load_in_4bit,
            compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        )
    check_vocabulary(model, tokenizer)
    sites = _check_sizes(args, model, len(pairs))
    validation, validation_texts = None, []
    with eval_mode(model):
        if task is None:
            task = make_task(task_args, model, tokenizer, pairs, seed=args.seed, own=own)
        doubt = _doubt(task, model, tokenizer)
        if args.eval_strategy != "no":
            task, validation, validation_texts = _hold_back(args, task, model, tokenizer)
    _check_batch(args, len(task.pairs))
    config = lora_config(args, sites, model) if args.adapter == "lora" else _svd_config(args, sites)
    adapted = cast(PeftModel, get_peft_model(model, config))
    examples = tokenize_examples(tokenizer, _seen(args, task.pairs), task.neutral_texts, args.seed)
    check_sites(adapted, torch.tensor([examples[0]["chosen_ids"]], device=adapted.device))
    if args.adapter == "svd" and args.directions == "pairs":
        differences = pair_differences(adapted, tokenizer, examples, args.last_n_tokens)
        cast(SvdSteeringModel, adapted.base_model).select_directions(differences)
    run = Run(adapted, tokenizer, base, task, sites, examples, validation, validation_texts, doubt)
    _share_between_processes(run)
    return run


def _doubt(task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A warning if the personas hardly move this model, because the adapter learns the effect of the personas."""
    if task.persona_effect is None or sum(task.persona_effect) >= MOVES:
        return None
    others = traits_that_move(model, tokenizer, MOVES)
    listed = ", ".join(f"{name} ({effect:.1f})" for name, effect in others.items())
    return f"these personas move this model by {task.persona_effect[0]:.1f} nats: expect little. " + (
        f"Traits of the package that move it: {listed}" if listed else "No trait of the package moves it"
    )


def _hold_back(
    args: SteeringArguments, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Task, list[Question], list[str]]:
    """Hold back a few pairs and neutral texts: the remaining task, the validation questions, the validation texts."""
    pairs, held_back = hold_out(task.pairs, MAX_VALIDATION)
    n_texts = min(MAX_VALIDATION, len(task.neutral_texts) // 2)
    texts, neutral = task.neutral_texts[:n_texts], task.neutral_texts[n_texts:]
    questions = word_questions(model, tokenizer, held_back).questions
    if not questions:
        raise ValueError(
            f"eval_strategy={args.eval_strategy}: this model continues both sides of all {len(held_back)} held-back "
            "pairs alike, so that there is nothing to measure; give other pairs, or set eval_strategy: no"
        )
    return replace(task, pairs=pairs, neutral_texts=neutral), questions, texts


def _check_batch(args: SteeringArguments, n_pairs: int) -> None:
    """Raise ValueError if the pairs do not fill one optimizer step."""
    if n_pairs < args.pairs_per_step:
        raise ValueError(
            f"{n_pairs} training pairs do not fill one optimizer step of {args.pairs_per_step} "
            f"(per_device_train_batch_size={args.per_device_train_batch_size}, gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}, {args.world_size} processes); give more pairs or a smaller batch"
        )


def _seen(args: SteeringArguments, pairs: list[ContrastPair]) -> list[ContrastPair]:
    """The pairs that the training steps can reach. The reference is computed for these only."""
    n = args.max_steps * args.pairs_per_step
    return pairs[:n] if 0 < n < len(pairs) else pairs


def _share_between_processes(run: Run) -> None:
    """Broadcast data and bases from rank 0, because sampled texts and SVDs may differ in the last digit."""
    if PartialState().num_processes == 1:
        return
    names = ("examples", "validation", "validation_texts")
    data = ("pairs", "neutral_texts", "unseen_neutral_texts", "questions", "probes")
    parts = broadcast_object_list([*(getattr(run.task, n) for n in data), *(getattr(run, n) for n in names)])
    run.task, rest = replace(run.task, **dict(zip(data, parts, strict=False))), parts[len(data) :]
    for name, value in zip(names, rest, strict=True):
        setattr(run, name, value)
    bases = [buffer for name, buffer in run.model.named_buffers() if f".{PREFIX}" in name]
    for tensor in [*bases, *(p.data for p in run.model.parameters() if p.requires_grad)]:
        tensor.copy_(cast(Tensor, broadcast(tensor.contiguous())))


def resolve_sites(args: SteeringArguments, model: PreTrainedModel) -> Sites:
    """Layers, layer of the loss and rank for a model of this depth and width.

    Raises:
        ValueError: the model lacks a site or a layer, or the rank is too large.
    """
    depth = len(decoder_layers(model))
    with _of_key("layers"):
        layers = select_layers(depth, None if args.layers is None else layer_request(args.layers))
    with _of_key("target_modules"):
        names = resolve(model, _svd_config(args, Sites(layers, 0, r=min(args.r or 2, 2))))  # a rank that always fits
    widest = min(max_rank(model, name) for name in names)
    if args.adapter != "bias" and args.r is not None and args.r > widest:
        raise ValueError(f"r={args.r} is more than the narrowest target allows; give r ≤ {widest}")
    r = args.r or min(DEFAULT_RANK[args.adapter], widest)
    reached = layers_of(model, map(model.get_submodule, names))
    loss_layer = max(reached, default=depth - 1) if args.loss_layer is None else args.loss_layer
    if not 0 <= loss_layer < depth:
        raise ValueError(f"loss_layer: layer {loss_layer} does not exist; this model has layers 0 to {depth - 1}")
    with _of_key("loss_site"):
        site = site_module(model, loss_layer, args.loss_site)
    _check_reach(args, model, names, site, loss_layer)
    return Sites(layers, loss_layer, r)


def _check_reach(
    args: SteeringArguments, model: PreTrainedModel, names: list[str], site: nn.Module, loss_layer: int
) -> None:
    """Raise ValueError if all adapted modules, given by name, come after the site of the loss."""
    modules = [model.get_submodule(name) for name in names]
    reached = layers_of(model, modules)
    if not reached:
        raise ValueError(f"target_modules {args.target_modules} lie in no decoder layer, where the loss looks")
    first = min(reached)
    where = f"loss_site={args.loss_site} of loss_layer={loss_layer}"
    if loss_layer < first:
        raise ValueError(f"{where} is below every adapted layer, so that nothing moves it; give loss_layer ≥ {first}")
    if args.loss_site == RESIDUAL or loss_layer > first:
        return
    order = list(decoder_layers(model)[first].modules())
    if all(order.index(module) > order.index(site) for module in modules if module in order):
        raise ValueError(f"{where} comes before every adapted module, so that nothing moves it; give a later one")


def _check_sizes(args: SteeringArguments, model: PreTrainedModel, n_pairs: int) -> Sites:
    """Resolve the sites; raise ValueError if a number is too large for the model or for the number of pairs."""
    sites = resolve_sites(args, model)
    (width,) = site_widths(model, [(args.loss_site, sites.loss_layer)])
    if args.num_directions > min(width, n_pairs):
        raise ValueError(
            f"num_directions={args.num_directions} is more than {n_pairs} pairs and a width of {width} have; lower it"
        )
    return sites


@contextmanager
def _of_key(key: str) -> Iterator[None]:
    """Put the name of the key before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def lora_config(args: SteeringArguments, sites: Sites, model: PreTrainedModel) -> LoraConfig:
    """The configuration of a LoRA on these sites, which must be linear modules."""
    names = resolve(model, _svd_config(args, sites))
    return LoraConfig(r=sites.r, lora_alpha=sites.r, target_modules=names, task_type=TaskType.CAUSAL_LM)


def _svd_config(args: SteeringArguments, sites: Sites) -> SvdSteeringConfig:
    """The configuration of an `SVD_STEERING` adapter. A bias is such an adapter with a shift only."""
    turns = args.adapter != "bias"
    return SvdSteeringConfig(
        r=sites.r,
        rotate_input=turns,
        scale=turns,
        target_modules=args.target_modules,
        layers_to_transform=sites.layers,
        task_type=TaskType.CAUSAL_LM,
    )
