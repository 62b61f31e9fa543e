"""What a dial does: log-odds of target answers, what it generates, and what happens to everything else.

A dial is a function from a coefficient to a context manager. Adapters and vectors change the model inside the context;
a prompt changes no model but yields a function that rewrites the prompt of each question.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from repeng.data.questions import Question, choice_ids
from repeng.data.tokens import Encoded, encode, label_mask, pad_rows
from repeng.eval.eval_report import Budget, EvalReport
from repeng.eval.samples import draw_samples
from repeng.model.generate import THINK_CLOSE, think
from repeng.model.logprob import has_plain_head, head_logp, read_vocabulary
from repeng.model.sites import eval_mode
from repeng.model.types import CausalLM

Rewrite = Callable[[str], str]
Dial = Callable[[float], AbstractContextManager[Rewrite | None]]
ADAPTER_COEFFICIENTS = tuple(sign * step / 4 for sign in (-1, 1) for step in range(1, 9))
SAMPLED = (-1.0, 0.0, 1.0)
NEUTRAL_REQUEST = "Write a short text."


@torch.no_grad()
def evaluate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    dial: Dial,
    coefficients: Sequence[float],
    *,
    neutral_texts: Sequence[str] = (),
    budget: Budget | None = None,
    think_tokens: int = 0,
    sample_prompts: Sequence[str | Question] = (),
    sample_tokens: int = 24,
    accepts: Callable[[str], bool] | None = None,
    batch_size: int = 128,
) -> EvalReport:
    """Measure `dial` at each coefficient, and at 0, in evaluation mode.

    Answers are read as log-probabilities of the exact token ids that begin the choices. A question whose choices do
    not begin with different tokens is dropped, and the report says so.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        questions: at least one of the kind "target".
        dial: what is measured.
        coefficients: where; 0 is added.
        neutral_texts: texts that the behaviour should not touch.
        budget: what steering may cost.
        think_tokens: with a thinking template, how many tokens the steered model may think (greedily) before each
            answer; the thinking is closed for it where that is not enough. 0 asks for the answer at once.
        sample_prompts: prompts, or questions, that are continued (greedily) at c = −1, 0 and +1, where those are
            evaluated.
        sample_tokens: the longest continuation.
        accepts: says of a generated sentence whether it belongs to the language.
        batch_size: prompts a forward.

    Raises:
        ValueError: no target question can be asked, or the tokenizer has no thinking template.
    """
    asked, dropped = _askable(tokenizer, questions)
    targets = [q for q in asked if q.kind == "target"]
    controls = [q for q in asked if q.kind == "control"]
    if not targets:
        reason = f"is left: {dropped[0]}" if dropped else "was given"
        raise ValueError(f"no question of the kind 'target' {reason}")
    if think_tokens and THINK_CLOSE not in str(tokenizer.chat_template):
        raise ValueError(f"think_tokens={think_tokens}, but the tokenizer's chat template knows no {THINK_CLOSE}")
    if think_tokens and not all(q.prompt for q in asked):
        raise ValueError("with think_tokens every question needs a prompt: a suffix alone is no turn to think about")
    coefficients = sorted({0.0, *map(float, coefficients)})
    parts, samples, tokens = [], [], torch.empty(0)
    with eval_mode(model):
        plain = bool(neutral_texts) and has_plain_head(model, encode(tokenizer, "", neutral_texts[0]).ids)
        for c in coefficients:
            with dial(c) as rewrite:
                target = choice_logp(model, tokenizer, targets, rewrite, batch_size, think_tokens)
                control = choice_logp(model, tokenizer, controls, rewrite, batch_size, think_tokens)
                neutral, tokens = _neutral_logp(model, tokenizer, neutral_texts, rewrite, batch_size, plain)
                prompts = sample_prompts if c in SAMPLED else ()
                samples += draw_samples(model, tokenizer, prompts, rewrite, c, sample_tokens, accepts, batch_size)
            parts.append((target.odds, target.mass, control.logp[:, 0], control.odds, neutral, target.finished))
    odds, mass, control_logp, control_odds, neutral_logp, finished = map(torch.stack, zip(*parts, strict=True))
    return EvalReport(
        coefficients,
        odds,
        mass,
        control_logp,
        control_odds,
        neutral_logp,
        tokens,
        groups=[q.group for q in targets],
        units=[q.unit for q in targets],
        thought=finished if think_tokens else None,
        dropped=dropped,
        samples=samples,
        budget=budget or Budget(),
    )


def _askable(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> tuple[list[Question], list[str]]:
    """The questions whose choices can be told apart by their first tokens, and why others cannot be asked."""
    asked, dropped = [], []
    for index, question in enumerate(questions):
        try:
            choice_ids(tokenizer, question)
        except ValueError as error:
            dropped.append(f"question {index}: {error}")
        else:
            asked.append(question)
    return asked, dropped


class Answers(NamedTuple):
    """Log-probability `(n 2)` of the target choices and of the others; whether the thinking ended by itself `(n)`."""

    logp: Tensor
    finished: Tensor

    @property
    def odds(self) -> Tensor:
        return self.logp[:, 0] - self.logp[:, 1]

    @property
    def mass(self) -> Tensor:
        return self.logp.exp().sum(dim=1)


def choice_logp(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    rewrite: Rewrite | None,
    batch_size: int,
    think_tokens: int = 0,
) -> Answers:
    """What the model gives to the target choices and to the other choices, as sets of exact token ids."""
    rewrite = rewrite or (lambda prompt: prompt)
    parts, finished = [torch.empty(0, 2)], [torch.empty(0, dtype=torch.bool)]
    for start in range(0, len(questions), batch_size):
        chunk = questions[start : start + batch_size]
        if think_tokens:
            begun = [encode(tokenizer, rewrite(q.prompt), thinking=True).ids for q in chunk]
            rows, closed = think(model, tokenizer, begun, think_tokens)
            suffixes = [encode(tokenizer, "", q.suffix).suffix if q.suffix else [] for q in chunk]
            rows = [row + suffix for row, suffix in zip(rows, suffixes, strict=True)]
        else:
            rows, closed = [encode(tokenizer, rewrite(q.prompt), q.suffix).ids for q in chunk], [True] * len(chunk)
        finished.append(torch.tensor(closed))
        batch = pad_rows(rows, tokenizer, model.device, side="left")
        logits = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        logp = (logits - logits.logsumexp(dim=-1, keepdim=True)).cpu()
        for question, row in zip(chunk, logp, strict=True):
            ids = choice_ids(tokenizer, question)
            sides = [
                torch.stack([row[ids[c]] for c in question.choices if (c in question.target) == wanted])
                for wanted in (True, False)
            ]
            parts.append(torch.stack([side.logsumexp(dim=0) for side in sides])[None])
    return Answers(torch.cat(parts), torch.cat(finished))


def _neutral_logp(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    rewrite: Rewrite | None,
    batch_size: int,
    plain: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probability `(q)` of each text's own tokens, and how many they are `(q)`, the same ones for every dial.

    With a chat template a text is the answer to a request for one; without, plain text. Its first token counts only if
    something stands before it whatever the dial does.
    """
    request = NEUTRAL_REQUEST if tokenizer.chat_template else ""
    prompt = rewrite(request) if rewrite else request
    skipped = 0 if request or tokenizer.bos_token_id is not None else 1
    totals, counts = [torch.empty(0)], [torch.empty(0, dtype=torch.long)]
    for start in range(0, len(texts), batch_size):
        encoded: list[Encoded] = [encode(tokenizer, prompt, text) for text in texts[start : start + batch_size]]
        batch = pad_rows([e.ids for e in encoded], tokenizer, model.device, side="left")
        mask = label_mask(batch["attention_mask"])
        own = torch.tensor([len(e.suffix) - skipped for e in encoded], device=mask.device)
        mask &= torch.arange(mask.shape[1], device=mask.device) >= mask.shape[1] - own[:, None]
        ids = batch["input_ids"][:, 1:][mask]
        (logp,) = read_vocabulary(
            model, batch, lambda hs, head, m=mask, i=ids: [head_logp(hs[:, :-1][m], head, i)], plain=plain
        )
        totals.append(torch.stack([row.sum() for row in logp.cpu().split(mask.sum(dim=1).tolist())]))
        counts.append(mask.sum(dim=1).cpu())
    return torch.cat(totals), torch.cat(counts)


def prompt_dial(plus: str, minus: str) -> Dial:
    """A dial that puts `plus` in front of every prompt at c > 0, `minus` at c < 0 and nothing at 0."""

    @contextmanager
    def dial(coefficient: float):
        opening = plus if coefficient > 0 else minus if coefficient < 0 else ""
        yield (lambda prompt: f"{opening} {prompt}".strip()) if opening else None

    return dial
