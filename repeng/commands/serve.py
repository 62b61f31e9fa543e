"""Serve adapters and vectors with an OpenAI-compatible API."""

from collections.abc import Mapping
from pathlib import Path

from repeng.commands.base import open_dials
from repeng.serve.limits import Limits


def serve(
    paths: Mapping[str, Path],
    model_name_or_path: str | None,
    gguf_file: str | None,
    *,
    host: str,
    port: int,
    api_key: str | None,
    use_cpu: bool,
    limits: Limits,
) -> None:
    """Serve until a signal ends the server. Running requests then have 30 seconds to finish.

    Raises:
        ValueError: the base model is unknown, the adapters have different bases, or one does not fit the model.
    """
    import uvicorn

    from repeng.serve import Batching, make_app

    dials, tokenizer, name = open_dials(paths, model_name_or_path, gguf_file, use_cpu)
    allowed = ("*",) if api_key else ("127.0.0.1", "localhost", "[::1]")
    batching = Batching(dials, limits)
    app = make_app(batching, tokenizer, name, api_key, allowed)
    batching.start()  # before the server starts, so a model that cannot be served ends in an error message
    try:
        print(f"model: {name!r}, adapters and vectors: {', '.join(dials.names)}")
        uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=30)
    finally:
        batching.stop()
