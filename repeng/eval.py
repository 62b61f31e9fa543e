"""What a dial does: log-odds of target answers, and what happens to everything else.

A dial is a function from a coefficient to a context manager. Adapters and vectors change the model inside the context;
a prompt changes no model but yields a function that rewrites the prompt of each question.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repeng.data import encode, label_mask, nearest, pad_rows, read_jsonl
from repeng.logprob import next_token_logp

Rewrite = Callable[[str], str]
Dial = Callable[[float], AbstractContextManager[Rewrite | None]]
CLUSTERS = ("target", "control")


@dataclass(frozen=True)
class Question:
    """A prompt whose next token is one of `choices`; those in `target` are the answers that +1 should favour.

    In the cluster "control", `target` holds the right answer, which steering should leave alone. `suffix` is the
    beginning of the answer, as in `ContrastPair`.
    """

    prompt: str
    choices: tuple[str, ...]
    target: tuple[str, ...]
    cluster: str = "target"
    suffix: str = ""

    def __post_init__(self) -> None:
        if not set(self.target) < set(self.choices):
            raise ValueError(f"target {self.target} must be some, not all, of choices {self.choices}")
        if self.cluster not in CLUSTERS:
            raise ValueError(f"unknown cluster {self.cluster!r}; choose one of {', '.join(CLUSTERS)}")


@dataclass(frozen=True)
class Budget:
    """What steering may cost against c = 0, in probability and nats."""

    answer_mass: float = 0.05
    neutral_nll: float = 0.08
    control_logp: float = 0.1


@dataclass
class EvalReport:
    """Measurements at each coefficient; index 0 of every tensor goes with `coefficients`.

    `log_odds (n_c n)` in nats and `answer_mass (n_c n)` in probability of the target questions; `control_logp (n_c m)`
    of the right answers of controls; `neutral_nll (n_c)` in nats a token. Without controls or texts: empty, NaN.
    """

    coefficients: list[float]
    log_odds: Tensor
    answer_mass: Tensor
    control_logp: Tensor
    neutral_nll: Tensor
    budget: Budget = field(default_factory=Budget)

    def at(self, coefficient: float) -> int:
        """Index of a coefficient.

        Raises:
            ValueError: it was not evaluated.
        """
        if coefficient not in self.coefficients:
            raise ValueError(f"coefficient {coefficient} was not evaluated; {self.coefficients} were")
        return self.coefficients.index(coefficient)

    def mean_log_odds(self, coefficient: float) -> float:
        return self.log_odds[self.at(coefficient)].mean().item()

    def cost(self, coefficient: float) -> dict[str, float]:
        """How much worse each budgeted quantity is than at c = 0; positive is worse."""
        here, base = self.at(coefficient), self.at(0.0)
        costs = {"answer_mass": (self.answer_mass[base].mean() - self.answer_mass[here].mean()).item()}
        if self.control_logp.shape[1]:
            costs["control_logp"] = (self.control_logp[base].mean() - self.control_logp[here].mean()).item()
        if not self.neutral_nll[base].isnan():
            costs["neutral_nll"] = (self.neutral_nll[here] - self.neutral_nll[base]).item()
        return costs

    def inside_budget(self, coefficient: float) -> bool:
        """Whether every cost is at most its budget; a NaN is outside."""
        return all(cost <= getattr(self.budget, name) for name, cost in self.cost(coefficient).items())

    def arm(self, sign: int) -> tuple[float, float | None]:
        """Largest gain in mean log-odds, in the direction of `sign`, at a coefficient of that sign inside the budget,
        and that coefficient; (0, None) if no coefficient gains."""
        base = self.mean_log_odds(0.0)
        best, where = 0.0, None
        for c in self.coefficients:
            gain = sign * (self.mean_log_odds(c) - base)
            if c * sign > 0 and gain > best and self.inside_budget(c):
                best, where = gain, c
        return best, where

    @property
    def range(self) -> float:
        """Sum of both arms: how far the dial moves the behaviour inside the budget, in nats."""
        return self.arm(+1)[0] + self.arm(-1)[0]

    @property
    def wrong_way(self) -> float:
        """Share of target items that move against the arm, at each arm's best coefficient, mean over arms."""
        base = self.log_odds[self.at(0.0)]
        shares = []
        for sign in (+1, -1):
            where = self.arm(sign)[1]
            if where is not None:
                shares.append((sign * (self.log_odds[self.at(where)] - base) < 0).float().mean().item())
        return sum(shares) / len(shares) if shares else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Summaries at every coefficient, and the range; JSON-serialisable."""
        rows = []
        for index, c in enumerate(self.coefficients):
            row = {"coefficient": c, "log_odds": self.mean_log_odds(c), "answer_mass": self.answer_mass[index].mean()}
            if self.control_logp.shape[1]:
                row["control_logp"] = self.control_logp[index].mean()
            if not self.neutral_nll[index].isnan():
                row["neutral_nll"] = self.neutral_nll[index]
            row = {name: round(float(value), 6) for name, value in row.items()}
            rows.append({**row, "inside_budget": self.inside_budget(c)})
        arms = {name: dict(zip(("gain", "coefficient"), self.arm(sign), strict=True)) for name, sign in ARMS}
        return {"range": self.range, "arms": arms, "wrong_way": self.wrong_way, "at": rows}


ARMS = (("plus", +1), ("minus", -1))


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    dial: Dial,
    coefficients: Sequence[float],
    *,
    neutral_texts: Sequence[str] = (),
    budget: Budget | None = None,
    batch_size: int = 128,
) -> EvalReport:
    """Measure `dial` at each coefficient, and at 0, in evaluation mode, by log-probabilities.

    Raises:
        ValueError: no target question, or two choices of a question begin with the same token.
    """
    targets = [q for q in questions if q.cluster == "target"]
    controls = [q for q in questions if q.cluster == "control"]
    if not targets:
        raise ValueError("no question of the cluster 'target' was given")
    coefficients = sorted({0.0, *map(float, coefficients)})
    was_training = model.training
    model.eval()
    try:
        parts = []
        for c in coefficients:
            with dial(c) as rewrite:
                target = choice_logp(model, tokenizer, targets, rewrite, batch_size)
                control = choice_logp(model, tokenizer, controls, rewrite, batch_size)
                nll = neutral_nll(model, tokenizer, neutral_texts, rewrite, batch_size)
            parts.append((target[:, 0] - target[:, 1], target.exp().sum(dim=1), control[:, 0], nll))
    finally:
        model.train(was_training)
    stacked = [torch.stack(part) for part in zip(*parts, strict=True)]
    return EvalReport(coefficients, *stacked, budget=budget or Budget())


def choice_logp(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    rewrite: Rewrite | None,
    batch_size: int,
) -> Tensor:
    """Log-probability `(n 2)` of the target choices and of the other choices, as sets of exact token ids."""
    rewrite = rewrite or (lambda prompt: prompt)
    parts = [torch.empty(0, 2)]
    for start in range(0, len(questions), batch_size):
        chunk = questions[start : start + batch_size]
        rows = [encode(tokenizer, rewrite(q.prompt), q.suffix).ids for q in chunk]
        logits = model(**pad_rows(rows, tokenizer, model.device, side="left"), use_cache=False).logits[:, -1].float()
        logp = (logits - logits.logsumexp(dim=-1, keepdim=True)).cpu()
        for question, row in zip(chunk, logp, strict=True):
            ids = choice_ids(tokenizer, question)
            sides = [
                torch.stack([row[ids[c]] for c in question.choices if (c in question.target) == wanted])
                for wanted in (True, False)
            ]
            parts.append(torch.stack([side.logsumexp(dim=0) for side in sides])[None])
    return torch.cat(parts)


def choice_ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> dict[str, int]:
    """The first token of each choice as it follows the prompt.

    Raises:
        ValueError: two choices begin with the same token, or one has none.
    """
    ids = {choice: choice_id(tokenizer, question, choice) for choice in question.choices}
    if None in ids.values():
        raise ValueError(f"this tokenizer has no token for one of the choices {question.choices}; reword it")
    if len(set(ids.values())) < len(ids):
        raise ValueError(f"choices {question.choices} do not begin with different tokens; rename them")
    return ids


def choice_id(tokenizer: PreTrainedTokenizerBase, question: Question, choice: str) -> int | None:
    """The first token of `choice` as it follows the question: without a space where it opens the assistant's turn.

    None if the tokenizer turns the choice into nothing.
    """
    opens_turn = bool(tokenizer.chat_template) and question.prompt and not question.suffix
    ids = tokenizer(choice if opens_turn else f" {choice}", add_special_tokens=False)["input_ids"]
    return ids[0] if ids else None


def neutral_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    rewrite: Rewrite | None,
    batch_size: int,
) -> Tensor:
    """Mean negative log-likelihood of the texts' own tokens, nats a token; NaN without texts."""
    prompt = rewrite("") if rewrite else ""
    total, count = 0.0, 0
    for start in range(0, len(texts), batch_size):
        encoded = [encode(tokenizer, prompt, text) for text in texts[start : start + batch_size]]
        batch = pad_rows([e.ids for e in encoded], tokenizer, model.device, side="left")
        logp = next_token_logp(model(**batch, use_cache=False).logits, batch["input_ids"])
        own = torch.tensor([len(e.suffix) for e in encoded], device=logp.device)
        width = logp.shape[1]
        mask = label_mask(batch["attention_mask"])
        mask &= torch.arange(width, device=logp.device) >= width - own[:, None]
        total -= logp[mask].sum().item()
        count += int(mask.sum())
    return torch.tensor(total / count if count else float("nan"))


