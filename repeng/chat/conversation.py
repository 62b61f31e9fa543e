"""Answers at several coefficients in one batch, and what the coefficients change in them."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from queue import SimpleQueue
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from repeng.control.dials import Dials
from repeng.data.files import nearest
from repeng.data.lengths import positions
from repeng.model.generate import bare_generation, ends_and_pad
from repeng.model.logprob import kl_divergence
from repeng.model.tokens import encode, pad_rows
from repeng.serve.decoding import CONTEXT, TextStream
from repeng.serve.limits import Limits
from repeng.serve.sampling import Sampler, Sampling

HOTTEST = 2.0  # temperature, as `repeng serve` allows it
LARGEST = Limits().max_coefficient
POLL = 0.1  # seconds between two looks at whether a waiting answer is still wanted
NO_NUMBERS = "the model gives NaN or infinite logits at these coefficients; give smaller ones"


class Column(NamedTuple):
    """What one answer follows: the prompt, the coefficients by name, and the earlier turns, the user's first.

    Adapters and vectors without a coefficient are at 0.
    """

    prompt: str
    coefficients: Mapping[str, float]
    history: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """An answer, whole or as far as it is generated.

    Attributes:
        ids: its tokens, with the token that ends it.
        pieces: the text that each token adds. It is empty for a token that only begins a character or a special token.
        ended: "stop" after a token that ends a text, "length" at the limit, None if it runs or was cancelled.
    """

    ids: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    ended: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class Cost:
    """What the coefficients change in an answer of `n` tokens, in nats.

    Attributes:
        change: `(n)`, log-probability of each token minus that at c = 0.
        kl: `(n)`, `KL(c ‖ 0)` of the prediction of each token.
    """

    change: tuple[float, ...]
    kl: tuple[float, ...]

    @cached_property
    def total(self) -> float:
        """Log-probability of the whole answer minus that at c = 0."""
        return math.fsum(self.change)

    @cached_property
    def mean(self) -> float:
        """Mean KL per token."""
        return math.fsum(self.kl) / len(self.kl)

    @cached_property
    def rmse(self) -> float:
        """Root of the mean squared KL per token. A few ruined tokens weigh more than in the mean."""
        return math.sqrt(math.fsum(kl**2 for kl in self.kl) / len(self.kl))


class Chat:
    """Answers and their costs. One lock guards the model, so threads may share an object.

    Args:
        dials: the model with its adapters and vectors.
        tokenizer: its tokenizer. Without a chat template, the model continues the conversation as plain text.
        max_new_tokens: the largest number of tokens in an answer.
        temperature: divisor of the logits; at 0 the most likely token is taken.
        seed: seed of the first answer to a prompt. The next try has the next seed.

    Raises:
        ValueError: an option is outside of its limits.
    """

    def __init__(
        self,
        dials: Dials,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int = 96,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_options(max_new_tokens, temperature, seed)
        self.dials: Dials = dials
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.max_new_tokens: int = max_new_tokens
        self.temperature: float = temperature
        self.seed: int = seed
        self._ends, self._pad = ends_and_pad(dials.model, tokenizer)
        self._lock = threading.Lock()

    def answer(self, columns: Sequence[Column], attempt: int = 0) -> Iterator[list[Answer]]:
        """Generate one answer per column, all in one batch, and yield them after each token.

        The generation runs in a thread of its own. It ends early if the iterator is closed.

        Args:
            columns: what each answer follows.
            attempt: number of the try. It is added to the seed.

        Raises:
            ValueError: a prompt, a name or a coefficient is not allowed, the conversation is too long, or the model
                gives logits that are not finite.
        """
        rows, most = self._encoded(columns), positions(self.dials.model)
        longest = max(map(len, rows))
        if longest + self.max_new_tokens > most:
            raise ValueError(
                f"the conversation has {longest} tokens, and an answer may have {self.max_new_tokens}, but the model "
                f"reads at most {most:g}; clear the conversation, or give a smaller --max_new_tokens"
            )
        return self._streamed(rows, self._by_row(columns), attempt)

    def costs(self, columns: Sequence[Column], answers: Sequence[Answer]) -> list[Cost]:
        """The costs of answers, from one forward pass at the coefficients and one at 0.

        Raises:
            ValueError: an answer has no tokens, or the logits are not finite.
        """
        if not all(answer.ids for answer in answers):
            raise ValueError("an answer without tokens has no cost; generate one token or more")
        rows = [[*row, *answer.ids] for row, answer in zip(self._encoded(columns), answers, strict=True)]
        batch = pad_rows(rows, self.tokenizer, self.dials.model.device, side="left")
        most = max(len(answer.ids) for answer in answers)
        with self._lock:
            steered = self._logits(batch, self._by_row(columns), most)
            base = self._logits(batch, {}, most)
        found = []
        for row, answer in enumerate(answers):
            n = len(answer.ids)
            at_c, at_0 = steered[row, -n:].float(), base[row, -n:].float()
            change = _logp(at_c, answer.ids) - _logp(at_0, answer.ids)
            kl = kl_divergence(at_c, at_0)
            if not (change.isfinite().all() and kl.isfinite().all()):
                raise ValueError(NO_NUMBERS)
            found.append(Cost(tuple(change.tolist()), tuple(kl.clamp(min=0).tolist())))
        return found

    def check(self, coefficients: Mapping[str, float]) -> None:
        """Raise ValueError if a name is unknown, or a coefficient is not finite or too large."""
        for name, c in coefficients.items():
            if name not in self.dials.names:
                raise ValueError(
                    f"there is no adapter or vector {name!r}{nearest(name, self.dials.names)}; there is "
                    f"{', '.join(self.dials.names)}"
                )
            if not abs(c) <= LARGEST:  # NaN also fails
                raise ValueError(f"a coefficient should be from -{LARGEST:g} to {LARGEST:g}; got {c:g}")

    def _encoded(self, columns: Sequence[Column]) -> list[list[int]]:
        """The tokens of each column's conversation, up to where the answer begins."""
        if not columns:
            raise ValueError("there is nothing to answer; give one column or more")
        for column in columns:
            self.check(column.coefficients)
            if any("\ud800" <= c <= "\udfff" for c in column.prompt):
                raise ValueError(f"the prompt {column.prompt[:40]!r} has characters that are not text; leave them out")
            if not column.prompt.strip():
                raise ValueError("the prompt is empty; write some text")
        return [encode(self.tokenizer, one.prompt, history=one.history).ids for one in columns]

    def _by_row(self, columns: Sequence[Column]) -> dict[str, float | Tensor]:
        """The coefficients `(b)` by name."""
        return {
            name: torch.tensor([float(column.coefficients.get(name, 0.0)) for column in columns])
            for name in self.dials.names
        }

    def _streamed(
        self, rows: Sequence[list[int]], coefficients: Mapping[str, float | Tensor], attempt: int
    ) -> Iterator[list[Answer]]:
        results: SimpleQueue[list[int] | Exception | None] = SimpleQueue()
        cancelled = threading.Event()
        # Without a template, the text may begin with a space that only shows behind other text.
        behind = [() if self.tokenizer.chat_template else row[-CONTEXT:] for row in rows]
        streams = [TextStream(self.tokenizer, context=context) for context in behind]
        answers = [Answer() for _ in rows]
        work = (rows, coefficients, self.seed + attempt, results.put, cancelled)
        worker = threading.Thread(target=self._generate, args=work, daemon=True)
        worker.start()
        try:
            while (new := results.get()) is not None:
                if isinstance(new, Exception):
                    raise new
                answers = [
                    answer if answer.ended else self._longer(answer, token, stream)
                    for answer, token, stream in zip(answers, new, streams, strict=True)
                ]
                yield answers
        finally:
            cancelled.set()
            worker.join()

    def _longer(self, answer: Answer, token: int, stream: TextStream) -> Answer:
        """The answer with one more token."""
        n = len(answer.ids) + 1
        ended = "stop" if token in self._ends else "length" if n == self.max_new_tokens else None
        piece = stream.push([] if ended == "stop" else [token], last=ended is not None)
        return replace(answer, ids=(*answer.ids, token), pieces=(*answer.pieces, piece), ended=ended)

    def _generate(
        self,
        rows: Sequence[list[int]],
        coefficients: Mapping[str, float | Tensor],
        seed: int,
        put: Callable[[list[int] | Exception | None], None],
        cancelled: threading.Event,
    ) -> None:
        """Put the new tokens `(b)` of each step, then None. An exception is put, not raised."""
        while not self._lock.acquire(timeout=POLL):
            if cancelled.is_set():
                return put(None)
        try:
            model = self.dials.model
            batch = pad_rows(rows, self.tokenizer, model.device, side="left")
            del batch["position_ids"]  # `generate` derives them from the mask
            generate = cast(Callable[..., Any], model.generate)
            with self.dials.at(coefficients), bare_generation(model):
                generate(
                    **batch,
                    do_sample=False,  # the largest score is that of a drawn token
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=self._pad,
                    logits_processor=LogitsProcessorList([_Draw(self.temperature, seed, len(rows), model.device)]),
                    stopping_criteria=StoppingCriteriaList([_stop_if(cancelled)]),
                    streamer=_Streamer(put),
                )
        except Exception as error:
            put(error)
        finally:
            self._lock.release()
            put(None)

    @torch.no_grad()
    def _logits(self, batch: dict[str, Tensor], coefficients: Mapping[str, float | Tensor], n: int) -> Tensor:
        """The logits `(b n v)` that predict the last `n` tokens."""
        with self.dials.at(coefficients):
            return self.dials.model(**batch, use_cache=False, logits_to_keep=n + 1).logits[:, -n - 1 : -1]


