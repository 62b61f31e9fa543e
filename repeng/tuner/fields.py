"""What the fields of an adapter's configuration may hold: it may come from a file that somebody else wrote."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

SHOWN = 60  # characters of a value in a message
MOST_REPEATS = 6  # of a regular expression from a file: with more, matching a name may take hours
Name: Any = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$")]
Text: Any = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
Targets: Any = set[Name] | Annotated[str, Field(min_length=1, max_length=10_000)] | None
Sampled = Annotated[list[float], Field(min_length=8, max_length=8)]
Unit = Annotated[float, Field(ge=1e-12, le=1e12)]  # beyond, a coefficient of 1 would round to nothing or infinity

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
# Entries that an object needs.
ENTRIES: dict[str, dict[str, Any]] = {
    "calibration": {"plus": Unit, "minus": Unit},
    "fingerprint": {"dtype": Text, "weights": Annotated[dict[Name, Sampled], Field(min_length=1)]},
}
# true is no 1, "5" is no number, and NaN and infinity are never meant.
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_FIELDS = {name: TypeAdapter(hint, config=_STRICT) for name, hint in FIELDS.items()}
_ENTRIES = {
    name: {key: TypeAdapter(hint, config=_STRICT) for key, hint in entries.items()}
    for name, entries in ENTRIES.items()
}


def check_fields(values: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the field, what it holds and what it may, for the first value that cannot be meant."""
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
        raise ValueError(f"resolved_modules names {twice!r} more than once; a module is adapted once")


def check_expression(name: str, expression: str, *, from_file: bool) -> None:
    """Raise ValueError unless `expression` is a regular one, and, of a file, one that is matched in no time."""
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{name} is no regular expression ({error}); got {_shown(expression)}. Give one, or a list of names"
        ) from None
    if from_file and _may_take_hours(expression):
        raise ValueError(
            f"{name} repeats what repeats or branches, or repeats more than {MOST_REPEATS} times, which may take "
            f"hours to match; got {_shown(expression)}. Write it simpler, or as a list of names"
        )


def _may_take_hours(expression: str) -> bool:
    """Whether a group that repeats holds a repetition or alternatives, or there are many repetitions."""
    rest = re.sub(r"\\.|\{\d+\}", "a", expression)
    rest = re.sub(r"\[\^?\]?[^\]]*\]", "a", rest)
    if len(re.findall(r"[*+]|\{\d*,\d*\}", rest)) > MOST_REPEATS:
        return True
    while True:
        # Innermost groups become one letter: R for one that holds a repetition or alternatives.
        inner = re.search(r"\((\?<?[=!])?(?:\?[:<>P]*)?([^()]*)\)", rest)
        if inner is None:
            return False
        # What only looks ahead or behind takes nothing, so that its repetition begins nothing anew.
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
