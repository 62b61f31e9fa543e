"""Say what a file or folder is: an adapter, a vector, a report, pairs, questions or a model, and how to use it."""

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from repeng._file_names import CALIBRATION, EVALUATION, REPORT
from repeng.control.adapter_folder import AdapterFolder
from repeng.data.pairs import load_pairs
from repeng.data.questions import load_questions
from repeng.data.schema import shown
from repeng.data.trust import own_config
from repeng.data.yaml_keys import read_keys
from repeng.model.gguf_header import Stored, check_gguf
from repeng.model.script import printable
from repeng.model.sources import name_of_folder
from repeng.model.strict_json import read_json
from repeng.tuner import SvdSteeringConfig
from repeng.vectors.vector import read_vector


@dataclass
class Info:
    """What a file or folder is. `facts` are shown as a table, `commands` as what can be done with it."""

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)


def info(path: Path) -> dict[str, Any]:
    """Print what is at a path.

    Raises:
        ValueError: it is of no known kind, or it is damaged; the message says how.
    """
    found = _info(path)
    table = Table(title=Text(f"{path}: {found.kind}"), show_header=False)
    for name, value in found.facts.items():
        if value is not None:
            table.add_row(name, Text(printable(value if isinstance(value, str) else _shown(value))))
    Console().print(table)
    for command in found.commands:
        print(f"  {command}")
    return {"path": str(path), "kind": found.kind, **found.facts, "commands": found.commands}


def _info(path: Path) -> Info:
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return _adapter(path)
        if (path / "config.json").is_file():
            return _model_folder(path)
        if (path / REPORT).is_file():
            return _report(path / REPORT)
        raise ValueError(f"{path} is a folder without an adapter (adapter_config.json), a model or a report")
    if path.suffix == ".safetensors":
        return _vector(path)
    if path.suffix == ".gguf":
        tensors = check_gguf(path)
        return _vector(path) if all(name.startswith("direction.") for name in tensors) else _gguf(path, tensors)
    if path.name == REPORT:
        return _report(path)
    return _rows(path)


def _adapter(path: Path) -> Info:
    adapter = AdapterFolder.read(path)
    config: Any = adapter.config
    is_svd = isinstance(config, SvdSteeringConfig)
    base = config.base_model_name_or_path
    modules = config.resolved_modules if is_svd else config.target_modules
    facts = {
        "method": "SVD steering" if is_svd else "LoRA",
        "base model": (name_of_folder(base) or base) if base else None,
        "rank": config.r,
        "parameters": sum(tensor.numel() for tensor in adapter.tensors.values()),
        "adapted": sorted(modules) if isinstance(modules, list | set | tuple) else modules,
        "calibration": getattr(config, "calibration", None) or _json(path / CALIBRATION),
    }
    found = own_config(path)
    if found is not None:
        keys = {key.name: key.value for key in read_keys(found)}
        facts["base model"] = keys.get("model_name_or_path") or facts["base model"]
        facts |= {name: keys.get(name) for name in ("positive", "negative", "pairs_file", "max_steps")}
    for folder in (path / EVALUATION, path):
        if (folder / REPORT).is_file():
            facts |= _measured(folder / REPORT)
            break
    word = shlex.quote(str(path))
    commands = [f"repeng {command} {word}" for command in ("chat", "evaluate", "calibrate", "serve")]
    return Info("an adapter", facts, [*commands, f"repeng export {word} --to lora --coefficients -1 1"])


def _vector(path: Path) -> Info:
    vector = read_vector(path)
    known = vector.metadata
    facts = {
        "method": known.get("method"),
        "base model": vector.model_name or known.get("model_hint"),
        "model type": known.get("model_type"),
        "sites": vector.sites,
        "layers": vector.layers,
        "width": next(iter(vector.directions.values())).numel(),
        "pairs": known.get("pairs"),
        "held-out accuracy": known.get("accuracy"),
        "calibration": known.get("calibration"),
    }
    word = shlex.quote(str(path))
    base = "" if vector.model_name else " --model_name_or_path MODEL"
    return Info(
        "a steering vector",
        facts,
        [f"repeng chat {word}{base}", f"repeng serve {word}{base}", f"repeng export {word} --to gguf"],
    )


def _model_folder(path: Path) -> Info:
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'} should hold an object; got {shown(config)}")
    names = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size", "torch_dtype")
    return Info("a model", {name: config.get(name) for name in names}, _of_model(path))


def _gguf(path: Path, tensors: Mapping[str, Stored]) -> Info:
    numbers = sum(math.prod(stored.shape) for stored in tensors.values())
    return Info("a GGUF model", {"tensors": len(tensors), "parameters": numbers}, _of_model(path))


def _of_model(path: Path) -> list[str]:
    word = shlex.quote(str(path))
    return [
        f"repeng new --model_name_or_path {word}",
        f"repeng train --model_name_or_path {word} --positive WORD --negative WORD --suffixes_file suffixes",
    ]


def _report(path: Path) -> Info:
    return Info("a report", _measured(path), [])


def _measured(path: Path) -> dict[str, Any]:
    """The verdict of a report, and the effect of each method at equal cost."""
    report = read_json(path)
    rows = report.get("rows") if isinstance(report, dict) else None
    if not isinstance(rows, dict):
        raise ValueError(f"{path} is not a report of this package: it holds no 'rows'")
    effects = {name: _effect(row) for name, row in rows.items()}
    return {"verdict": report.get("verdict"), "effect in nats [95 % interval]": effects}


def _effect(row: Any) -> Any:
    figures = row.get("figures") if isinstance(row, dict) else None
    return figures.get("effect") if isinstance(figures, dict) else None


def _rows(path: Path) -> Info:
    """A file of pairs or of questions."""
    problems = []
    for kind, load, command in (
        ("pairs", load_pairs, "repeng pairs check {} --model_name_or_path MODEL"),
        ("questions", load_questions, "repeng evaluate PATH --questions_file {}"),
    ):
        try:
            rows: Any = load(path)
        except (ValueError, OSError) as error:
            problems.append(f"not {kind}: {error}")
            continue
        return Info(kind, {"rows": len(rows), "first": asdict(rows[0])}, [command.format(shlex.quote(str(path)))])
    raise ValueError(f"{path} is of no known kind: " + "; ".join(problems))


def _json(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _shown(value: Any) -> str:
    if isinstance(value, list) and len(value) > 6:
        return f"{len(value)}: {value[0]} … {value[-1]}"
    return json.dumps(value, ensure_ascii=False, indent=None, default=str)
