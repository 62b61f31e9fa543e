"""Parsing of a command line into keys and their values."""

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, get_args, get_origin

from repeng.data.schema import checked, checked_text, refuse_unknown, shown

LINE = "the command line"


def read_words(argv: Sequence[str], hints: Mapping[str, Any], on: Mapping[str, Any]) -> dict[str, Any]:
    """The values on a command line, each checked against its declared type. The last value of a repeated key counts.

    A switch without a value is true. `--no_KEY` sets a switch to false if its default is true. Hyphens may replace
    underscores.

    Args:
        argv: the words of the command line; the first one is a key.
        hints: types by key.
        on: default values by key.

    Raises:
        ValueError: a key is unknown, or a value is missing, not of its type, or one too many.
    """
    given: dict[str, Any] = {}
    for flag, words in flags_and_words(argv):
        name = name_of(flag)
        off = name.removeprefix("no_")
        if name not in hints and off != name and on.get(off) is True and is_switch(hints[off]):
            if words:
                raise ValueError(f"--{name} takes no value; got {shown(words[0])}")
            given[off] = False
            continue
        refuse_unknown([name], hints, LINE)
        given[name] = _value(hints[name], name, words)
    return given


def flags_and_words(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each word that begins with `--`, with the words that follow it; `--r=8` is `--r` and `8`.

    Raises:
        ValueError: a word comes before the first flag.
    """
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and word != "--":
            flag, equals, value = word.partition("=")
            found.append((flag, [value] if equals else []))
        elif not found:
            raise ValueError(f"{LINE}: {shown(word)} belongs to no key; write --KEY VALUE")
        else:
            found[-1][1].append(word)
    return found


def name_of(flag: str) -> str:
    """The key of a flag: `--num-pairs` and `--num-pairs=8` name `num_pairs`."""
    return flag[2:].split("=")[0].replace("-", "_")


def argument(hint: Any, value: Any, name: str) -> Any:
    """Check a value from a file or a caller strictly against its declared type: "5" is not a number.

    Raises:
        ValueError: the value is not of this type, or holds characters that UTF-8 text cannot hold.
    """
    _refuse_odd_text(value, name)
    return checked(hint, value, name)


def takes_several(hint: Any) -> bool:
    """Whether a type is a list or has a list among its alternatives."""
    return get_origin(hint) is list or any(takes_several(part) for part in get_args(hint))


def is_switch(hint: Any) -> bool:
    """Whether a type is bool, or bool or None."""
    return hint is bool or {*get_args(hint)} == {bool, NoneType}


def _value(hint: Any, name: str, words: Sequence[str]) -> Any:
    if not words and is_switch(hint):
        return True
    if not words:
        raise ValueError(f"--{name} needs a value: --{name} VALUE")
    if len(words) == 1:
        _refuse_odd_text(words[0], f"--{name}")
        try:
            return checked(hint, words[0], f"--{name}")
        except ValueError:
            return checked_text(hint, words[0], f"--{name}")
    if not takes_several(hint):
        raise ValueError(f"--{name} takes one value; {shown(words[1])} after it belongs to no key")
    return argument(hint, list(words), f"--{name}")


def _refuse_odd_text(value: Any, name: str) -> None:
    if isinstance(value, Mapping):
        for part in [*value, *value.values()]:
            _refuse_odd_text(part, name)
    elif isinstance(value, list):
        for part in value:
            _refuse_odd_text(part, name)
    elif isinstance(value, str):
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{name} should be a text in UTF-8 without NUL characters; got {shown(value)}")
