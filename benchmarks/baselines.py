"""Methods that a user could train instead of this adapter: prompt distillation, and two fine-tunes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from einops import repeat
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng import steer
from repeng.model.logprob import kl_divergence
from repeng.model.packing import batch_rows, model_inputs, packing_for
from repeng.model.tokens import Encoded, pad_rows, shared_suffix_length
from repeng.train.arguments import SteeringArguments
from repeng.train.build import DEFAULT_RANK, Run, Sites, lora_config
from repeng.train.collator import SIDES
from repeng.train.trainer import SteeringTrainer

TUNE_ROWS, TUNE_STEPS, TUNE_RATE = 12, 60, 5e-4  # rows per step, steps and learning rate of each fine-tune


def lora_on(model: nn.Module, args: SteeringArguments, layers: list[int], names: tuple[str, ...]) -> PeftModel:
    """Add LoRA adapters with these names on the sites of the arguments; the first adapter is active."""
    config = lora_config(args, Sites(layers, 0, DEFAULT_RANK["lora"]), cast(PreTrainedModel, model))
    adapted = cast(PeftModel, get_peft_model(cast(PreTrainedModel, model), config, adapter_name=names[0]))
    for name in names[1:]:
        adapted.add_adapter(name, config)
    return adapted


def use_two_loras(run: Run, args: SteeringArguments) -> None:
    """Replace the adapter by two LoRA adapters, "plus" and "minus", on the same sites and layers."""
    names = ("plus", "minus")
    model = lora_on(run.model.unload(), args, run.sites.layers, names)
    model.base_model.set_adapter(list(names))
    run.model = model


def fine_tune(model: PeftModel, tokenizer: PreTrainedTokenizerBase, encoded: list[Encoded], *, seed: int) -> None:
    """Train the active adapter on the suffixes after their prompts, with the plain language modelling loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=TUNE_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    rows = [one.ids for one in encoded]
    packing = packing_for(model, rows[:3], max(map(len, rows)))
    for _ in tqdm(range(TUNE_STEPS), desc="fine-tune", leave=False):
        some = [encoded[i] for i in torch.randperm(len(encoded), generator=generator)[:TUNE_ROWS].tolist()]
        batch = batch_rows([one.ids for one in some], tokenizer, packing)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits = model(**model_inputs(batch, model.dtype), use_cache=False).logits.flatten(0, 1)
        losses = []
        for at, mask, one in zip(batch["where"], batch["attention_mask"].bool(), some, strict=True):
            own = torch.tensor(one.suffix, device=logits.device)
            losses.append(torch.nn.functional.cross_entropy(logits[at[mask][-len(own) - 1 : -1]].float(), own))
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def arms_dial(model: nn.Module, coefficient: float | Tensor) -> Iterator[None]:
    """Scale the LoRA of the sign of c, "plus" or "minus", by |c|."""
    c = torch.as_tensor(coefficient, dtype=torch.float32)
    with steer(model, c.clamp(min=0), adapter_name="plus"), steer(model, (-c).clamp(min=0), adapter_name="minus"):
        yield


@contextmanager
def weight_dial(model: nn.Module, coefficient: float | Tensor) -> Iterator[None]:
    """Scale the LoRA "plus" by c and "minus" by −c: this adds c times the weight difference of two fine-tunes."""
    c = torch.as_tensor(coefficient, dtype=torch.float32)
    with steer(model, c, adapter_name="plus"), steer(model, -c, adapter_name="minus"):
        yield


class DistillationTrainer(SteeringTrainer):
    """Distils persona prompts into the model without a persona, with the loss KL(base after the persona ‖ model at c).

    The loss is on the shared endings of the pairs and on the neutral texts, each after every persona. Batches, steps
    and schedule are those of the adapter; the learning rate is the one that is found for the separation loss.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        masks = inputs["attention_mask"].bool()
        rows = [row[mask].tolist() for row, mask in zip(inputs["input_ids"], masks, strict=True)]
        n = len(rows) // len(SIDES)
        *personas, bare, neutral = (rows[start : start + n] for start in range(0, len(rows), n))
        taught, students, read = [], [], []
        for side in personas:
            for texts in (bare, neutral):
                for opening, asked, text in zip(side, bare, texts, strict=True):
                    shared = shared_suffix_length(opening, asked)
                    skipped = len(asked) - shared  # tokens that stand here in place of the persona
                    taught.append(opening[: len(opening) - shared] + text[skipped:])
                    students.append(text)
                    read.append(len(text) - skipped)
        base, device = self.accelerator.unwrap_model(model), inputs["input_ids"].device
        with torch.no_grad(), self.steer_fn(base, 0.0):
            teacher = base(**pad_rows(taught, self.processing_class, device, side="left"), use_cache=False).logits
        c = repeat(torch.tensor([1.0, -1.0]), "c -> (c r)", r=len(students) // 2)
        with self.steer_fn(base, c):
            student = model(**pad_rows(students, self.processing_class, device, side="left"), use_cache=False).logits
        losses = [kl_divergence(teacher[i, -k:], student[i, -k:]).mean() for i, k in enumerate(read)]
        return torch.stack(losses).mean()
