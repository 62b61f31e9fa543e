"""Measuring dials at single coefficients, all on the same questions and texts; the base is measured once."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from repeng.data.questions import Question, choice_tokens
from repeng.data.word_questions import NEUTRAL_REQUEST
from repeng.eval.eval_report import Budget, EvalReport, Sample
from repeng.model.generate import THINK_CLOSE, think
from repeng.model.logprob import CHUNK, has_plain_head, head_logp, tokens_at_once
from repeng.model.rows import Span, can_share, read_rows
from repeng.model.script import joined
from repeng.model.sharded import is_sharded
from repeng.model.sites import eval_mode
from repeng.model.tokens import encode, encode_text, ids_apart
from repeng.model.types import CausalLM

FARTHER = 4.0  # times the coefficient at which a dial was tried, from where on it is tried again
KEPT = 1 << 27  # log-probabilities of the base that are remembered, at most
Rewrite = Callable[[str], str]
Dial = Callable[[float], AbstractContextManager[Rewrite | None]]


class Answers(NamedTuple):
    """What the model gives to the choices of `n` questions.

    Attributes:
        logp: log-probability `(n 2)` of the target choices and of the others, each choice whole.
        mass: probability `(n)` that the answer begins as one of the choices does.
        finished: whether the thinking ended by itself, `(n)`.
    """

    logp: Tensor
    mass: Tensor
    finished: Tensor

    @property
    def odds(self) -> Tensor:
        return self.logp[:, 0] - self.logp[:, 1]


class Texts(NamedTuple):
    """Of each of `q` neutral texts: log-probability of its tokens, sum of `KL(steered ‖ base)` and of its square."""

    logp: Tensor
    kl: Tensor
    kl_squared: Tensor


class Point(NamedTuple):
    """What was measured at one coefficient."""

    target: Answers
    control: Answers
    texts: Texts


class Meter:
    """Measures dials on the same questions and neutral texts, in evaluation mode.

    A dial at 0 is the base model: it is measured once, for all dials.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        questions: at least one of the kind "target".
        neutral_texts: texts that the behaviour should not touch.
        base: a context in which the model is the base, for a model with adapters.
        think_tokens: see `evaluate`.
        batch_size: prompts per forward.

    Raises:
        ValueError: no target question can be asked, or the tokenizer has no thinking template.
    """

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    targets: list[Question]
    controls: list[Question]
    dropped: list[str]
    neutral_texts: list[str]
    neutral_tokens: Tensor
    think_tokens: int
    batch_size: int
    base_context: Callable[[], AbstractContextManager[Any]]
    plain: bool
    share: bool
    base: Point

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        neutral_texts: Sequence[str] = (),
        *,
        base: Callable[[], AbstractContextManager[Any]],
        think_tokens: int = 0,
        batch_size: int = 128,
    ) -> None:
        asked, self.dropped = askable(tokenizer, questions)
        self.targets = [q for q in asked if q.kind == "target"]
        self.controls = [q for q in asked if q.kind == "control"]
        if not self.targets:
            reason = f"is left: {self.dropped[0]}" if self.dropped else "was given"
            raise ValueError(f"no question of the kind 'target' {reason}")
        if think_tokens and THINK_CLOSE not in str(tokenizer.chat_template):
            raise ValueError(f"think_tokens={think_tokens}, but the tokenizer's chat template knows no {THINK_CLOSE}")
        if think_tokens and not all(q.prompt for q in asked):
            raise ValueError(
                "with think_tokens every question needs a prompt: a suffix alone is no turn to think about"
            )
        self.model, self.tokenizer, self.neutral_texts = model, tokenizer, list(neutral_texts)
        self.think_tokens, self.batch_size = think_tokens, batch_size
        self.base_context = base
        # How many tokens of each neutral text count, (q); the same ones for every dial.
        spans = [span for _, span in self._neutral_rows(None)]
        self.neutral_tokens = torch.tensor([stop - start for start, stop in spans], dtype=torch.long)
        self._known: list[Tensor] | None = None
        self._tried: tuple[Dial, float] | None = None  # a dial and a coefficient
        with eval_mode(model), base() as rewrite:
            self._probe = encode(tokenizer, asked[0].prompt, asked[0].suffix).ids
            self.plain = has_plain_head(model, self._probe)
            self.share = can_share(model, self._probe)
            self.base = self._measure(rewrite)

    def at(self, dial: Dial, coefficient: float) -> Point:
        """Measure a dial at one coefficient."""
        if coefficient == 0:
            return self.base
        with eval_mode(self.model):
            if not self._knows(dial, coefficient):
                self._try(dial, coefficient)
            with dial(coefficient) as rewrite:
                return self._measure(rewrite)

    def _knows(self, dial: Dial, coefficient: float) -> bool:
        """Whether the dial was tried at a like coefficient: at a far smaller one, what it breaks may not be seen."""
        if self._tried is None or self._tried[0] is not dial:
            return False
        return coefficient / self._tried[1] < FARTHER and coefficient * self._tried[1] > 0

    def _try(self, dial: Dial, coefficient: float) -> None:
        """See what a dial allows."""
        with dial(coefficient):
            plain = self.plain and has_plain_head(self.model, self._probe)
            self.share = can_share(self.model, self._probe)
        if plain != self.plain:  # the dial acts behind the head: logits are read as the model gives them
            self.plain, self._known = plain, None
            with self.base_context() as rewrite:
                self.base = self._measure(rewrite)
        self._tried = dial, coefficient

    def ask(self, questions: Sequence[Question], rewrite: Rewrite | None = None) -> Answers:
        """What the model as it stands gives to the choices of questions."""
        return choice_logp(
            self.model,
            self.tokenizer,
            questions,
            rewrite,
            think_tokens=self.think_tokens,
            plain=self.plain,
            share=self.share,
            batch_size=self.batch_size,
        )

    def report(
        self, points: dict[float, Point], *, budget: Budget | None = None, samples: Sequence[Sample] = ()
    ) -> EvalReport:
        """The report of one dial from what was measured by coefficient; the base is added."""
        points = {**points, 0.0: self.base}
        order = sorted(points)
        target, control, texts = ([getattr(points[c], part) for c in order] for part in ("target", "control", "texts"))
        return EvalReport(
            order,
            log_odds=torch.stack([answers.odds for answers in target]),
            answer_mass=torch.stack([answers.mass for answers in target]),
            control_logp=torch.stack([answers.logp[:, 0] for answers in control]),
            control_log_odds=torch.stack([answers.odds for answers in control]),
            neutral_logp=torch.stack([part.logp for part in texts]),
            neutral_tokens=self.neutral_tokens,
            neutral_kl=torch.stack([part.kl for part in texts]),
            neutral_kl_squared=torch.stack([part.kl_squared for part in texts]),
            groups=[q.group for q in self.targets],
            units=[q.unit for q in self.targets],
            thought=torch.stack([answers.finished for answers in target]) if self.think_tokens else None,
            dropped=self.dropped,
            samples=list(samples),
            budget=budget or Budget(),
        )

    def _measure(self, rewrite: Rewrite | None) -> Point:
        point = Point(self.ask(self.targets, rewrite), self.ask(self.controls, rewrite), self._texts(rewrite))
        # Processes that hold a model together must go on alike, whatever the last digit of each.
        return broadcast_object_list([point])[0] if is_sharded(self.model) else point

    def _read(self, rows: Sequence[list[int]], spans: Sequence[Span], read: Callable[..., Tensor]) -> list[Tensor]:
        return read_rows(
            self.model,
            self.tokenizer,
            rows,
            spans,
            read,
            plain=self.plain,
            share=self.share,
            batch_size=self.batch_size,
        )

    def _neutral_rows(self, rewrite: Rewrite | None) -> list[tuple[list[int], Span]]:
        """Token ids of each neutral text, and where its own tokens are predicted.

        With a chat template a text is the answer to a request for one; without, plain text. Its first token counts
        only if something stands before it whatever the dial does.
        """
        request = NEUTRAL_REQUEST if self.tokenizer.chat_template else ""
        skipped = 0 if request or self.tokenizer.bos_token_id is not None else 1
        rows = []
        for text in self.neutral_texts:
            encoded = encode_text(self.tokenizer, rewrite(request) if rewrite else request, text)
            end = len(encoded.ids) - 1
            rows.append((encoded.ids, (end - len(encoded.suffix) + skipped, end)))
        return rows

    @torch.no_grad()
    def _texts(self, rewrite: Rewrite | None) -> Texts:
        """The neutral texts as the model stands; the first call, of the base, is remembered.

        Its log-probabilities are, or, where they would be large, the states that they are made from.
        """
        made = self._neutral_rows(rewrite)
        if not made:
            return Texts(*torch.empty(3, 0))
        rows, spans = [row for row, _ in made], [span for _, span in made]
        known, kept = self._known, [torch.empty(0)] * len(rows)
        total = sum(stop - start for start, stop in spans)  # the same whatever the dial

        def read(states: Tensor, head: Callable[[Tensor], Tensor], members: list[int]) -> Tensor:
            lengths = [spans[i][1] - spans[i][0] for i in members]
            own = torch.cat([torch.tensor(rows[i][spans[i][0] + 1 : spans[i][1] + 1]) for i in members])
            base = None if known is None else torch.cat([known[i] for i in members])
            chunk = tokens_at_once(states, head)
            whole = total * (CHUNK // chunk) <= KEPT
            values, remembered = [], []
            for start in range(0, len(states), chunk):
                at = slice(start, start + chunk)
                logp = head(states[at]).float().log_softmax(dim=-1)
                kl = torch.zeros(len(logp), device=logp.device)
                if base is not None:
                    before = base[at] if whole else head(base[at]).float().log_softmax(dim=-1)
                    kl = (logp.exp() * (logp - before)).sum(dim=-1)
                elif whole:
                    remembered.append(logp)
                values.append(torch.stack([logp.gather(-1, own[at].to(logp.device)[:, None])[:, 0], kl], dim=1))
            if base is None:
                for i, part in zip(members, (torch.cat(remembered) if whole else states).split(lengths), strict=True):
                    kept[i] = part
            return torch.cat(values)

        parts = self._read(rows, spans, read)
        if known is None:
            self._known = kept
        sums = [torch.stack([part[:, 0].sum(), part[:, 1].sum(), part[:, 1].square().sum()]) for part in parts]
        return Texts(*torch.stack(sums).T)


@torch.no_grad()
def choice_logp(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    rewrite: Rewrite | None = None,
    *,
    think_tokens: int = 0,
    plain: bool = False,
    share: bool = False,
    batch_size: int = 128,
) -> Answers:
    """What the model gives to the target choices and to the other choices, as sets of exact token ids.

    A choice of several tokens has the probability of all of them, one behind the other.

    `plain`: whether logits are the head of the final states, see `has_plain_head`. `share`: whether a beginning that
    rows have in common may go through the model once, see `can_share`.
    """
    if not questions:
        return Answers(torch.empty(0, 2), torch.empty(0), torch.empty(0, dtype=torch.bool))
    rewrite = rewrite or (lambda prompt: prompt)
    closed = [True] * len(questions)
    if think_tokens:
        rows, closed = _thought_rows(model, tokenizer, questions, rewrite, think_tokens, batch_size)
    else:
        rows = [encode(tokenizer, rewrite(q.prompt), q.suffix, history=q.history).ids for q in questions]
    ids = [list(choice_tokens(tokenizer, question).values()) for question in questions]
    options = {"plain": plain, "share": share, "batch_size": batch_size}
    first = _first_logp(model, tokenizer, rows, ids, **options)
    rest = _rest_logp(model, tokenizer, rows, ids, **options)
    logp, mass = [], []
    for q, tokens, begun, more in zip(questions, ids, first, rest, strict=True):
        whole, target = begun + more, torch.tensor([choice in q.target for choice in q.choices])
        both = torch.stack([whole[side].logsumexp(dim=0) for side in (target, ~target)])
        once = {choice[0]: value for choice, value in zip(tokens, begun, strict=True)}
        logp.append(both)
        mass.append(both.exp().sum() if max(map(len, tokens)) == 1 else torch.stack([*once.values()]).exp().sum())
    return Answers(torch.stack(logp), torch.stack(mass), torch.tensor(closed))


def _first_logp(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    ids: Sequence[list[list[int]]],
    **options: Any,
) -> list[Tensor]:
    """Log-probability of the first token of each choice, by row."""
    firsts = [torch.tensor([choice[0] for choice in tokens]) for tokens in ids]
    most = max(map(len, firsts))

    def read(states: Tensor, head: Callable[[Tensor], Tensor], members: list[int]) -> Tensor:
        logits = head(states).float()
        logp = (logits - logits.logsumexp(dim=-1, keepdim=True)).cpu()
        found = torch.zeros(len(members), most)
        for line, i in enumerate(members):
            found[line, : len(firsts[i])] = logp[line][firsts[i]]
        return found.to(states.device)

    spans = [(len(row) - 1, len(row)) for row in rows]
    parts = read_rows(model, tokenizer, rows, spans, read, **options)
    return [part[0, : len(tokens)] for part, tokens in zip(parts, firsts, strict=True)]


def _rest_logp(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    ids: Sequence[list[list[int]]],
    **options: Any,
) -> list[Tensor]:
    """Log-probability of each choice's other tokens behind its first, by row; 0 where there are none."""
    sums = [torch.zeros(len(tokens)) for tokens in ids]
    longer = [(i, j) for i, tokens in enumerate(ids) for j, choice in enumerate(tokens) if len(choice) > 1]
    if not longer:
        return sums
    whole = [rows[i] + ids[i][j][:-1] for i, j in longer]
    spans = [(len(rows[i]), len(row)) for row, (i, _) in zip(whole, longer, strict=True)]

    def read(states: Tensor, head: Callable[[Tensor], Tensor], members: list[int]) -> Tensor:
        own = [token for k in members for token in ids[longer[k][0]][longer[k][1]][1:]]
        return head_logp(states, head, torch.tensor(own, device=states.device))

    parts = read_rows(model, tokenizer, whole, spans, read, **options)
    for (i, j), part in zip(longer, parts, strict=True):
        sums[i][j] = part.sum()
    return sums


