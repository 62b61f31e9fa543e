"""Arguments from YAML files and the command line, and the configurations in the package."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args

from repeng.data.files import nearest
from repeng.data.schema import hints_of, one_of, refuse_unknown, shown
from repeng.data.words import argument, is_switch, read_words, takes_several
from repeng.data.yaml_keys import read_keys

PACKAGE = Path(__file__).parents[1]
# In the wheel the folder lies inside the package, in a checkout beside it.
CONFIGS = PACKAGE.parent / "configs" if (PACKAGE.parent / "configs" / "tiny.yaml").is_file() else PACKAGE / "configs"
SAYS_THE_TASK = ("model_name_or_path", "pairs_file", "positive", "negative")


def shipped_configs() -> dict[str, Path]:
    """Paths of the package's own configurations (models and traits) by name."""
    paths = [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("traits/*.yaml")]
    return {path.stem: path for path in sorted(paths)}


def config_file(word: str) -> Path:
    """The path of a YAML file, or of the package's own configuration of this name, such as `tiny` or `mood`.

    Raises:
        FileNotFoundError: neither exists; the message lists the names.
        ValueError: both exist.
    """
    shipped = shipped_configs()
    path = _file_or_name(word, shipped)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise FileNotFoundError(f"--config: {shown(word)}: {error.strerror}; give a YAML file") from None
    if path.is_dir() or path.is_symlink():
        what = "a folder" if path.is_dir() else "a link that leads to no file"
        raise FileNotFoundError(f"--config: {word!r} is {what}; give a YAML file, or one of {', '.join(shipped)}")
    raise FileNotFoundError(
        f"--config: there is no file {word!r} and no configuration of that name{nearest(word, shipped)}; "
        f"give a YAML file, or one of {', '.join(shipped)}"
    )


def data_file(word: str) -> Path:
    """`word` as a path; the bare name `suffixes` stands for the list of answer beginnings in the package.

    Raises:
        ValueError: the working folder has a file of that name as well.
    """
    return _file_or_name(word, {path.stem: path for path in CONFIGS.glob("data/*.txt")})


def _file_or_name(word: str, shipped: Mapping[str, Path]) -> Path:
    """The package's own file of this name, or the word as a path; raises ValueError if both exist."""
    if word in shipped and Path(word).is_file():
        raise ValueError(f"{word!r} is both a file and a name in the package: write ./{word} for the file, or move it")
    return shipped.get(word, Path(word))


def names_of(kinds: Sequence[type]) -> list[str]:
    """The names of the fields of argument dataclasses."""
    return [field.name for kind in kinds for field in fields(kind) if field.init]


def hints_for(kinds: Sequence[type]) -> Mapping[str, Any]:
    """The declared types, with their limits, of the fields of argument dataclasses.

    A field that takes a member of an enum of transformers or a text takes only the enum's names as text.
    """
    return _hints_for(tuple(kinds))


@cache
def _hints_for(kinds: tuple[type, ...]) -> Mapping[str, Any]:
    hints = {name: hint for kind in kinds for name, hint in hints_of(kind).items()}
    return {name: _named(hints[name]) for name in names_of(kinds)}


def _named(hint: Any) -> Any:
    parts = get_args(hint)
    names = [member.value for part in parts if isinstance(part, type) and issubclass(part, Enum) for member in part]
    return one_of(names) if names and str in parts else hint


def default_of(field: Field[Any]) -> Any:
    """The default value of a dataclass field; None if it has no default."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def defaults_of(kinds: Sequence[type]) -> dict[str, Any]:
    """The default values of all keys."""
    return {field.name: default_of(field) for kind in kinds for field in fields(kind) if field.init}


def read_configs(
    words: Sequence[str], hints: Mapping[str, Any], aside: Callable[[str], bool] = lambda name: False
) -> dict[str, Any]:
    """Read configurations and check each value against its declared type. Later files override earlier ones.

    Args:
        words: names of the package's own configurations, or paths.
        hints: types by key.
        aside: tells whether a key that is not in `hints` is ignored.

    Raises:
        FileNotFoundError: a configuration does not exist.
        ValueError: a file has an unknown key, or a value that is not of its key's type.
    """
    given: dict[str, Any] = {}
    for word in words:
        path = config_file(word)
        for name, value, line in read_keys(path):
            where = f"{path}, line {line}"
            if name not in hints and aside(name):
                continue
            refuse_unknown([name], hints, where)
            given[name] = argument(hints[name], value, f"{where}: {name}")
    return given


def split_configs(argv: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """Split a command line into the words after `--config` (None if the flag is missing) and all other words.

    Raises:
        ValueError: no word follows the flag.
    """
    configs: list[str] | None = None
    rest: list[str] = []
    into = rest
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag == "--config":
            configs = into = configs or []
            into += [value] if equals else []
        else:
            into = rest if word.startswith("--") else into
            into.append(word)
    if configs is not None and not all(configs):
        raise ValueError("--config: a file name is empty")
    if configs == []:
        raise ValueError(f"--config needs a YAML file, or one of {', '.join(shipped_configs())}")
    return configs, rest


def read_given(kinds: Sequence[type], argv: Sequence[str], default_config: str | Path | None = None) -> dict[str, Any]:
    """The values in the files of `--config NAME_OR_FILE …` and in the rest of the command line; see `parse_into`."""
    hints = hints_for(kinds)
    configs, rest = split_configs(argv)
    on_the_line = read_words(rest, hints, defaults_of(kinds))
    if configs is None:
        says_the_task = on_the_line.keys() & set(SAYS_THE_TASK)
        configs = [str(default_config)] if default_config is not None and not says_the_task else []
    return read_configs(configs, hints) | on_the_line


def parse_into(
    kinds: Sequence[type], argv: Sequence[str], default_config: str | Path | None = None
) -> tuple[Any, ...]:
    """One object of each dataclass, from `--config NAME_OR_FILE …` and the rest of the command line, which overrides.

    Args:
        kinds: argument dataclasses without common field names.
        argv: the command line.
        default_config: the configuration that is used if the command line names no configuration, model or behaviour.

    Raises:
        ValueError: a key is unknown (the message names the nearest valid one), or a value is not of its type.
        FileNotFoundError: a configuration does not exist.
    """
    return built(kinds, read_given(kinds, argv, default_config))


def built(kinds: Sequence[type], given: Mapping[str, Any]) -> tuple[Any, ...]:
    """One object of each dataclass, made from the given values."""
    return tuple(kind(**{name: given[name] for name in names_of([kind]) if name in given}) for kind in kinds)


def add_keys(parser: argparse.ArgumentParser, kinds: Sequence[type], title: str) -> None:
    """Add the fields of dataclasses to a parser, as texts; `read_words` converts them to their types."""
    group = parser.add_argument_group(title)
    hints = hints_for(kinds)
    for kind in kinds:
        for field in fields(kind):
            if field.init:
                hint = hints[field.name]
                nargs = "+" if takes_several(hint) else "?" if is_switch(hint) else None
                told = f"{field.metadata.get('help', '')} Default: {default_of(field)}.".replace("%", "%%")
                spellings = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
                group.add_argument(
                    *spellings, dest=field.name, nargs=nargs, default=argparse.SUPPRESS, metavar="VALUE", help=told
                )
