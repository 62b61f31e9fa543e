"""Parts of pages that scripts write: what stands between two marks."""


def between(text: str, begin: str, end: str, body: str) -> str:
    """The text with `body` between the lines `begin` and `end`.

    Raises:
        ValueError: a mark is missing; what stands behind it would be lost.
    """
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"the page needs the lines {begin!r} and {end!r}: {body[:40]!r}… is written between them")
    return f"{before}{begin}\n{body}\n{end}{after}"
