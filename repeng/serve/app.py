"""The web application: OpenAI's routes, /health and /metrics."""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from inspect import signature
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from repeng.serve.batching import Batching, Failed, Unavailable
from repeng.serve.decoding import CONTEXT, TextStream
from repeng.serve.logprobs import of_chat, of_completion
from repeng.serve.protocol import ChatCompletion, Completion, Generation, Refused, parse
from repeng.serve.sampling import Drawn, Sampling

MAX_BODY = 2**20  # bytes
COMPLETION_TOKENS = 16  # default max_tokens of a completion, as at OpenAI


class Answer(NamedTuple):
    """A piece of an answer: its new text, the finish reason (None: unfinished), and the number of tokens so far.

    `drawn` holds the log-probabilities of the new tokens; None unless the request asks for log-probabilities.
    """

    text: str
    ended: str | None
    tokens: int
    drawn: list[Drawn] | None


class Metrics:
    """The metrics that /metrics shows."""

    def __init__(self, batching: Batching) -> None:
        self.registry: CollectorRegistry = CollectorRegistry()
        self.requests: Counter = Counter(
            "repeng_requests", "Requests, by HTTP status", ["status"], registry=self.registry
        )
        self.cancelled: Counter = Counter(
            "repeng_cancelled", "Requests whose client disconnected", registry=self.registry
        )
        self.prompt: Counter = Counter("repeng_prompt_tokens", "Tokens in prompts", registry=self.registry)
        self.generated: Counter = Counter("repeng_generated_tokens", "Tokens in answers", registry=self.registry)
        self.seconds: Histogram = Histogram(
            "repeng_request_seconds", "Duration of a request in seconds", registry=self.registry
        )
        self.first: Histogram = Histogram(
            "repeng_first_token_seconds", "Seconds until the first token", registry=self.registry
        )
        running = Gauge("repeng_running", "Requests that are running or waiting", registry=self.registry)
        running.set_function(lambda: batching.running)


