"""The trainer: one forward pass per step for both coefficients, the loss, and its terms in the log."""

import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list
from einops import rearrange, repeat
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import RandomSampler, Sampler
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from repeng._command import Stopped
from repeng.control.steer import steer
from repeng.data.files import write_json
from repeng.data.questions import Question
from repeng.eval.eval_report import ARMS
from repeng.eval.evaluate import ADAPTER_COEFFICIENTS, evaluate
from repeng.model.logprob import has_plain_head, head_logp_at, kl_divergence, read_vocabulary, tokens_at_once
from repeng.model.packing import Packing, model_inputs, packing_for, rows_read
from repeng.model.sites import capture, decoder_layers, eval_mode, layers_of, site_module
from repeng.model.tokens import label_mask, last_tokens
from repeng.train.adapter_files import adapter_state, check_saved, load_adapter_state
from repeng.train.arguments import SteeringArguments
from repeng.train.callbacks import FiniteGradients, NonFiniteError, StopOnSignal, WayBack
from repeng.train.checkpoints import STAGING, CheckpointError, newest, publish
from repeng.train.collator import PROMPTS, SIDES, Example, PairCollator, ReferencedExample
from repeng.train.inner_contrastive_loss import (
    InnerContrastiveLoss,
    as_reference,
    inner_contrastive_loss,
    signed_shift,
)
from repeng.train.learning_rate import peak_learning_rate, way_to_target
from repeng.train.reference import add_reference, gap, persona_gap, preference_direction
from repeng.train.reference_cache import cached_reference
from repeng.train.resume import RUN, plain

REFERENCE_SIZE = 4  # batch size of the reference, as a multiple of the training batch: no backward pass needs memory
START_KL = 1e-3  # nats; above 0, since kernels need not be bitwise reproducible
PROBED = 4  # pairs from which the learning rate is found
SHIFTED = ("hs_pi", "hs_ref", "hs_mask", "direction", "scale")


class StartError(ValueError):
    """At c = 0 the policy differs from the base model before the first step."""