def prompt_dial(plus: str, minus: str) -> Dial:
    """A dial that puts `plus` in front of every prompt at c > 0, `minus` at c < 0 and nothing at 0."""

    @contextmanager
    def dial(coefficient: float):
        opening = plus if coefficient > 0 else minus if coefficient < 0 else ""
        yield (lambda prompt: f"{opening} {prompt}".strip()) if opening else None

    return dial


def load_questions(path: str | Path) -> list[Question]:
    """Questions from JSON Lines: `choices`, `target` (a text or a list), `prompt` or `suffix` or both, `cluster`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, or a line (numbered from 1) is not such an object.
    """
    allowed = ("prompt", "suffix", "choices", "target", "cluster")
    questions = []
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        for key in row:
            if key not in allowed:
                raise ValueError(f"{where}: unknown key {key!r}{nearest(key, allowed)}; keys are {', '.join(allowed)}")
        target = [row["target"]] if isinstance(row.get("target"), str) else row.get("target")
        if not (row.get("prompt") or row.get("suffix")) or not row.get("choices") or not target:
            raise ValueError(f"{where}: each line needs choices, target, and a prompt or a suffix")
        try:
            questions.append(
                Question(
                    row.get("prompt", ""), tuple(row["choices"]), tuple(target), row.get("cluster", "target"),
                    row.get("suffix", ""),
                )
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return questions
