"""Talk to a model at any coefficient."""

from collections.abc import Mapping
from pathlib import Path

from repeng.chat.conversation import Chat, check_options
from repeng.chat.snippets import Origin
from repeng.chat.terminal import talk
from repeng.commands.base import open_dials, shared_base


def chat(
    paths: Mapping[str, Path],
    model_name_or_path: str | None,
    gguf_file: str | None,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    page: tuple[str, int, str | None] | None,
    use_cpu: bool,
) -> None:
    """Talk in the terminal, or serve the page until a signal ends it.

    Args:
        paths: adapters and vectors by name.
        model_name_or_path: the base model; by default the one that the adapters or vectors name.
        gguf_file: name of its GGUF file.
        max_new_tokens: tokens of an answer.
        temperature: 0 takes the most likely tokens.
        seed: seed of the answers.
        page: address, port and password of the page; None for the terminal.
        use_cpu: run on the CPU even if there is a GPU.

    Raises:
        ValueError: an option is outside of its limits, the base model is unknown, or an adapter or vector does not
            fit it.
    """
    check_options(max_new_tokens, temperature, seed)
    if model_name_or_path is None:
        model_name_or_path, gguf_file = shared_base(paths)
    dials, tokenizer, name = open_dials(paths, model_name_or_path, gguf_file, use_cpu)
    talker = Chat(dials, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    print(f"model: {name!r}, adapters and vectors: {', '.join(dials.names)}", flush=True)
    if page is None:
        talk(talker, name)
        return
    from repeng.chat.web import serve_page

    host, port, password = page
    serve_page(talker, Origin(name, model_name_or_path, gguf_file, paths), host, port, password)
