"""The pages that people read, README first, then the site's in the order of its navigation, and what is in them."""

import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from support import ROOT

# Written by scripts.
GENERATED = ("docs/results.md", "docs/wordings.md", "docs/peft.md")
FENCE = re.compile(
    r"^(?P<margin> *)```(?P<kind>\w*)(?P<more>[^\n]*)\n(?P<text>.*?)^(?P=margin)```[ \t]*$", re.M | re.S
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)


class Fence(NamedTuple):
    """A block of code: the page, the language, the name of the file that it is, if it is one, and the text."""

    page: str
    kind: str
    title: str | None
    text: str


def navigation(entries: Any) -> Iterator[str]:
    """The pages in a navigation of mkdocs, in order."""
    for entry in entries if isinstance(entries, list) else [entries]:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(target, str):
                yield target
            else:
                yield from navigation(target)


def read_pages() -> dict[str, str]:
    """Texts by path from the root."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    names = ["README.md", *(f"docs/{name}" for name in navigation(settings["nav"]))]
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in names}


def fences(name: str, page: str) -> list[Fence]:
    """The blocks of code of a page."""
    found = []
    for match in FENCE.finditer(page):
        title = re.search(r'title="([^"]+)"', match["more"])
        found.append(Fence(name, match["kind"], title and title[1], textwrap.dedent(match["text"])))
    return found


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page)


def links(page: str) -> list[str]:
    """Targets of the links and pictures of a page, without those that lead to the web."""
    plain = re.sub(r"`[^`\n]*`", "code", prose(page))
    return [target for target in LINK.findall(plain) if not re.match(r"[a-z]+:", target)]


def anchors(page: str) -> set[str]:
    """Names of the headings of a page, as links write them."""
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in HEADING.findall(prose(page)))
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def sentences(page: str) -> list[str]:
    """The sentences of a page, without code, tables and headings; a piece of code is one word."""
    kept = [line for line in prose(page).splitlines() if not re.match(r"\s*(\||#|<!--|---)", line)]
    plain = re.sub(r"`[^`]*`", "code", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(kept)))
    paragraphs = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", f"\n{plain}")
    return [
        " ".join(sentence.split())
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.!?])[\"”*_)]*\s+(?=[A-Z0-9\"“(*`]|code\b)", paragraph)
        if sentence.strip()
    ]
