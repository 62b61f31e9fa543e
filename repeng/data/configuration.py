"""Arguments from YAML files and the command line, and the configurations that come with the package."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, cast

import yaml

from repeng.data.files import nearest

PACKAGE = Path(__file__).parents[1]
# Built into the wheel; in a checkout it lies beside the package.
CONFIGS = PACKAGE.parent / "configs" if (PACKAGE.parent / "configs" / "tiny.yaml").is_file() else PACKAGE / "configs"
SAYS_THE_TASK = ("model_name_or_path", "pairs_file", "positive", "negative")


def shipped_configs() -> dict[str, Path]:
    """The package's own configurations by name: models and traits."""
    paths = [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("traits/*.yaml")]
    return {path.stem: path for path in sorted(paths)}


def config_file(word: str) -> Path:
    """The YAML file at a path, or the package's own configuration of this name, such as `tiny` or `mood`.

    Raises:
        FileNotFoundError: there is neither; says which names there are.
        ValueError: there are both.
    """
    shipped = shipped_configs()
    path = _file_or_name(word, shipped)
    if path.is_file():
        return path
    raise FileNotFoundError(
        f"--config: there is no file {word!r} and no configuration of that name{nearest(word, shipped)}; "
        f"give a YAML file, or one of {', '.join(shipped)}"
    )


def data_file(word: str) -> Path:
    """A path as it is, or, for the bare name `suffixes`, the list of answer beginnings in the package.

    Raises:
        ValueError: there is a file of that name, too.
    """
    return _file_or_name(word, {path.stem: path for path in CONFIGS.glob("data/*.txt")})


def _file_or_name(word: str, shipped: Mapping[str, Path]) -> Path:
    """The package's own file of this name, or the word as a path; raises ValueError if it is both."""
    if word in shipped and Path(word).is_file():
        raise ValueError(f"{word!r} is a file here and a name in the package: write ./{word} for the file, or move it")
    return shipped.get(word, Path(word))


def names_of(kinds: Sequence[type]) -> list[str]:
    """The keys of dataclasses of arguments."""
    return [field.name for kind in kinds for field in fields(kind) if field.init]


def default_of(field: Field[Any]) -> Any:
    """The default value of a dataclass's field; None without one."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def read_configs(words: Sequence[str], allowed: Collection[str]) -> dict[str, Any]:
    """The keys of configurations; later ones override earlier ones.

    Raises:
        FileNotFoundError: there is no such configuration.
        ValueError: a file holds something else than allowed keys and their values.
    """
    given: dict[str, Any] = {}
    for word in words:
        path = config_file(word)
        keys = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(keys, dict):
            raise ValueError(f"{path}: expected keys and values, got a {type(keys).__name__}")
        refuse_unknown(keys, allowed, str(path))
        given |= keys
    return given


def refuse_unknown(keys: Collection[str], allowed: Collection[str], where: str) -> None:
    """Raise ValueError for the first key that is not allowed."""
    for key in keys:
        if key not in allowed:
            raise ValueError(f"unknown key {key!r} in {where}{nearest(str(key), allowed)}")


def flags_of(argv: Sequence[str]) -> list[str]:
    """The names of the options on a command line, `--num-pairs` as `num_pairs`."""
    return [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]


def parse_into(
    kinds: Sequence[type], argv: Sequence[str], default_config: str | Path | None = None
) -> tuple[Any, ...]:
    """One object of each dataclass, from `--config NAME_OR_FILE …` overridden by the rest of the command line.

    Args:
        kinds: dataclasses of arguments without common names.
        argv: the command line.
        default_config: the configuration where the command line names neither one nor a model or a behaviour.

    Raises:
        ValueError: an unknown key, with the nearest valid one.
        FileNotFoundError: there is no such configuration.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", nargs="+")
    known, rest = before.parse_known_args(list(argv))
    if known.config is None:
        says_the_task = set(flags_of(rest)) & set(SAYS_THE_TASK)
        known.config = [str(default_config)] if default_config is not None and not says_the_task else []
    return parse_keys(kinds, rest, read_configs(known.config, names_of(kinds)))


def parse_keys(kinds: Sequence[type], argv: Sequence[str], given: Mapping[str, Any]) -> tuple[Any, ...]:
    """One object of each dataclass, from `given` overridden by a command line."""
    from transformers import HfArgumentParser  # two seconds, which `--help` should not wait for

    parser = HfArgumentParser(cast(Any, list(kinds)), allow_abbrev=False)
    # For --help only.
    parser.add_argument("--config", nargs="+", help="YAML files with any of these keys, or names such as tiny, mood")
    parser.set_defaults(**given)
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    refuse_unknown(flags_of(unknown) or unknown, names_of(kinds), "the command line")
    return tuple(parsed)


def add_keys(parser: argparse.ArgumentParser, kinds: Sequence[type], title: str) -> None:
    """Add the keys of dataclasses to a plain parser, as texts: `parse_keys` gives them their types."""
    group = parser.add_argument_group(title)
    for kind in kinds:
        for field in fields(kind):
            if field.init:
                nargs = field.metadata.get("nargs", "?" if field.type in (bool, bool | None) else None)
                shown = f"{field.metadata['help']} Default: {default_of(field)}."
                spellings = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
                group.add_argument(
                    *spellings, dest=field.name, nargs=nargs, default=argparse.SUPPRESS, metavar="VALUE", help=shown
                )