def check_options(max_new_tokens: int, temperature: float, seed: int) -> None:
    """Raise ValueError if an option of `Chat` is outside of its limits."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens should be 1 or more; got {max_new_tokens}")
    if not 0 <= temperature <= HOTTEST:
        raise ValueError(f"temperature should be from 0 to {HOTTEST:g}; got {temperature}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed should be from 0 to {2**32 - 1}; got {seed}")


def shown_coefficients(coefficients: Mapping[str, float]) -> str:
    """Coefficients as text: "c = -1" for one adapter or vector, their names for several."""
    if len(coefficients) == 1:
        return f"c = {next(iter(coefficients.values())):g}"
    return ", ".join(f"{name} {c:g}" for name, c in coefficients.items())


def shown_cost(cost: Cost) -> str:
    """A cost as a line of text."""
    n = len(cost.kl)
    return (
        f"KL {cost.mean:.3f}, RMSE {cost.rmse:.3f} nats per token; log-probability {cost.total:+.2f} nats against "
        f"c = 0, in {n} token{'' if n == 1 else 's'}"
    )


def _logp(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Log-probabilities `(n)` of tokens under logits `(n v)`."""
    return logits.log_softmax(dim=-1).gather(-1, torch.tensor(ids, device=logits.device)[:, None]).squeeze(-1)


def _stop_if(cancelled: threading.Event) -> Any:
    """A stopping criterion that ends all rows once the event is set."""
    return lambda ids, _scores, **_: torch.full((len(ids),), cancelled.is_set(), device=ids.device)


class _Draw(LogitsProcessor):
    """Makes the largest score that of a randomly drawn token. Each row draws its own numbers from one seed."""

    def __init__(self, temperature: float, seed: int, n: int, device: torch.device) -> None:
        self._samplers = [Sampler(Sampling(temperature, seed=seed), device) for _ in range(n)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if (scores.isnan() | (scores == math.inf)).any():
            raise ValueError(NO_NUMBERS)
        return torch.stack([sampler.noisy(row) for sampler, row in zip(self._samplers, scores, strict=True)])


class _Streamer(BaseStreamer):
    """Hands the tokens `(b)` of each step on; the first call brings the prompt."""

    def __init__(self, put: Callable[[list[int]], None]) -> None:
        self._put, self._begun = put, False

    def put(self, value: Tensor) -> None:
        if self._begun:
            self._put(value.tolist())
        self._begun = True

    def end(self) -> None:
        pass