class Server:
    """The request handlers of a server with one model."""

    def __init__(
        self,
        batching: Batching,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        api_key: str | None,
        hosts: Sequence[str],
    ) -> None:
        self.batching: Batching = batching
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.name: str = name
        self.api_key: str | None = api_key
        self.hosts: list[str] = [host.strip("[]") for host in hosts]
        self.metrics: Metrics = Metrics(batching)
        self.created: int = int(time.time())

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self.batching.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.batching.stop)

    async def health(self, _request: Request) -> Response:
        alive = self.batching.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    async def show_metrics(self, request: Request) -> Response:
        self._check_key(request)
        return Response(generate_latest(self.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model())

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise Refused(f"there is no model {name[:100]!r}; the model of this server is {self.name!r}", "model", 404)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "repeng",
            "max_model_len": self.batching.max_length,
            "steer": list(self.batching.dials.names),
        }

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, Completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, ChatCompletion)

    async def _answer(self, request: Request, kind: type[Completion] | type[ChatCompletion]) -> Response:
        self._check_key(request)
        body = parse(kind, await _read(request))
        ids = await asyncio.to_thread(self._check, body)  # in a thread, because a long text takes long to encode
        shape = _Shape(isinstance(body, ChatCompletion), self.name, self.tokenizer)
        answers = self._generate(body, ids)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            # Wait for the first piece, so that a request that fails at once gets an HTTP status for the failure.
            first = await _unless_gone(request, anext(answers))
            if first is None:
                return self._gone()
            events = self._events(shape, first, answers, len(ids), with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        if body.stream_options is not None:
            raise Refused("stream_options is allowed only together with stream: true", "stream_options")
        whole = await _unless_gone(request, _joined(answers))
        if whole is None:
            return self._gone()
        self.metrics.requests.labels(200).inc()
        return JSONResponse(shape.whole(whole, len(ids)))

    def _gone(self) -> Response:
        """The response for a client that has disconnected."""
        self.metrics.cancelled.inc()
        return Response(status_code=499)

    async def _events(
        self, shape: "_Shape", piece: Answer, answers: AsyncGenerator[Answer], prompt_tokens: int, with_usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events of one answer; `piece` is its first piece."""
        status = None
        try:
            for event in shape.opening():
                yield event
            while piece.ended is None:
                if piece.text or piece.drawn:
                    yield shape.piece(piece)
                piece = await anext(answers)
            yield shape.piece(piece)
            if with_usage:
                yield shape.usage(prompt_tokens, piece.tokens)
            yield "data: [DONE]\n\n"
            status = 200
        except Exception as error:
            status = _status(error, self.batching.alive)
            yield _event(_error(str(error), status))
            if not isinstance(error, Unavailable | Failed):
                raise
        finally:
            if status is None:
                self.metrics.cancelled.inc()
            else:
                self.metrics.requests.labels(status).inc()
            await answers.aclose()

    def _check(self, body: Completion | ChatCompletion) -> list[int]:
        """Check a request and return the token ids of its prompt.

        Raises:
            Refused: the request cannot be answered.
        """
        self._check_name(body.model)
        try:
            self.batching.check(body.steer)
        except ValueError as error:
            raise Refused(str(error), "steer") from error
        ids = self._prompt_ids(body)
        room = self.batching.max_length - len(ids)
        if room < 1:
            raise Refused(
                f"the prompt has {len(ids)} tokens; prompt and answer together can have {self.batching.max_length}"
            )
        asked = _asked_tokens(body)
        if asked is not None and asked > room:
            raise Refused(
                f"of {self.batching.max_length} tokens, the prompt leaves room for {room}; got {asked}", "max_tokens"
            )
        return ids

    def _prompt_ids(self, body: Completion | ChatCompletion) -> list[int]:
        if isinstance(body, Completion):
            prompt = body.only_prompt()
            ids = list(self.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
            size = self.batching.dials.model.config.get_text_config().vocab_size
            wrong = next((one for one in ids if not 0 <= one < size), None)
            if not ids or wrong is not None:
                problem = "no token" if wrong is None else f"the id {wrong}"
                raise Refused(
                    f"prompt needs at least one token, with ids from 0 to {size - 1}; got {problem}", "prompt"
                )
            return ids
        if not self.tokenizer.chat_template:
            raise Refused("this model has no chat template; use /v1/completions", "messages")
        reserved = set(body.chat_template_kwargs) & {*signature(self.tokenizer.apply_chat_template).parameters}
        if reserved:
            raise Refused(
                f"the server itself sets {', '.join(sorted(reserved))}; leave it out", "chat_template_kwargs"
            )
        try:
            ids = self.tokenizer.apply_chat_template(
                [message.as_turn() for message in body.messages],
                add_generation_prompt=True,
                return_dict=False,
                **body.chat_template_kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise Refused(f"the chat template refuses these messages: {error}", "messages") from error
        return list(cast(list[int], ids))

    async def _generate(self, body: Completion | ChatCompletion, ids: list[int]) -> AsyncGenerator[Answer]:
        """Generate the answer in pieces; closing the generator cancels the request."""
        given = {key: getattr(body, key) for key in ("temperature", "top_p", "top_k", "seed")}
        sampling = Sampling(**{key: value for key, value in given.items() if value is not None}, logprobs=body.told)
        room = self.batching.max_length - len(ids)
        limit = _asked_tokens(body) or (room if isinstance(body, ChatCompletion) else min(COMPLETION_TOKENS, room))
        context = ids[-CONTEXT:] if isinstance(body, Completion) else ()
        texts, ends = self._stops(body)
        stream, count, start = TextStream(self.tokenizer, texts, context), 0, time.perf_counter()
        self.metrics.prompt.inc(len(ids))
        async with aclosing(self.batching.generate(ids, body.steer, limit, sampling, ends)) as tokens:
            async for new in tokens:
                if not count:
                    self.metrics.first.observe(time.perf_counter() - start)
                generated = len(new.ids) + (new.ended == "stop")
                count += generated
                self.metrics.generated.inc(generated)
                text = stream.push(new.ids, new.ended is not None)
                ended = "stop" if stream.stopped else new.ended
                if ended:
                    self.metrics.seconds.observe(time.perf_counter() - start)
                yield Answer(text, ended, count, None if body.told is None else new.drawn)
                if ended:
                    return

    def _stops(self, body: Completion | ChatCompletion) -> tuple[list[str], set[int]]:
        """The stop texts, and the ids of special tokens among them, which do not appear in the decoded text."""
        texts, special = body.stop_texts(), set(self.tokenizer.all_special_tokens)
        ends = {cast(int, self.tokenizer.convert_tokens_to_ids(text)) for text in texts if text in special}
        return [text for text in texts if text not in special], ends

    def _check_key(self, request: Request) -> None:
        origin = urlsplit(request.headers.get("origin", "")).hostname
        if origin is not None and "*" not in self.hosts and origin not in self.hosts:
            raise Refused(f"web pages from {origin} may not use this server", None, 403)
        if self.api_key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise Refused("the API key is missing or wrong: send the header 'Authorization: Bearer KEY'", None, 401)

    async def failed(self, _request: Request, error: Exception) -> Response:
        """The response for any error, in the form that OpenAI's clients expect."""
        status = _status(error, self.batching.alive)
        self.metrics.requests.labels(status).inc()
        text = error.detail if isinstance(error, HTTPException) else str(error)
        headers = {"retry-after": "1"} if status == 429 else None
        return JSONResponse(_error(text, status, getattr(error, "field", None)), status, headers)


class _Shape:
    """Writes one answer in OpenAI's format."""

    def __init__(self, is_chat: bool, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.is_chat, self._tokenizer = is_chat, tokenizer
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created, self._model = int(time.time()), model

    def whole(self, answer: Answer, prompt_tokens: int) -> dict[str, Any]:
        """The whole answer as one JSON object."""
        said = {"message": {"role": "assistant", "content": answer.text}} if self.is_chat else {"text": answer.text}
        usage = _usage(prompt_tokens, answer.tokens)
        return {**self._head("chat.completion"), "choices": [self._choice(said, answer)], "usage": usage}

    def opening(self) -> list[str]:
        """The first events, before any text."""
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._event([self._choice(said, None)])] if self.is_chat else []

    def piece(self, answer: Answer) -> str:
        """The event for one piece."""
        said = {"delta": {"content": answer.text}} if self.is_chat else {"text": answer.text}
        return self._event([self._choice(said, answer)])

    def usage(self, prompt_tokens: int, tokens: int) -> str:
        """The last event of a stream whose request asks for the usage."""
        return self._event([], usage=_usage(prompt_tokens, tokens))

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return _event({**self._head("chat.completion.chunk"), "choices": choices, **more})

    def _head(self, kind: str) -> dict[str, Any]:
        kind = kind if self.is_chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, said: Mapping[str, Any], answer: Answer | None) -> dict[str, Any]:
        told = None
        if answer is not None and answer.drawn is not None:
            told = (of_chat if self.is_chat else of_completion)(self._tokenizer, answer.drawn)
        return {"index": 0, **said, "logprobs": told, "finish_reason": None if answer is None else answer.ended}


def make_app(
    batching: Batching,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    api_key: str | None = None,
    allowed_hosts: Sequence[str] = ("*",),
) -> Starlette:
    """The web application, for any ASGI server.

    Args:
        batching: the generator of answers; it starts and stops with the application.
        tokenizer: tokenizer of its model.
        name: name of the model in requests.
        api_key: key that requests must send; with None, no key is needed.
        allowed_hosts: allowed values of the `Host` header. On a loopback address, give the names of this machine: that
            keeps out web pages whose own domain name resolves to this machine.
    """
    server = Server(batching, tokenizer, name, api_key, allowed_hosts)
    errors: Any = dict.fromkeys((Refused, Unavailable, Failed, HTTPException, Exception), server.failed)
    return Starlette(
        routes=[
            Route("/health", server.health),
            Route("/metrics", server.show_metrics),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))],
        exception_handlers=errors,
        lifespan=server.lifespan,
    )


