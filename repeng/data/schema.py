"""Strict checks of values from files and command lines against declared types, with messages of one line."""

import re
import reprlib
from collections.abc import Collection, Mapping
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from repeng.data.files import nearest

SHOWN = 60  # characters of a value in a message
_SHORT = reprlib.Repr()  # fast even for values that repeat one value very often
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 4 * SHOWN
# Strict: true is not 1, "5" is not a number, and NaN and infinity are rejected.
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
PLAIN_WORDS = {
    "bool": "should be true or false",
    "float": "should be a number",
    "int": "should be a whole number",
    "string": "should be a text",
}


def checked(hint: Any, value: Any, name: str) -> Any:
    """Check `value` against the declared type `hint` and return it.

    Args:
        hint: a type, with limits as `pydantic.Field` in `Annotated`.
        value: a value from a file.
        name: name of the value in messages: its key, with the file and the line if they are known.

    Raises:
        ValueError: the value is not of this type. The message has the name, the value and what is allowed.
    """
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{name} {_allowed(error)}; got {shown(value)}") from None


def checked_text(hint: Any, text: str, name: str) -> Any:
    """Convert `text`, a word of a command line, to the type `hint`; see `checked`."""
    try:
        return _adapter(hint).validate_strings(text, strict=False)
    except ValidationError as error:
        raise ValueError(f"{name} {_allowed(error)}; got {shown(text)}") from None


def checked_keys(hints: Mapping[str, Any], values: Any, where: str, *, needed: Collection[str] = ()) -> dict[str, Any]:
    """The entries of an object, each checked against its declared type.

    Args:
        hints: types by key; no other key is allowed.
        values: the object from a file.
        where: the file, with the line if it is known.
        needed: keys that must be present.

    Raises:
        ValueError: `values` is not an object, a key is unknown or missing, or a value is not of its type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: should be an object with the keys {', '.join(hints)}; got {shown(values)}")
    refuse_unknown(values, hints, where)
    for key in needed:
        if key not in values:
            raise ValueError(f"{where}: the key {key!r} is missing")
    return {key: checked(hints[key], value, f"{where}: {key}") for key, value in values.items()}


def one_of(names: Collection[str]) -> Any:
    """A type for texts that accepts only these names."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"should be one of {', '.join(names)}{nearest(name, names)}")
        return name

    def no(value: Any) -> Any:
        return "no" if value is False and "no" in names else value  # YAML reads the word no as false

    return Annotated[str, AfterValidator(check), BeforeValidator(no)]


@cache
def hints_of(kind: type) -> Mapping[str, Any]:
    """The declared types of the fields of a class, with their limits."""
    return get_type_hints(kind, include_extras=True)


def refuse_unknown(keys: Collection[Any], allowed: Collection[str], where: str) -> None:
    """Raise ValueError for the first key that is not allowed."""
    for key in keys:
        if key not in allowed:
            hint = nearest(str(key), allowed)
            few = len(allowed) <= 20
            listed = "" if hint else f"; keys are {', '.join(allowed)}" if few else "; --help lists the keys"
            raise ValueError(f"{where}: unknown key {shown(key)}{hint}{listed}")


def shown(value: Any) -> str:
    """A value as one short line."""
    text = _SHORT.repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=_STRICT)


def _allowed(error: ValidationError) -> str:
    """The allowed values, for all alternatives of the type."""
    problems = []
    for one in error.errors(include_url=False, include_input=True, include_context=True):
        place = "".join(f"[{part}]" for part in one["loc"] if isinstance(part, int))
        kind, _, how = one["type"].partition("_")
        said = re.sub("^(Input|Value error,) ", "", one["msg"])
        if how in ("type", "parsing", "from_float"):
            said = PLAIN_WORDS.get(kind, said)
        if kind == "string" and isinstance(one["input"], bool):
            said += ", in quotes"  # YAML reads the word no as false
        if kind == "literal" and isinstance(one["input"], str):
            said += nearest(one["input"], re.findall("'([^']*)'", said))
        problems.append(f"{place} {said}".strip())
    return " or ".join(dict.fromkeys(problems))
