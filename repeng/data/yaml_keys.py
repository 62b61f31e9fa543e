"""Keys and values of YAML files, with their line numbers. Other features of YAML are rejected."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from repeng.data.schema import shown

LARGEST = 1_000_000  # bytes
DEEPEST = 10  # levels of nested lists and objects
MOST = 10_000  # values; the values of an alias count at each place where it is used
PLAIN = tuple(f"tag:yaml.org,2002:{kind}" for kind in "null bool int float str seq map merge value".split())


class Key(NamedTuple):
    """A key, its value, and its line number, counted from 1."""

    name: str
    value: Any
    line: int


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads decimal numbers only: 010 is 10, 1:30 is a text, 1e-3 is a number."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(re.sub(r"_|\.(?=inf|nan)", "", node.value.lower()))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_INT = re.compile(r"[-+]?[0-9][0-9_]{0,4000}")  # Python does not convert longer integers
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", re.I)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"({_INT.pattern})$"), [*"-+0123456789"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"({_FLOAT.pattern})$", re.I), [*"-+.0123456789"])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def read_keys(path: str | Path) -> list[Key]:
    """The keys of a YAML file, in the order of the file; an empty list for an empty file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not YAML, or is not a single object whose keys are different texts. The message names
            the file and, if known, the line.
    """
    text = _text_of(Path(path))
    try:
        _refuse_depth(text, path)
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return []
            _Check(path).node(root, ())
            if not isinstance(root, yaml.MappingNode):
                raise ValueError(f"{path}{_line(root)}: expected keys and values, as in max_steps: 100")
            lines = {key.value: key.start_mark.line + 1 for key, _ in root.value}
            values = cast(dict[str, Any], loader.construct_document(root))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        at = "" if place is None else f", line {place.line + 1}"
        raise ValueError(f"{path}{at} is not YAML: {error.problem or error.context}; write KEY: VALUE") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return [Key(name, value, lines.get(name, 1)) for name, value in values.items()]


def _text_of(path: Path) -> str:
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is not a configuration: it is longer than {LARGEST:,} bytes")
    data = path.read_bytes()
    if b"\0" in data:
        raise ValueError(f"{path} is not text in UTF-8 (it has NUL bytes); give a YAML file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not text in UTF-8; save the file as UTF-8") from None


def _refuse_depth(text: str, path: str | Path) -> None:
    """Raise ValueError for deep nesting, before any recursive code reads it."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"{path}{_line(event)}: lists and objects are nested more than {DEEPEST} levels deep")


class _Check:
    """Checks the nodes of a file. The values of an alias count at each place where it is used."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.seen = path, 0

    def node(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
        """Raise ValueError for a tag, a key that is not text or is repeated, or an endless or huge value."""
        where = f"{self.path}{_line(node)}"
        self.seen += 1
        if self.seen > MOST:
            raise ValueError(f"{where}: there are more than {MOST:,} values; write them without aliases (*name)")
        if len(above) > DEEPEST:
            raise ValueError(f"{where}: lists and objects are nested more than {DEEPEST} levels deep")
        if node in above:
            raise ValueError(f"{where}: a value contains itself; write it without an alias (*name)")
        if node.tag not in PLAIN:
            raise ValueError(f"{where}: the tag {shown(node.tag)} is not allowed; write plain values and lists")
        if isinstance(node, yaml.SequenceNode):
            for child in node.value:
                self.node(child, (*above, node))
        elif isinstance(node, yaml.MappingNode):
            self._keys(node)
            for _, child in node.value:
                self.node(child, (*above, node))

    def _keys(self, node: yaml.MappingNode) -> None:
        first: dict[Hashable, int] = {}
        for key, _ in node.value:
            where, name = f"{self.path}{_line(key)}", key.value
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{where}: a key is a {key.id}; a key must be a text, as in max_steps: 100")
            if key.tag not in (PLAIN[4], "tag:yaml.org,2002:merge"):
                raise ValueError(f"{where}: the key {shown(name)} is not a text; write a name, as in max_steps: 100")
            if name in first:
                raise ValueError(f"{where}: the key {name!r} is already on line {first[name]}; keep one of them")
            first[name] = key.start_mark.line + 1


def _line(node: yaml.Node | yaml.Event) -> str:
    mark = node.start_mark
    return "" if mark is None else f", line {mark.line + 1}"
