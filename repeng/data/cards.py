"""Parts of model cards, the README.md of a repository on the hub."""

from collections.abc import Sequence
from typing import Any

import yaml

LONGEST = 160  # characters of a prompt in a card


def front_matter(base: str | None, tags: Sequence[str], **more: Any) -> str:
    """The metadata at the top of a card.

    Args:
        base: hub id of the base model; None if it is not on the hub.
        tags: the tags.
        more: further entries.
    """
    own: dict[str, Any] = {**more, "pipeline_tag": "text-generation", "tags": list(tags)}
    if base is not None:
        own |= {"base_model": base, "base_model_relation": "adapter"}
    return f"---\n{yaml.safe_dump(own, sort_keys=False, allow_unicode=True)}---\n"


def cell(text: str) -> str:
    """A text as code in one cell of a table: in one line, and cut if it is long."""
    flat = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{flat if len(flat) <= LONGEST else flat[: LONGEST - 1] + '…'}`" if flat else ""


def link(hub_id: str) -> str:
    """A link to a model on the hub."""
    return f"[{hub_id}](https://huggingface.co/{hub_id})"
