"""What a request may say: OpenAI's completions and chat completions, with `steer`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from repeng.data.files import nearest

Body = TypeVar("Body", bound="Generation")
MOST_LOGPROBS = 20
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Refused(ValueError):
    """A request that cannot be answered, and the field that it is about."""

    def __init__(self, message: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.field, self.status = field, status


class Strict(BaseModel):
    """No field is ignored, and no value is taken for one of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False


class Generation(Strict):
    """Fields of both kinds of request. Those that this server has no use for may hold their neutral value only."""

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
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(Generation):
    """`POST /v1/completions`: a text, or token ids, goes on."""

    prompt: str | list[int]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    suffix: None = None

    @property
    def told(self) -> int | None:
        """How many likely tokens are told beside each drawn one."""
        return self.logprobs


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def as_turn(self) -> dict[str, str]:
        """What a chat template takes."""
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
    tools: Annotated[list, Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None
    store: Literal[False] | None = None

    @property
    def told(self) -> int | None:
        """How many likely tokens are told beside each drawn one."""
        return (self.top_logprobs or 0) if self.logprobs else None


def parse(kind: type[Body], text: bytes) -> Body:
    """The request, or Refused with what was given and what is allowed, of the first field that is wrong."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(kind.model_fields)
        near = nearest(place, kind.model_fields)
        raise Refused(f"{place!r} is not known to this server{near}; known are: {known}", place)
    given = "" if first["type"] in ("missing", "json_invalid") else f"; got {str(first['input'])[:80]!r}"
    raise Refused(f"{place or 'the body'}: {first['msg']}{given}", place or None)
