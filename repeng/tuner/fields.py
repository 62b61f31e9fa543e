"""Allowed values for the fields of an adapter's configuration, which may come from a file of unknown origin."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

SHOWN = 60  # characters of a value that a message shows
MOST_REPEATS = 6  # repetitions in a regular expression from a file: with more, matching a name may take hours
Name: Any = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$")]
Text: Any = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
Targets: Any = set[Name] | Annotated[str, Field(min_length=1, max_length=10_000)] | None
Sampled = Annotated[list[float], Field(min_length=8, max_length=8)]
Unit = Annotated[float, Field(ge=1e-12, le=1e12)]  # outside it, c = 1 would round to zero or infinity

FIELDS: dict[str, Any] = {
    "r": Annotated[int, Field(ge=2, le=1 << 20)],
    "target_modules": Targets,
    "exclude_modules": Targets,
    "layers_to_transform": list[int] | int | Text | None,
    "layers_pattern": list[Name] | Name | None,
    "rotate_input": bool,
    "rotate_output": bool,
    "scale": bool,
    "shift": bool,
    "additive_scale": bool,
    "svd_niter": Annotated[int, Field(ge=0, le=1000)],
    "svd_seed": Annotated[int, Field(ge=0, lt=1 << 63)],
    "init_weights": bool,
    "init_bases": bool,
    "allow_other_base": bool,
    "inference_mode": bool,
    "modules_to_save": list[Name] | None,
    "resolved_modules": Annotated[list[Name] | None, Field(min_length=1)],
    "fingerprint": dict[str, Any] | None,
    "calibration": dict[str, Any] | None,
    "format_version": Annotated[int, Field(ge=1)],
    "base_model_name_or_path": Text | None,
    "revision": Text | None,
    "auto_mapping": dict[str, Any] | None,
    "task_type": Text | None,
    "peft_version": Text | None,
}
# Required entries of dictionary fields.
ENTRIES: dict[str, dict[str, Any]] = {
    "calibration": {"plus": Unit, "minus": Unit},
    "fingerprint": {"dtype": Text, "weights": Annotated[dict[Name, Sampled], Field(min_length=1)]},
}
# Strict: true does not count as 1, "5" does not count as a number, and NaN and infinity are refused.
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_FIELDS = {name: TypeAdapter(hint, config=_STRICT) for name, hint in FIELDS.items()}
_ENTRIES = {
    name: {key: TypeAdapter(hint, config=_STRICT) for key, hint in entries.items()}
    for name, entries in ENTRIES.items()
}


def check_fields(values: Mapping[str, Any]) -> None:
    """Raise ValueError for the first invalid value; the message names the field, its value and the allowed values."""
    for name, adapter in _FIELDS.items():
        _check(name, adapter, values[name])
        for key, of_key in _ENTRIES.get(name, {}).items() if values[name] is not None else ():
            if key not in values[name]:
                raise ValueError(
                    f"{name} lacks {key!r}; it needs {', '.join(_ENTRIES[name])}; got {_shown(values[name])}"
                )
            _check(f"{name}.{key}", of_key, values[name][key])
    resolved = values["resolved_modules"] or ()
    twice = next((module for module in resolved if resolved.count(module) > 1), None)
    if twice is not None:
        raise ValueError(f"resolved_modules names {twice!r} more than once; name each module once")


def check_expression(name: str, expression: str, *, from_file: bool) -> None:
    """Raise ValueError unless `expression` is a regular expression and, if it comes from a file, fast to match."""
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{name} is not a valid regular expression ({error}); got {_shown(expression)}. Give a valid one, or a "
            "list of names"
        ) from None
    if from_file and _may_take_hours(expression):
        raise ValueError(
            f"{name} may take hours to match, because it repeats a group that repeats or branches, or has more than "
            f"{MOST_REPEATS} repetitions; got {_shown(expression)}. Write a simpler expression or a list of names"
        )


def _may_take_hours(expression: str) -> bool:
    """Whether a repeated group contains a repetition or alternatives, or there are too many repetitions."""
    rest = re.sub(r"\\.|\{\d+\}", "a", expression)
    rest = re.sub(r"\[\^?\]?[^\]]*\]", "a", rest)
    if len(re.findall(r"[*+]|\{\d*,\d*\}", rest)) > MOST_REPEATS:
        return True
    while True:
        # Each innermost group becomes one letter: R if it contains a repetition or alternatives, otherwise a.
        inner = re.search(r"\((\?<?[=!])?(?:\?[:<>P]*)?([^()]*)\)", rest)
        if inner is None:
            return False
        # Lookahead and lookbehind groups consume no text, so repeating them costs nothing.
        heavy = inner[1] is None and bool(re.search(r"[*+|R]|\{", inner[2]))
        if heavy and rest[inner.end() : inner.end() + 1] in ("*", "+", "{"):
            return True
        rest = f"{rest[: inner.start()]}{'R' if heavy else 'a'}{rest[inner.end() :]}"


def _check(name: str, adapter: TypeAdapter[Any], value: Any) -> None:
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        allowed = dict.fromkeys(
            re.sub("^(Input|String|Value|Dictionary|List|Set) should", "must", one["msg"])
            for one in error.errors(include_url=False, include_input=False)
        )
        raise ValueError(f"{name} {' or '.join(allowed)}; got {_shown(value)}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
