"""What holds for the whole repository."""

import ast
import os
import re
import shlex
import subprocess
import tomllib
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
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
    "hub": 6,
    "train": 7,
    "chat": 7,
    "commands": 8,
    "cli": 9,
}
COMMANDS = {("repeng", "commands", "base.py"), ("repeng", "train", "run.py")}
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


def test_the_public_ci_calls_the_scripts_that_are_there():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    workflow, project = yaml.safe_load(text), tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"} and "secrets" not in text
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [shlex.split(step["run"]) for step in steps if "run" in step]
    assert commands == [[".ci/run", "fast"], [".ci/run"]]
    for path, *_ in commands:
        assert os.access(ROOT / path, os.X_OK)
        subprocess.run(["bash", "-n", ROOT / path], check=True)
    versions = workflow["jobs"]["fast"]["strategy"]["matrix"]["python"]
    named = [word.split("::")[-1].strip() for word in project["project"]["classifiers"] if ":: 3." in word]
    assert versions == named and workflow["jobs"]["all"]["env"]["UV_PYTHON"] == versions[0]
    assert project["project"]["requires-python"] == f">={versions[0]}"
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)


def test_there_is_one_version_and_the_changelog_begins_with_it():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert version("repeng") == repeng.__version__
    assert re.search(r"^## (\d[.\d]*) \(\d{4}-\d\d-\d\d\)", changelog, flags=re.M)[1] == repeng.__version__


def test_the_guide_for_contributors_names_what_is_there():
    """Files, folders, the marks of the tests, the floors; names of the code stand in the code."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    quoted = set(re.findall(r"`([^`\n]+)`", guide))
    assert len(quoted) > 80
    modules = {name.split()[2] for name in quoted if name.startswith("python -m")}
    assert modules and all((ROOT / f"{name.replace('.', '/')}.py").is_file() for name in modules)
    for name in quoted:
        if re.fullmatch(r"[\w./-]+\.(py|md|yml|yaml)|[.\w]+/[\w./-]*", name):
            assert any((folder / name).exists() for folder in (ROOT, ROOT / "repeng")), f"{name} does not exist"
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for part in ("repeng", "tests", "benchmarks")
        for path in ROOT.glob(f"{part}/**/*.py")
    )
    for name in quoted:
        if re.fullmatch(r"[A-Z_]{4,}|test_\w+|_\w+|[A-Z][a-z]+[A-Z]\w+", name) and not name.startswith("REPENG_"):
            assert re.search(rf"\b{name}\b", code), f"{name} is nowhere in the code"
    marks = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"][
        "markers"
    ]
    assert set(re.findall(r"^\| `(\w+)` \|", guide, flags=re.M)) == {mark.split(":")[0] for mark in marks}
    floors = re.findall(r"^\| (\d) \| `(\w+)/` \|", guide, flags=re.M)
    assert {name: int(floor) for floor, name in floors} == FLOORS


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
        if wing is not None and other not in (wing, "_imports", "_command", "_extras", "_file_names", "__version__"):
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
