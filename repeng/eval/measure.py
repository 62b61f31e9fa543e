"""Measure dials at single coefficients, all on the same questions and texts. The base is measured once."""

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

FARTHER = 4.0  # a dial is tried again at a coefficient this many times as large as the tried one
KEPT = 1 << 27  # largest number of log-probabilities of the base to keep in memory
Rewrite = Callable[[str], str]
Dial = Callable[[float], AbstractContextManager[Rewrite | None]]


class Answers(NamedTuple):
    """Probabilities of the choices of `n` questions.

    Attributes:
        logp: log-probabilities `(n 2)` of the target choices and of the other choices, over all tokens of a choice.
        mass: probability `(n)` of all choices together. If a question has a choice of several tokens, the probability
            of the first tokens of its choices.
        finished: `(n)`, whether the thinking ended by itself.
    """

    logp: Tensor
    mass: Tensor
    finished: Tensor

    @property
    def odds(self) -> Tensor:
        return self.logp[:, 0] - self.logp[:, 1]


class Texts(NamedTuple):
    """Sums over the tokens of each of `q` neutral texts: log-probability, `KL(steered ‖ base)`, and its square."""

    logp: Tensor
    kl: Tensor
    kl_squared: Tensor


class Point(NamedTuple):
    """The measurements at one coefficient."""

    target: Answers
    control: Answers
    texts: Texts


class Meter:
    """Measures dials on the same questions and neutral texts, in evaluation mode.

    A dial at 0 is the base model, which is measured once for all dials.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        questions: the questions; at least one must be of the kind "target".
        neutral_texts: texts that have nothing to do with the behaviour; steering should not change them.
        base: function that opens a context in which the model is the base, for example with its adapters off.
        think_tokens: see `evaluate`.
        batch_size: prompts per forward pass.

    Raises:
        ValueError: no target question can be asked; or `think_tokens` is given and the chat template has no thinking,
            or a question has no prompt.
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
            reason = f"can be asked; the first problem is: {self.dropped[0]}" if self.dropped else "was given"
            raise ValueError(f"no question of the kind 'target' {reason}")
        if think_tokens and THINK_CLOSE not in str(tokenizer.chat_template):
            raise ValueError(f"think_tokens={think_tokens}, but the tokenizer's chat template has no {THINK_CLOSE}")
        if think_tokens and not all(q.prompt for q in asked):
            raise ValueError(
                "with think_tokens every question needs a prompt: the model cannot think about a suffix alone"
            )
        self.model, self.tokenizer, self.neutral_texts = model, tokenizer, list(neutral_texts)
        self.think_tokens, self.batch_size = think_tokens, batch_size
        self.base_context = base
        # Number of tokens of each neutral text that count, (q). They are the same tokens for every dial.
        spans = [span for _, span in self._neutral_rows(None)]
        self.neutral_tokens = torch.tensor([stop - start for start, stop in spans], dtype=torch.long)
        self._known: list[Tensor] | None = None
        self._tried: tuple[Dial, float] | None = None  # the last tried dial, and at which coefficient
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
        """Whether the dial was tried at a similar coefficient; a far smaller one may hide what breaks here."""
        if self._tried is None or self._tried[0] is not dial:
            return False
        return coefficient / self._tried[1] < FARTHER and coefficient * self._tried[1] > 0

    def _try(self, dial: Dial, coefficient: float) -> None:
        """Find out whether, with this dial, rows can share a prefix and logits are the head of the final states."""
        with dial(coefficient):
            plain = self.plain and has_plain_head(self.model, self._probe)
            self.share = can_share(self.model, self._probe)
        if plain != self.plain:  # the dial changes what follows the head: use the logits that the model returns
            self.plain, self._known = plain, None
            with self.base_context() as rewrite:
                self.base = self._measure(rewrite)
        self._tried = dial, coefficient

    def ask(self, questions: Sequence[Question], rewrite: Rewrite | None = None) -> Answers:
        """Answers of the model in its present state to questions."""
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
        """Make the report of one dial from its measurements by coefficient; the base is added."""
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
        # The processes of a sharded model must take the same decisions, even if their last digits differ.
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
        """Token ids of each neutral text, and the span of positions that predict its tokens.

        With a chat template, the text is the answer to a request for a text. Without a chat template, it is plain
        text. Its first token counts only if other tokens precede it with every dial.
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
        """Measure the neutral texts with the model in its present state.

        The first call is for the base. It stores the log-probabilities of the base, or, if they would take too much
        memory, the hidden states from which they are computed.
        """
        made = self._neutral_rows(rewrite)
        if not made:
            return Texts(*torch.empty(3, 0))
        rows, spans = [row for row, _ in made], [span for _, span in made]
        known, kept = self._known, [torch.empty(0)] * len(rows)
        total = sum(stop - start for start, stop in spans)  # the same for every dial

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
    """Probabilities of the target choices and of the other choices, read at their exact token ids.

    The probability of a choice is the product over all of its tokens.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        questions: the questions.
        rewrite: function that changes the prompt of each question.
        think_tokens: see `evaluate`.
        plain: whether the logits are the head applied to the final hidden states, see `has_plain_head`.
        share: whether a prefix that rows have in common may go through the model only once, see `can_share`.
        batch_size: prompts per forward pass.
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
    """Log-probabilities of the first tokens of all choices, one tensor per row."""
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
    """Log-probabilities of all tokens of a choice after its first, one tensor per row; 0 for choices of one token."""
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
    """Token ids of each question together with the model's thinking, and whether the thinking ended by itself."""
    begun = [encode(tokenizer, rewrite(q.prompt), thinking=True, history=q.history).ids for q in questions]
    rows: list[list[int]] = []
    closed: list[bool] = []
    for start in range(0, len(begun), batch_size):
        whole, ended = think(model, tokenizer, begun[start : start + batch_size], think_tokens)
        rows += whole
        closed += ended
    return [row + ids_apart(tokenizer, "", q.suffix) for row, q in zip(rows, questions, strict=True)], closed


def askable(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> tuple[list[Question], list[str]]:
    """The questions whose choices can be told apart, and for each of the other questions the reason."""
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
            f"{long} of {len(questions)} questions have choices of several tokens. The probability of such a choice "
            "is the product over its tokens, so a shorter choice tends to be likelier than a longer one",
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
