"""A Hugging Face Space: SmolLM2-135M with a slider for each of some traits."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import uvicorn

from repeng import load_model
from repeng.chat import web
from repeng.chat.conversation import Chat
from repeng.chat.snippets import Origin
from repeng.commands.demo import MODEL, PROMPTS, Asked, trait_vector
from repeng.control.dials import Dials

TRAITS = ("mood", "formality")
FRAME = "frame-ancestors https://huggingface.co"  # a Space is shown inside a page of the hub


def main() -> None:
    """Extract the vectors, then serve the page until a signal ends it."""
    model, tokenizer = load_model(MODEL)
    asked = Asked(model, tokenizer, PROMPTS)
    vectors = {trait: trait_vector(model, tokenizer, trait, asked) for trait in TRAITS}
    web.HEADERS["content-security-policy"] = web.HEADERS["content-security-policy"].replace(
        "frame-ancestors 'none'", FRAME
    )
    with TemporaryDirectory() as folder:
        paths = {trait: Path(folder) / f"{trait}.safetensors" for trait in TRAITS}
        for trait, vector in vectors.items():
            vector.save(paths[trait])
        chat = Chat(Dials(model, vectors=vectors), tokenizer, max_new_tokens=64)
        page = web.make_page(web.Session(chat, Origin(MODEL, MODEL, None, paths)), ["*"], None)
        uvicorn.run(page, host="0.0.0.0", port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))


if __name__ == "__main__":
    main()
