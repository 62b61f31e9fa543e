"""What holds for the whole repository."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

import repeng
from repeng.data.arguments import TaskArguments
from repeng.train.arguments import SteeringArguments, parse_arguments
from repeng.tuner import SvdSteeringConfig

ROOT = Path(__file__).parent.parent
FLOORS = {
    "tuner": 0,
    "model": 1,
    "data": 2,
    "tiny": 3,
    "vectors": 3,
    "control": 4,
    "eval": 5,
    "export": 5,
    "serve": 5,
    "train": 6,
}
COMMANDS = {("repeng", "commands.py"), ("repeng", "train", "run.py")}
SOURCES = {path: path.read_text(encoding="utf-8") for path in [*ROOT.glob("repeng/**/*.py"), ROOT / "train.py"]}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_configuration_parses(path):
    parse_arguments(["--config", str(path), "--bf16", "false"])  # which a machine without a GPU refuses


def test_every_option_is_read():
    code = "\n".join(text for path, text in SOURCES.items())
    own = {f.name for f in fields(SteeringArguments)} - {f.name for f in fields(TrainingArguments)}
    for name in own | {f.name for f in fields(TaskArguments)}:
        assert re.search(rf"args\.{name}\b", code), f"the key {name} is read nowhere"
    from peft import PeftConfig

    elsewhere = {"modules_to_save", "format_version"}  # PEFT reads the first, the configuration itself the second
    for name in {f.name for f in fields(SvdSteeringConfig)} - {f.name for f in fields(PeftConfig)} - elsewhere:
        assert re.search(rf"config\.{name}\b", code), f"SvdSteeringConfig.{name} is read nowhere"


def test_ci_runs_the_readmes_test_command():
    readme, ci = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    for command in (
        "pip install -q uv && uv run accelerate launch train.py",
        "pip install -q uv && uv run pytest -v --tb=short -n 2 --dist loadfile",
    ):
        assert command in readme
    assert (
        "uv run pytest -v --tb=short -n 2 --dist loadfile" in ci and "ruff check" in ci and "ruff format --check" in ci
    )


def imported_modules(path):
    """Full names of what a file imports of this package, wherever in the file."""
    for node in ast.walk(ast.parse(SOURCES[path])):
        if isinstance(node, ast.ImportFrom) and node.module == "repeng":
            yield from (f"repeng.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("repeng."):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "repeng")


@pytest.mark.parametrize("path", sorted(SOURCES), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    """A wing imports wings of lower floors only; the public names, which `__init__` hands on, are above them all."""
    parts = path.relative_to(ROOT).parts
    wing = parts[1] if len(parts) > 2 else None
    for module in imported_modules(path):
        other = module.split(".")[1]
        if wing is not None and other not in (wing, "_imports", "_command"):
            assert other in FLOORS and FLOORS[other] < FLOORS[wing], f"{wing}/ imports {module}"
        if other == "tiny" and wing != "tiny":
            assert parts in COMMANDS, f"{path} knows the embedded world, as only command lines may"
        if wing == "tuner":
            assert other == "tuner", "tuner/ imports nothing of ours, so that it could be proposed to PEFT"
    assert wing is None or wing in FLOORS


def test_public_names_are_sorted_and_exist():
    assert repeng.__all__ == sorted(repeng.__all__)
    assert all(getattr(repeng, name).__doc__ for name in repeng.__all__)
    assert (ROOT / "repeng" / "py.typed").exists()


def test_only_safe_files_are_read():
    for path, text in SOURCES.items():
        assert not re.search(r"torch\.load\((?!.*weights_only=True)|import pickle|trust_remote_code=True", text), path