class SteeringTrainer(Trainer):
    """`transformers.Trainer` for a PEFT model with a steering adapter and pairs that `tokenize_examples` prepared.

    It switches the dropout of the model off permanently.

    Args:
        model: the PEFT model.
        args: the arguments. Without a `loss_layer`, the loss measures at the last layer that is trained.
        train_dataset: examples.
        eval_dataset: questions on which the range is measured, as often as `eval_strategy` says; see `evaluate`.
        neutral_texts: texts on which evaluations measure the budget.
        processing_class: the tokenizer.
        loss_func: the loss, with the signature of `inner_contrastive_loss`.
        steer_fn: context manager that sets the coefficient of `model`, one number or one per row. Other PEFT methods
            need their own.
    """

    # `Trainer` declares these for any model and data.
    args: SteeringArguments  # pyright: ignore[reportIncompatibleVariableOverride]
    model: PeftModel  # pyright: ignore[reportIncompatibleVariableOverride]
    processing_class: PreTrainedTokenizerBase  # pyright: ignore[reportIncompatibleVariableOverride]
    eval_dataset: Sequence[Question]  # pyright: ignore[reportIncompatibleVariableOverride]
    train_dataset: Sequence[ReferencedExample]  # pyright: ignore[reportIncompatibleVariableOverride]
    stop: StopOnSignal
    way_back: WayBack
    neutral_texts: Sequence[str]
    start_kl: float | None
    loss_layer: int
    direction: Tensor
    scale: Tensor
    gap_unit: float
    mean_weight: float
    plain_head: bool
    loss_func: Callable[..., InnerContrastiveLoss]
    steer_fn: Callable[[nn.Module, float | Tensor], AbstractContextManager[None]]
    model_accepts_loss_kwargs: bool
    way: float | None
    peak: float  # learning rate
    control: TrainerControl
    identity: dict[str, Any] | None  # describes the run, and is written into its checkpoints

    def __init__(
        self,
        model: PeftModel,
        args: SteeringArguments,
        train_dataset: Sequence[Example],
        processing_class: PreTrainedTokenizerBase,
        *,
        eval_dataset: Sequence[Question] | None = None,
        neutral_texts: Sequence[str] = (),
        loss_func: Callable[..., InnerContrastiveLoss] = inner_contrastive_loss,
        steer_fn: Callable[[nn.Module, float | Tensor], AbstractContextManager[None]] = steer,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        self._last_inputs: dict[str, Tensor] | None = None
        self.identity = None
        self._staging: Path | None = None  # folder in which a checkpoint is written before it is moved to its place
        self.stop = StopOnSignal()
        self.way_back = WayBack()
        callbacks = [*(callbacks or []), FiniteGradients(), self.way_back, self.stop]
        if args.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        collate = PairCollator(processing_class)
        super().__init__(
            model=model,
            args=args,
            train_dataset=cast(Any, train_dataset),
            eval_dataset=cast(Any, eval_dataset),
            data_collator=collate,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.neutral_texts, self.start_kl = neutral_texts, None
        _switch_off_dropout(model)
        # On the device and under the autocast of training: the reference must equal the policy at c = 0.
        self.loss_layer = last_trained_layer(model) if args.loss_layer is None else args.loss_layer
        settings: dict[str, Any] = {"site": args.loss_site, "layer": self.loss_layer, "last_n": args.last_n_tokens}
        size = REFERENCE_SIZE * args.per_device_train_batch_size
        with self.accelerator.autocast():
            collate.packing = _packing(model, train_dataset, steer_fn)
            examples = cached_reference(
                train_dataset,
                lambda share: add_reference(model, collate, share, batch_size=size, steer_fn=steer_fn, **settings),
                model=model,
                tokenizer=processing_class,
                folder=args.output_dir,
                accelerator=self.accelerator,
                **settings,
            )
        self.train_dataset = examples
        self.direction, self.scale = preference_direction(examples, args.num_directions)
        self.gap_unit, self.mean_weight = persona_gap(examples)
        self.plain_head = has_plain_head(model, examples[0]["chosen_ids"])
        # Else Trainer would not divide a custom loss by the number of accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.loss_func, self.steer_fn = loss_func, steer_fn
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
        self.peak, self.way = args.learning_rate, None if args.learning_rate else self._way_to_target()

    def _way_to_target(self) -> float:
        """See `way_to_target`; the value of rank 0 is broadcast."""
        model = self.accelerator.unwrap_model(self.model)
        size = 1 if self.args.gradient_checkpointing else min(PROBED, self.args.per_device_train_batch_size)
        examples = [self.train_dataset[i] for i in range(min(PROBED, len(self.train_dataset)))]
        collate = cast(PairCollator, self.data_collator)
        batches = [collate(examples[start : start + size]) for start in range(0, len(examples), size)]

        def shift() -> Iterator[Tensor]:
            for batch in tqdm(batches, desc="learning rate", leave=False):
                inputs = cast(dict[str, Tensor], self._prepare_inputs(batch))
                with self.both_sides(model, inputs), self.accelerator.autocast():
                    given = self.loss_inputs(model, inputs)
                    yield signed_shift(*(given[name] for name in SHIFTED)).mean()

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        (way,) = broadcast_object_list([way_to_target(shift, parameters, self.args.separation_target)])
        return way

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.way is not None:
            self.peak = peak_learning_rate(self.way, self.args, num_training_steps)
            optimizer = optimizer or cast(torch.optim.Optimizer, self.optimizer)
            optimizer.defaults["lr"] = self.peak  # some schedules read it
            for group in optimizer.param_groups:
                group["lr"] = self.peak
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Each epoch has whole optimizer steps. The pairs left out because they do not fill a step vary by epoch."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, RandomSampler):
            step = self.args.pairs_per_step
            n = len(cast(Sized, sampler.data_source)) // step * step
            return RandomSampler(sampler.data_source, generator=sampler.generator, num_samples=n)
        return sampler

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            # FSDP's bf16 would round the adapter's parameters and all outputs. Autocast rounds where that is safe.
            plugin = cast(FullyShardedDataParallelPlugin, self.accelerator.state.fsdp_plugin)
            plugin.mixed_precision_policy = None

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`. However it ends, the earlier signal handlers are restored.

        Raises:
            KeyboardInterrupt: Ctrl-C ended it, after a checkpoint. After SIGTERM it returns and sets `stop.received`.
        """
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.stop.on_train_end()
        if self.stop.received and self.stop.number == signal.SIGINT:
            raise Stopped(self.stop.number, f" after step {self.state.global_step}")
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Take no further step if a run that was complete is resumed from its last checkpoint."""
        patience, callbacks = self.args.early_stopping_patience, self.callback_handler.callbacks
        stoppers = [one for one in callbacks if isinstance(one, EarlyStoppingCallback)]
        lost = patience is not None and any(one.early_stopping_patience_counter >= patience for one in stoppers)
        if lost or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        base = self.accelerator.unwrap_model(model)
        # A hook in a layer with gradient checkpointing would capture states without a graph, or recomputed states.
        cast(Any, decoder_layers(base)[self.loss_layer]).gradient_checkpointing = False
        if self.start_kl is None:
            self.report_start(model, self._prepare_inputs(inputs))
        # Held until after backward, where gradient checkpointing repeats the forward pass at the current coefficient.
        with self.both_sides(base, inputs):
            return super().training_step(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def report_start(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        """Log `start_kl`: the largest KL(base ‖ policy at c = 0) of a batch's tokens, over the vocabulary, in nats.

        The base is in evaluation mode without adapters. The policy is in training mode.

        Raises:
            StartError: `start_kl` is above 0, with a tolerance for rounding.
        """
        base = self.accelerator.unwrap_model(model)
        batch = model_inputs(inputs, base.dtype)
        real = inputs["where"][inputs["attention_mask"].bool()]
        options = {"plain": self.plain_head, "forward": model}

        reference: list[Tensor] = []

        def keep(states: Tensor, _: Callable[[Tensor], Tensor]) -> list[Tensor]:
            reference.append(states.flatten(0, 1)[real])
            return [states.new_zeros(1)]

        def largest_kl(states: Tensor, head: Callable[[Tensor], Tensor]) -> list[Tensor]:
            pair = (reference[0], states.flatten(0, 1)[real])
            parts = zip(*(hs.split(tokens_at_once(hs, head)) for hs in pair), strict=True)
            divergences = [kl_divergence(head(p).float(), head(q).float()).max() for p, q in parts]
            return [torch.stack(divergences).max()]

        bare = base.disable_adapter() if isinstance(base, PeftModel) else self.steer_fn(base, 0.0)
        with eval_mode(base), bare:
            read_vocabulary(base, batch, keep, **options)
        model.train()
        with self.steer_fn(base, 0.0):
            (kl,) = read_vocabulary(base, batch, largest_kl, **options)
        self.start_kl = self._gathered(kl.reshape(1)).max().item()
        self.log({"start_kl": self.start_kl, "peak_learning_rate": self.peak})
        if not self.start_kl <= START_KL:
            raise StartError(
                f"at c = 0 the policy is {self.start_kl:.3g} nats away from the base model; it must be 0. Something "
                "that the coefficient does not scale acts in training: dropout, another adapter, or modules_to_save"
            )

    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        eval_dataset: Sequence[Question] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Range inside the budget, and gain of each arm, in nats, on questions. The metrics of rank 0 are broadcast.

        Args:
            eval_dataset: questions; by default those of the trainer.
            ignore_keys: not used.
            metric_key_prefix: prefix of the names: `eval_range`, `eval_plus`, `eval_minus`.
        """
        model = self.accelerator.unwrap_model(self.model)
        report = evaluate(
            model,
            self.processing_class,
            eval_dataset or self.eval_dataset,
            partial(self.steer_fn, model),
            ADAPTER_COEFFICIENTS,
            neutral_texts=self.neutral_texts,
            batch_size=self.args.per_device_eval_batch_size,
        )
        gains = {"range": report.range, **{arm: report.arm(sign).gain for arm, sign in ARMS}}
        (metrics,) = broadcast_object_list([{f"{metric_key_prefix}_{name}": gain for name, gain in gains.items()}])
        self.log(metrics)
        reached, best = metrics.get(f"eval_{self.args.metric_for_best_model}"), self.state.best_metric
        if self.is_in_train and reached is not None and self.args.save_strategy != "no":
            self.control.should_save |= best is None or reached > best  # the best step needs a checkpoint
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, concatenated."""
        return cast(Tensor, self.accelerator.gather(tensor))

    def both_sides(self, model: nn.Module, inputs: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Context in which the first half of the doubled rows has the coefficient +1 and the second half −1."""
        return self.steer_fn(model, repeat(torch.tensor([1.0, -1.0]), "c -> (c r)", r=rows_read(inputs)))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        given = self.loss_inputs(model, inputs)
        result = self.loss_func(**given)
        self.require_finite(result)
        self._last_inputs = inputs
        losses = torch.stack([result.loss.detach(), self.loss_func(**as_reference(given)).loss])
        self.way_back.saw(*self._gathered(losses[None]).mean(dim=0).tolist())
        for name, term in result.terms.items():
            self._terms[name].append(self._gathered(term).mean())
        return (result.loss, result.terms) if return_outputs else result.loss

    def policy_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> InnerContrastiveLoss:
        """The loss, from one forward pass of `[chosen ; rejected ; bare ; neutral]` at plus and at minus."""
        return self.loss_func(**self.loss_inputs(model, inputs))

    def loss_inputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments of the loss, see `inner_contrastive_loss`."""
        args = self.args
        base = self.accelerator.unwrap_model(model)
        doubled = {name: repeat(x, "r ... -> (c r) ...", c=2) for name, x in model_inputs(inputs, base.dtype).items()}
        ids, mask, logp_ref, where = (
            rearrange(x, "(p b) t -> p b t", p=len(SIDES))
            for x in (inputs["input_ids"], label_mask(inputs["attention_mask"]), inputs["ref_logp"], inputs["where"])
        )
        index, _ = last_tokens(inputs["attention_mask"], args.last_n_tokens)
        index = rearrange(index, "(p b) n -> p b n", p=len(SIDES))[: len(PROMPTS)]
        last = where[: len(PROMPTS)].gather(-1, index)
        # Coherence counts for four rows per pair: chosen at plus, rejected at minus, neutral at both.
        counted, rows = mask[[0, 1, -1, -1]], [(0, 0), (1, 1), (0, -1), (1, -1)]

        def read(states: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            states = rearrange(states, "(c n) t d -> c (n t) d", c=2)
            at = torch.cat([c * states.shape[1] + where[p, :, :-1][mask[p]] for c, p in rows])
            ends = head(states[:, last[..., -1]]).float()  # (c p b v)
            gaps = gap(rearrange(ends, "c p b v -> b c p v"), inputs["next_ids"], inputs["next_weight"])
            return head_logp_at(states.flatten(0, 1), head, at, ids[[0, 1, -1, -1], :, 1:][counted]), gaps

        with capture([site_module(base, self.loss_layer, args.loss_site)]) as outputs:
            counted_logp, gap_pi = read_vocabulary(base, doubled, read, plain=self.plain_head, forward=model)
        logp = torch.zeros(counted.shape, device=counted_logp.device).masked_scatter(counted, counted_logp)
        hs = rearrange(cast(Tensor, outputs[0]), "(c n) t d -> c (n t) d", c=2)
        hs = hs[:, last.to(hs.device)]
        return {
            "hs_pi": hs.float(),
            "hs_ref": inputs["ref_hs"],
            "hs_mask": inputs["ref_mask"],
            "logp_pi": logp[:2],
            "logp_ref": logp_ref[:2],
            "logp_mask": mask[:2],
            "neutral_logp_pi": logp[2:],
            "neutral_logp_ref": logp_ref[-1],
            "neutral_mask": mask[-1],
            "direction": self.direction.to(hs.device),
            "scale": self.scale.to(hs.device),
            "gap_pi": rearrange(gap_pi, "b c p -> c p b"),
            "gap_ref": rearrange(inputs["ref_gap"], "b p -> p b"),
            "gap_weight": inputs["gap_weight"] / self.mean_weight,
            "gap_unit": self.gap_unit,
            "separation_target": args.separation_target,
            "order_target": args.order_target,
            "order_weight": args.order_weight,
            "coherence_margin": args.coherence_margin,
            "coherence_weight": args.coherence_weight,
        }

    def require_finite(self, result: InnerContrastiveLoss) -> None:
        """Raise NonFiniteError, naming step and term, unless the loss is finite."""
        if torch.isfinite(result.loss):
            return
        bad = [name for name, term in result.terms.items() if not torch.isfinite(term).all()]
        raise NonFiniteError(
            f"the loss is not finite at optimizer step {self.state.global_step + 1} "
            f"(terms: {', '.join(bad) or 'total'}). Earlier checkpoints are intact. "
            f"Lower learning_rate (now {self.peak:.2g}) or coherence_weight"
        )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The last loss belongs to the parameters before the last update. Check those that are about to be written.
        if self._last_inputs is not None:
            with torch.no_grad(), self.both_sides(self.accelerator.unwrap_model(model), self._last_inputs):
                self.require_finite(self.policy_loss(model, self._last_inputs))
        folder = Path(str(self.args.output_dir))
        self._staging = folder / STAGING
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)  # left by a run that was killed
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            best = folder / f"checkpoint-{self.state.best_global_step}"  # its final place, not the staging folder
            if self.state.best_global_step and (best.exists() or (self._staging / best.name).exists()):
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()  # before the staged checkpoint moves
            if self.args.should_save:
                staged = self._staging / f"checkpoint-{self.state.global_step}"
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                if self.identity is not None:
                    write_json(staged / RUN, plain(self.identity))
                publish(self._staging, folder, self.args, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "writ" not in str(error).lower():
                raise  # on a full disk, torch.save raises a RuntimeError about writing; other ones are not about files
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} could not be written ({error}). The last complete "
                f"checkpoint is {newest(folder) or 'none'}. Make room, then continue with --resume true"
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder, state = str(output_dir or self.args.output_dir), adapter_state(self.model)
        if not self.is_fsdp_enabled:
            super().save_model(folder, _internal_call)
        elif self.args.should_save:
            self._save(folder, state_dict=state)  # Trainer's save_model would gather the frozen base model too
        if self.args.should_save:
            check_saved(self.model, folder, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            load_adapter_state(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            load_adapter_state(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # the terms belong to the same steps
            for name, values in self._terms.items():
                logs[name] = round(torch.stack(values).mean().item(), 5)
            self._terms.clear()
        super().log(logs, start_time)


def _packing(
    model: nn.Module, examples: Sequence[Example], steer_fn: Callable[[nn.Module, float], AbstractContextManager[None]]
) -> Packing | None:
    """How to pack the rows of these examples for the steered model, tried with some of them; None for padded rows."""
    longest, index = max((len(example[side]), index) for index, example in enumerate(examples) for side in SIDES)
    some = [*(examples[0][side] for side in SIDES), max((examples[index][side] for side in SIDES), key=len)]
    with eval_mode(model), steer_fn(model, 1.0):
        return packing_for(model, some, longest)


def _switch_off_dropout(model: nn.Module) -> None:
    """Make training mode deterministic: with dropout, the policy at c = 0 would not equal the reference."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def last_trained_layer(model: nn.Module) -> int:
    """Index of the last decoder layer with a trainable parameter; of the last layer if none has one."""
    trained = (m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False)))
    return max(layers_of(model, trained), default=len(decoder_layers(model)) - 1)
