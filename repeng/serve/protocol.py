"""Format of requests: OpenAI's completions and chat completions, with the additional field `steer`."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from repeng.data.files import nearest

Body = TypeVar("Body", bound="Generation")
MOST_LOGPROBS = 20
NEUTRAL_ONLY = {
    "best_of",
    "echo",
    "frequency_penalty",
    "logit_bias",
    "n",
    "presence_penalty",
    "response_format",
    "store",
    "suffix",
    "tools",
}
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Item = TypeVar("Item")
OnlyOne = Annotated[list[Item], Field(min_length=1, max_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Refused(ValueError):
    """A request cannot be answered. `field` is the field of the request that is wrong."""

    def __init__(self, message: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.field: str | None = field
        self.status: int = status


class Strict(BaseModel):
    """Base of all parts of a request: unknown fields are errors, and values are not converted to other types."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False


class Generation(Strict):
    """Fields of both kinds of request. Fields that this server does not support may only have their neutral value."""

    model: str
    steer: dict[str, float] = {}
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    def stop_texts(self) -> Sequence[str]:
        """Texts before which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(Generation):
    """`POST /v1/completions`: the model continues a text or token ids."""

    prompt: str | list[int] | OnlyOne[str] | OnlyOne[list[int]]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    suffix: None = None

    def only_prompt(self) -> str | list[int]:
        """The prompt, without the list around it."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return cast(str | list[int], self.prompt)
        return self.prompt[0]

    @property
    def told(self) -> int | None:
        """Number of most likely tokens to report with each drawn token; None without log-probabilities."""
        return self.logprobs


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def as_turn(self) -> dict[str, str]:
        """The message in the form that chat templates take."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatCompletion(Generation):
    """`POST /v1/chat/completions`: the model answers a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None
    store: Literal[False] | None = None

    @property
    def told(self) -> int | None:
        """Number of most likely tokens to report with each drawn token; None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


def parse(kind: type[Body], text: bytes) -> Body:
    """Parse a request. A field with the value null counts as absent, because clients send all fields that they know.

    Raises:
        Refused: a field is wrong. The message is about the first such field, with its value and what is allowed.
    """
    try:
        given = from_json(text, allow_inf_nan=True)
        return kind.model_validate(_without_nulls(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    except ValueError as error:
        raise Refused(f"the body is not valid JSON: {error}") from error
    place = ".".join(str(part) for part in first["loc"])[:200]
    if first["type"] == "extra_forbidden":
        own = len(first["loc"]) == 1
        known = f"{nearest(place, kind.model_fields)}; known fields: {', '.join(kind.model_fields)}" if own else ""
        raise Refused(f"this server does not know the field {place!r}{known}", place)
    if first["loc"] and first["loc"][0] in NEUTRAL_ONLY and first["type"] != "missing":
        raise Refused(f"this server does not support {place!r}; leave it out", place)
    shown = "" if first["type"] == "missing" else f"; got {str(first['input'])[:80]!r}"
    raise Refused(f"{place or 'the body'}: {first['msg']}{shown}", place or None)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
