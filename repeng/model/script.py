"""Rules of writing systems: spaces between pieces of text, words, sentences and invisible characters."""

import re
import unicodedata

# Scripts that put no space between words (Thai to Myanmar, Khmer, Chinese, Japanese), with their punctuation.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3000-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
)
WORD = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")
SENTENCE = re.compile(r"(?<=[.!?؟۔।])\s+|(?<=[。！？])\s*(?=\S)|\n+")
OPENING = "([{<“‘«‹„‚¿¡/\\"  # characters after which no space is written
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # Unicode categories of invisible characters


def joint(before: str, after: str) -> str:
    """The separator between two pieces of a text: a space if their script needs one and neither piece has it."""
    if not before or not after or before[-1].isspace() or after[0].isspace():
        return ""
    if before[-1] in OPENING or (before[-1] == '"' and before.count('"') % 2):
        return ""
    return "" if re.search(f"[{UNSPACED}]", before[-1] + after[0]) else " "


def joined(*parts: str) -> str:
    """The pieces of a text joined into one; empty pieces are left out."""
    whole = ""
    for part in parts:
        whole += joint(whole, part) + part
    return whole


def words(text: str) -> list[str]:
    """The words of a text; in scripts without spaces each character is a word."""
    return WORD.findall(text)


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text."""
    return SENTENCE.split(text)


def visible(text: str) -> str:
    """The visible characters of a text."""
    return "".join(c for c in text if unicodedata.category(c) not in INVISIBLE)


def printable(text: str) -> str:
    """A text that cannot steer a terminal: control characters but line breaks and tabs are replaced."""
    return "".join(
        "\ufffd" if c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Cs") or c in BIDI) else c for c in text
    )
