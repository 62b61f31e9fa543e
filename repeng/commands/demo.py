"""Show what a trait's vector or adapter does to a small real model."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.commands.base import device_for, put_on, read_steering
from repeng.commands.extract import usual_layer
from repeng.control.steer import steer
from repeng.data.probes import some_suffixes, trait_arguments, trait_pairs
from repeng.eval.eval_report import ARMS
from repeng.eval.measure import Dial
from repeng.eval.samples import repetition
from repeng.eval.trace import find_costs
from repeng.model.generate import continuations
from repeng.model.loading import load_model
from repeng.model.logprob import kl_divergence
from repeng.model.script import printable
from repeng.model.tokens import encode, pad_rows
from repeng.vectors.extract import extract
from repeng.vectors.vector import SteeringVector

MODEL = "smollm2"
PROMPTS = ("How was your day?", "Tell me about the weather today.", "Write about a walk in the park.")
COEFFICIENTS = (-1.0, 0.0, 1.0)
NATS = 0.35  # KL per token at c = ±1: about what the persona prompts of this model cost
START, LARGEST = 2.0, 16.0
SUFFIXES, TOKENS = 16, 36


def demo(trait: str, prompts: Sequence[str] | None, folder: Path | None, *, use_cpu: bool) -> dict[str, Any]:
    """Print answers at c = −1, 0 and +1 side by side, with their cost.

    Args:
        trait: a trait of the package.
        prompts: prompts; by default those of the package.
        folder: the folder of a trained adapter; by default a vector is extracted, or read from an earlier call's file.
        use_cpu: run on the CPU even if there is a GPU.
    """
    start = time.perf_counter()
    positive, negative, _ = trait_arguments()[trait]
    path = folder or Path(f"demo-{trait}.safetensors")
    steering = read_steering(path) if path.exists() else None
    model, tokenizer = load_model(MODEL, device=device_for(use_cpu))
    asked = Asked(model, tokenizer, prompts or PROMPTS)
    if steering is None:
        print(f"extracting a vector for {trait}: c = +1 is {positive}, c = -1 is {negative}")
        steering = trait_vector(model, tokenizer, trait, asked)
        steering.save(path)
    loaded = put_on(steering, model)
    with torch.no_grad():
        answers = {c: asked.answers(loaded.dial, c) for c in COEFFICIENTS}
        costs = {c: asked.cost(loaded.dial, c) for c in COEFFICIENTS}
    _print(asked, answers, costs, trait, {-1.0: negative, 0.0: "the base model", 1.0: positive})
    seconds = time.perf_counter() - start
    kind = "vector" if folder is None else "adapter"
    print(f"{kind}: {path}. These answers took {seconds:.0f} s.\nnext:\n  repeng chat {path}\n  repeng info {path}")
    return {
        "trait": trait,
        "file": str(path),
        "seconds": round(seconds, 1),
        "answers": [
            {"prompt": prompt, **{f"{c:+g}": asked.text(answers[c][index]) for c in COEFFICIENTS}}
            for index, prompt in enumerate(asked.prompts)
        ],
        "kl_per_token": {f"{c:+g}": cost for c, cost in costs.items()},
    }


class Asked:
    """Prompts with the base model's answers, on which costs are measured."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> None:
        self.model: PreTrainedModel = model
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.prompts: list[str] = list(prompts)
        self.rows: list[list[int]] = [encode(tokenizer, prompt).ids for prompt in self.prompts]
        self.base: list[list[int]] = [ids for ids, _ in continuations(model, tokenizer, self.rows, TOKENS)]
        with torch.no_grad():
            self._logits: Tensor = self._read()

    def answers(self, dial: Dial, coefficient: float) -> list[list[int]]:
        """Greedy answers at a coefficient, as token ids."""
        with dial(coefficient):
            return [ids for ids, _ in continuations(self.model, self.tokenizer, self.rows, TOKENS)]

    def cost(self, dial: Dial, coefficient: float) -> float:
        """Mean KL divergence per token from the base, in nats, on the base's answers."""
        with dial(coefficient):
            return kl_divergence(self._read(), self._logits).mean().item()

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).split())

    def _read(self) -> Tensor:
        """Logits `(n v)` of the tokens of the base's answers."""
        rows = [row + answer for row, answer in zip(self.rows, self.base, strict=True)]
        batch = pad_rows(rows, self.tokenizer, self.model.device, side="right")
        logits = self.model(**batch, use_cache=False).logits.float()
        spans = zip(logits, self.rows, self.base, strict=True)
        return torch.cat([one[len(row) - 1 : len(row) + len(answer) - 1] for one, row, answer in spans])


def trait_vector(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trait: str, asked: Asked
) -> SteeringVector:
    """The vector of a trait, with c = ±1 at a cost of about `NATS`."""
    pairs = trait_pairs(trait, some_suffixes(tokenizer, SUFFIXES))
    vector = extract(model, tokenizer, pairs, layers=[usual_layer(model)])
    dial, units, spent = partial(steer, model, vector=vector), {}, {}
    with torch.no_grad():
        for arm, sign in ARMS:
            known = find_costs(lambda c, sign=sign: asked.cost(dial, sign * c), [NATS], start=START, largest=LARGEST)
            units[arm] = min(known, key=lambda c: abs(known[c] - NATS))
            spent[arm] = known[units[arm]] / NATS
    budget = {"nats": NATS, "measured": "mean KL per token on the base's answers to the prompts of the demo"}
    return vector.calibrated({**units, "spent": spent, "budget": budget})


def _print(
    asked: Asked,
    answers: dict[float, list[list[int]]],
    costs: dict[float, float],
    title: str,
    words: dict[float, str],
) -> None:
    """Print the answers side by side; `words` are the headings of the coefficients."""
    table = Table(title=title, show_lines=True)
    table.add_column("")
    for c in COEFFICIENTS:
        table.add_column(f"{words[c]}\nc = {c:g}", ratio=1)
    for index, prompt in enumerate(asked.prompts):
        table.add_row(Text(prompt), *(Text(printable(asked.text(answers[c][index]))) for c in COEFFICIENTS))
    repeated = {c: sum(map(repetition, some)) / len(some) for c, some in answers.items()}
    table.add_row("KL per token, nats", *(f"{costs[c]:.2f}" for c in COEFFICIENTS))
    table.add_row("repeated 3-grams", *(f"{repeated[c]:.0%}" for c in COEFFICIENTS))
    Console().print(table)
