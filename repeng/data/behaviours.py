"""Two words for a behaviour, from a sentence such as "more concise". This module has no slow imports."""

import re

from repeng.data.configuration import CONFIGS

OPPOSITES = CONFIGS / "data" / "opposites.tsv"
LEADING = re.compile(r"^(be|being|to be|make it|sound|act|speak|answer)(\s+|$)", re.IGNORECASE)
DEGREE = re.compile(r"^(much\s+)?(not so|less so|more|less|not|very)(\s+|$)", re.IGNORECASE)
VOWEL = re.compile(r"(?!uni(?!m|n)|use|usu|eu|one\b|once)[aeiou]|hon(est|our|or)|hour", re.IGNORECASE)


def behaviour_of(sentence: str) -> tuple[str, int]:
    """The word for a behaviour, and its sign: −1 if the sentence asks for less of it.

    Raises:
        ValueError: nothing is left of the sentence, or it is more than a few words.
    """
    word, sign = sentence.strip().strip(".!?\"'"), 1
    word = LEADING.sub("", word)
    degree = DEGREE.match(word)
    if degree:
        sign = -1 if degree[2].lower().startswith(("less", "not")) else 1
        word = word[degree.end() :]
    word = word.strip().lower()
    if not word or len(word.split()) > 4:
        raise ValueError(
            f'{sentence!r} should name a behaviour in one word or a few that can follow "You are", such as \'more '
            "concise' or 'less formal'"
        )
    return word, sign


def opposite_of(word: str) -> str | None:
    """The opposite of a common word; None if the package does not know it."""
    for line in OPPOSITES.read_text(encoding="utf-8").splitlines():
        two = line.split("\t")
        if word in two:
            return two[1 - two.index(word)]
    return None


def takes_an(word: str) -> bool:
    """Whether "an" goes before a word, by its first letters."""
    return VOWEL.match(word) is not None