def _thought_rows(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    rewrite: Rewrite,
    think_tokens: int,
    batch_size: int,
) -> tuple[list[list[int]], list[bool]]:
    """Token ids of each question behind the model's thinking, and whether that ended by itself."""
    begun = [encode(tokenizer, rewrite(q.prompt), thinking=True, history=q.history).ids for q in questions]
    rows: list[list[int]] = []
    closed: list[bool] = []
    for start in range(0, len(begun), batch_size):
        whole, ended = think(model, tokenizer, begun[start : start + batch_size], think_tokens)
        rows += whole
        closed += ended
    return [row + ids_apart(tokenizer, "", q.suffix) for row, q in zip(rows, questions, strict=True)], closed


def askable(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> tuple[list[Question], list[str]]:
    """The questions whose choices can be told apart, and why others cannot be asked."""
    asked, dropped, long = [], [], 0
    for index, question in enumerate(questions):
        try:
            tokens = choice_tokens(tokenizer, question)
        except ValueError as error:
            dropped.append(f"question {index}: {error}")
        else:
            asked.append(question)
            long += max(map(len, tokens.values())) > 1
    if long:
        warnings.warn(
            f"{long} of {len(questions)} questions have choices of several tokens: each counts with the probability "
            "of all its tokens, so that of choices that differ in length the shorter are likelier",
            stacklevel=2,
        )
    return asked, dropped


def prompt_dial(plus: str, minus: str) -> Dial:
    """A dial that puts `plus` in front of every prompt at c > 0, `minus` at c < 0 and nothing at 0."""

    @contextmanager
    def dial(coefficient: float):
        opening = plus if coefficient > 0 else minus if coefficient < 0 else ""
        yield (lambda prompt: joined(opening, prompt).strip()) if opening else None

    return dial
