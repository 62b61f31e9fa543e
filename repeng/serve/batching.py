"""Serve requests at different coefficients in one batch, with the continuous batching of transformers.

transformers decides which requests run, and packs the tokens of all running requests into one row. This module gives
each forward pass the coefficient of every token.
"""

import asyncio
import math
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import wraps
from typing import Any, NamedTuple, cast

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from repeng.control.dials import Dials, per_token
from repeng.control.positions import replaced
from repeng.data.files import nearest
from repeng.serve.limits import Limits
from repeng.serve.sampling import Drawn, Sampler, Sampling

FLASH = (torch.bfloat16, torch.float16)  # dtypes that flash attention supports
PAGE = 256  # tokens per page of the key-value cache, the default of transformers
NO_NUMBERS = (
    "the model gives NaN or infinite logits, at the coefficients of this request or of another request in the batch; "
    "give smaller coefficients"
)
POLL = 0.2  # seconds


class Unavailable(RuntimeError):
    """The server cannot accept a request at the moment."""


class Failed(RuntimeError):
    """A request could not be finished; `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.status = status


class Tokens(NamedTuple):
    """New tokens of a request, and its finish reason.

    `ended` is "stop" after a token that ends a text, "length" at the limit, and None while the request runs. `drawn`
    holds the log-probabilities of the new tokens, if the request asks for them.
    """

    ids: list[int]
    ended: str | None
    drawn: list[Drawn]


class _Request(NamedTuple):
    """A running request: its coefficients in the order of the dials, its sampler, and the queue for its results."""

    coefficients: tuple[float, ...]
    sampler: Sampler
    drawn: list[Drawn]
    results: asyncio.Queue
    loop: asyncio.AbstractEventLoop

    def put(self, result: Any) -> None:
        """Put a result into the queue of this request. Any thread may call it."""
        _hand_over([(self, result)])


def _hand_over(results: Sequence[tuple[_Request, Any]]) -> None:
    """Put results into the queues of their requests. Each event loop is woken only once."""
    for loop in {request.loop for request, _ in results}:
        mine = [(request, result) for request, result in results if request.loop is loop]
        if not loop.is_closed():
            loop.call_soon_threadsafe(
                lambda mine=mine: [request.results.put_nowait(result) for request, result in mine]
            )


class Batching:
    """Generates for many requests at once. No other code may use the model between `start` and `stop`.

    Args:
        dials: the model with its adapters and vectors.
        limits: see `Limits`.

    Raises:
        ImportError: this version of transformers is too old.
        ValueError: the model has fewer positions than `limits.max_length`.
    """

    def __init__(self, dials: Dials, limits: Limits | None = None) -> None:
        if "max_requests_per_batch" not in {one.name for one in fields(ContinuousBatchingConfig)}:
            raise ImportError("serving needs transformers 5.17 or newer: pip install -U 'transformers>=5.17,<5.25'")
        limits = limits or Limits()
        positions = getattr(dials.model.config.get_text_config(), "max_position_embeddings", None)
        if limits.max_length is None:
            limits = replace(limits, max_length=min(positions or 4096, 4096))
        elif positions is not None and limits.max_length > positions:
            raise ValueError(f"max_length is {limits.max_length}, but the model has only {positions} positions")
        self.dials: Dials = dials
        self.limits: Limits = limits
        self.max_length: int = limits.max_length or 0
        settings = dials.model.generation_config or GenerationConfig()
        ends = settings.eos_token_id
        self.ends: set[int] = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._requests: dict[str, _Request] = {}
        self._manager: Any = None
        self._threads: list[threading.Thread] = []
        self._replaced = ExitStack()
        self._steered = ExitStack()  # the open contexts of `steer`
        self._steered_for: Any = None  # the coefficients and lengths that they were opened for
        self._problem: Exception | None = None  # the error that ended the generating thread
        self._stopping = False

    def start(self) -> None:
        """Start the threads that generate and that distribute results, unless they run already.

        Raises:
            ValueError: this model, or one of its adapters, does not work with continuous batching.
        """
        if self.alive:
            return
        model, on_cpu = self.dials.model, self.dials.model.device.type == "cpu"
        concurrent = self.limits.max_concurrent
        # Keys and values of a prompt depend on its coefficients, so requests must not share them.
        known = {one.name for one in fields(ContinuousBatchingConfig)}
        flash: Any = {"auto_switch_to_flash": model.dtype in FLASH and not on_cpu}
        config = ContinuousBatchingConfig(
            **{key: value for key, value in flash.items() if key in known},
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            num_blocks=concurrent * math.ceil(self.max_length / PAGE) + self._spare_blocks(),
            max_batch_tokens=max(concurrent, 256 if on_cpu else 2048),
            max_requests_per_batch=concurrent,
        )
        # Greedy, because `_draw` has already made the largest logit that of a randomly drawn token.
        generation = GenerationConfig(
            do_sample=False, eos_token_id=sorted(self.ends) or -1, pad_token_id=min(self.ends, default=0)
        )
        self._manager = cast(Any, model).init_continuous_batching(generation, config)
        self._replaced.enter_context(replaced(model, "forward", self._steered_forward))
        self._stopping, self._problem = False, None
        try:
            self._try_out()
        except BaseException:
            self.stop()
            raise
        thread = threading.Thread(target=self._hand_out, name="repeng-results", daemon=True)
        thread.start()
        self._threads = [thread]

    def _spare_blocks(self) -> int:
        """Number of extra cache blocks: layers of different kinds share one cache in pieces of many blocks."""
        kinds = getattr(self.dials.model.config.get_text_config(), "layer_types", None) or ()
        return 16 if len(set(kinds)) > 1 else 0

    def _try_out(self) -> None:
        """Generate for two texts at different coefficients. Raises ValueError if the generating thread ends."""
        manager, nobody = self._manager, asyncio.new_event_loop()
        nobody.close()
        sampler = Sampler(Sampling(), self.dials.model.device)
        for name, c in (("first", 0.5), ("second", 1.0)):
            coefficients = (min(c, self.limits.max_coefficient),) * len(self.dials.names)
            self._requests[name] = _Request(coefficients, sampler, [], asyncio.Queue(), nobody)
            manager.add_request([0] * min(3, self.max_length - 1), request_id=name, max_new_tokens=2)
        manager.start()
        while self._requests:
            result = manager.get_result(timeout=POLL)
            if result is not None and result.is_finished():
                del self._requests[result.request_id]
            if not manager.is_running() or (result is not None and result.error is not None):
                self._requests.clear()
                told = self._problem or (result and result.error) or "see its log"
                kind = type(self.dials.model).__name__
                raise ValueError(f"{kind} cannot be served: the continuous batching of transformers failed ({told})")

    def stop(self) -> None:
        """End all requests, stop the threads, and restore the model."""
        if self._manager is None or self._stopping:
            return
        self._stopping = True
        for request in list(self._requests.values()):
            request.put(Unavailable("the server is stopping"))
        self._manager.stop(block=True, timeout=30, hard_stop=True)
        for thread in self._threads:
            thread.join(timeout=5)
        self._steered.close()
        self._steered_for = None
        self._replaced.close()
        self._manager = None

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return self._manager is not None and not self._stopping and self._manager.is_running()

    @property
    def running(self) -> int:
        """Number of requests that are running or waiting."""
        return len(self._requests)

    def check(self, steering: Mapping[str, float]) -> None:
        """Raise ValueError unless every name is known and every coefficient is within the limits."""
        names, largest = self.dials.names, self.limits.max_coefficient
        for name, c in steering.items():
            if name not in names:
                listed = ", ".join(names) or "none"
                raise ValueError(
                    f"this server has no adapter or vector {name!r}{nearest(name, names)}; it has: {listed}"
                )
            if not abs(c) <= largest:  # NaN is not
                allowed = f"from {-largest:g} to {largest:g}"
                raise ValueError(f"the coefficient of {name!r} is {c:g}; allowed are values {allowed}")

    async def generate(
        self,
        ids: Sequence[int],
        steering: Mapping[str, float],
        max_new_tokens: int,
        sampling: Sampling,
        ends: Collection[int] = (),
    ) -> AsyncGenerator[Tokens]:
        """Yield the new tokens of one text as they are generated; closing the generator cancels the request.

        Args:
            ids: token ids of the prompt.
            steering: coefficients by name of adapter or vector; all others are 0.
            max_new_tokens: the largest number of tokens in the answer.
            sampling: settings with which tokens are drawn.
            ends: ids of tokens that end this text, in addition to those that end every text.

        Raises:
            Unavailable: too many requests are waiting, or the server is stopping.
            Failed: the logits were NaN or infinite, or transformers reported an error.
            ValueError: see `check`.
        """
        self.check(steering)
        manager = self._manager
        if not self.alive:
            raise Unavailable("the server has stopped generating; restart it")
        if self.running >= self.limits.max_concurrent + self.limits.max_waiting:
            raise Unavailable(f"{self.running} requests are already running or waiting; try again later")
        name, sent, ends = uuid.uuid4().hex, 0, {*self.ends, *ends}
        request = _Request(
            tuple(float(steering.get(dial, 0.0)) for dial in self.dials.names),
            Sampler(sampling, self.dials.model.device),
            [],
            asyncio.Queue(),
            asyncio.get_running_loop(),
        )
        self._requests[name] = request
        ended = None
        try:
            manager.add_request(
                list(ids),
                request_id=name,
                max_new_tokens=max_new_tokens,
                streaming=True,
                eos_token_id=sorted(ends) or -1,
            )
            while ended is None:
                result = await request.results.get()
                if isinstance(result, Exception):
                    ended = "error"
                    raise result
                if result.error is not None:
                    ended = "error"
                    raise Failed(result.error)
                new = result.generated_tokens[sent:]
                sent += len(new)
                if result.is_finished():
                    at_end = bool(result.generated_tokens) and result.generated_tokens[-1] in ends
                    ended = "stop" if at_end else "length"
                shown = len(new) - (ended == "stop")
                yield Tokens(new[:shown], ended, request.drawn[sent - len(new) : sent - len(new) + shown])
        finally:
            del self._requests[name]
            if ended in (None, "error"):
                manager.cancel_request(name)

    def _hand_out(self) -> None:
        """Put each result into the queue of its request. Runs in a thread of its own."""
        manager = self._manager
        while manager.is_running():
            results, result = [], manager.get_result(timeout=POLL)
            while result is not None:
                request = self._requests.get(result.request_id)
                if request is not None:
                    results.append((request, result))
                result = manager.get_result(timeout=0)  # a step has one result per request: collect them all
            _hand_over(results)
        for request in list(self._requests.values()):
            request.put(Unavailable("the server has stopped generating; restart it"))

    def _packed(self) -> list[Any]:
        """The requests in the present forward pass, in the order of their tokens."""
        return self._manager.batch_processor.inputs_and_outputs.requests_in_batch

    def _steered_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the model's forward: steer every token, and draw every next token, with the settings of its request.

        If the logits of a text are not finite, its request fails; the generating thread goes on. Other requests in the
        same forward pass may fail with it: attention multiplies masked values by zero, and 0 × inf is NaN.
        """

        @wraps(forward)
        def steered(*args: Any, **kwargs: Any) -> Any:
            try:
                packed = self._packed()
                self._steer(packed, tokens=kwargs["input_ids"].shape[1])
                output = forward(*args, **kwargs)
                self._draw(packed, output, kwargs)
            except Exception as error:
                self._problem = error
                raise
            return output

        return steered

    def _draw(self, packed: Sequence[Any], output: Any, kwargs: Mapping[str, Any]) -> None:
        """Draw the next token of each text, and change the logits so that this token has the largest one."""
        going_on = [self._requests.get(one.state.request_id) for one in packed if one.has_new_token]
        rows = range(len(going_on)) if "logits_to_keep" in kwargs else kwargs["logits_indices"].tolist()
        output.logits = output.logits.float()
        has_numbers = output.logits[0].amax(dim=-1).isfinite().tolist()
        for request, row in zip(going_on, rows, strict=False):
            logits = output.logits[0, row]
            if not has_numbers[row]:
                logits.zero_()
                if request is not None:
                    request.put(Failed(NO_NUMBERS, status=422))
            elif request is not None:
                scores = request.sampler.noisy(logits)
                drawn = request.sampler.told(logits, scores)
                if drawn is not None:
                    request.drawn.append(drawn)
                if scores is not logits:
                    logits.copy_(scores)

    def _steer(self, packed: Sequence[Any], tokens: int) -> None:
        """Open the contexts of `steer` for these requests, unless the same contexts are open already."""
        nothing = (0.0,) * len(self.dials.names)
        running = [self._requests.get(one.state.request_id) for one in packed]
        own = [nothing if request is None else request.coefficients for request in running]
        lengths = [one.query_length for one in packed]
        if sum(lengths) != tokens:
            raise RuntimeError(
                f"the requests have {sum(lengths)} tokens but the row has {tokens}: transformers has padded it"
            )
        wanted = tuple(own), (None if len(set(own)) == 1 else tuple(lengths))
        if wanted == self._steered_for:
            return
        self._steered.close()
        self._steered_for = None
        columns = zip(*own, strict=True)
        values = {name: per_token(list(each), lengths) for name, each in zip(self.dials.names, columns, strict=True)}
        self._steered.enter_context(self.dials.at(values))
        self._steered_for = wanted
