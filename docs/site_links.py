"""Hook of mkdocs: a link that leaves docs/ works in the repository only; the site shows its text alone."""

import re
from typing import Any

OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page without links to files that the site does not hold."""
    return OUTSIDE.sub(r"\1", markdown)
