"""Code that gives the answers of a conversation again."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from repeng.chat.conversation import Chat, Column
from repeng.model.script import joined


class Origin(NamedTuple):
    """Where a model comes from.

    Attributes:
        name: its name in `repeng serve`.
        model: its name or path.
        gguf_file: name of its GGUF file.
        paths: adapters and vectors by name.
    """

    name: str
    model: str
    gguf_file: str | None
    paths: Mapping[str, Path]


def as_python(chat: Chat, origin: Origin, columns: Sequence[Column], attempt: int) -> str:
    """A Python program that prints the same answers with their costs."""
    gguf = "" if origin.gguf_file is None else f", gguf_file={origin.gguf_file!r}"
    kind = chat.dials.model.device.type
    device = "" if kind == "cpu" else f", device={kind!r}"
    paths = ", ".join(f"{name!r}: Path({str(path)!r})" for name, path in origin.paths.items())
    rows = "".join(
        f"    Column({one.prompt!r}, {dict(one.coefficients)!r}, history={list(one.history)!r}),\n" for one in columns
    )
    options = f"max_new_tokens={chat.max_new_tokens}, temperature={chat.temperature!r}, seed={chat.seed}"
    return f"""from pathlib import Path

from repeng import load_model
from repeng.chat import Chat, Column
from repeng.control.dials import load_dials

model, tokenizer = load_model({origin.model!r}{gguf}{device})
dials = load_dials(model, {{{paths}}})
chat = Chat(dials, tokenizer, {options})
columns = [
{rows}]
*_, answers = chat.answer(columns, attempt={attempt})
for answer, cost in zip(answers, chat.costs(columns, answers)):
    print(answer.text, cost.mean, cost.rmse)
"""


def as_curl(chat: Chat, origin: Origin, columns: Sequence[Column], attempt: int) -> str:
    """The command that starts `repeng serve`, and one request per column."""
    words = ["repeng", "serve", *(f"{name}={path}" for name, path in origin.paths.items())]
    words += ["--model_name_or_path", origin.model]
    words += ["--gguf_file", origin.gguf_file] if origin.gguf_file else []
    lines = [f"# Start the server first: {shlex.join(words)}"]
    key = ' -H "Authorization: Bearer $REPENG_API_KEY"' if os.environ.get("REPENG_API_KEY") else ""
    for one in columns:
        if chat.tokenizer.chat_template:
            place = "chat/completions"
            roles = ("user", "assistant")
            turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate([*one.history, one.prompt])]
            body = {"model": origin.name, "messages": turns}
        else:
            place, body = "completions", {"model": origin.name, "prompt": joined(*one.history, one.prompt)}
        body |= {"max_tokens": chat.max_new_tokens, "temperature": chat.temperature}
        body |= {"seed": chat.seed + attempt} if chat.temperature else {}
        body |= {"steer": dict(one.coefficients)}
        text = shlex.quote(json.dumps(body, ensure_ascii=False))
        lines.append(f"curl http://localhost:8000/v1/{place} -H 'Content-Type: application/json'{key} -d {text}")
    return "\n".join(lines) + "\n"