def _status(error: Exception, alive: bool) -> int:
    """The HTTP status of an error."""
    if isinstance(error, Unavailable):
        return 429 if alive else 503
    return getattr(error, "status", getattr(error, "status_code", 500))


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _error(message: str, status: int, field: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": status}}


def _usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _asked_tokens(body: Generation) -> int | None:
    return getattr(body, "max_completion_tokens", None) or body.max_tokens


async def _read(request: Request) -> bytes:
    """Read the body of a request, up to `MAX_BODY` bytes."""
    parts, length = [], 0
    try:
        async for part in request.stream():
            length += len(part)
            if length > MAX_BODY:
                raise Refused(f"the body is longer than {MAX_BODY} bytes", None, 413)
            parts.append(part)
    except ClientDisconnect as error:
        raise Refused("the client disconnected before it had sent the whole body", None, 499) from error
    return b"".join(parts)


async def _joined(answers: AsyncIterator[Answer]) -> Answer:
    """Join all pieces of an answer."""
    pieces = [piece async for piece in answers]
    drawn = None if pieces[-1].drawn is None else [one for piece in pieces for one in piece.drawn or ()]
    return pieces[-1]._replace(text="".join(piece.text for piece in pieces), drawn=drawn)


async def _unless_gone(request: Request, work: Awaitable[Answer]) -> Answer | None:
    """The result of `work`. If the client disconnects first, `work` is cancelled and the result is None."""
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
