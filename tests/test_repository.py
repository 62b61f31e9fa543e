"""What holds for the whole repository."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

import repeng
from repeng.train.arguments import SteeringArguments, parse_arguments
from repeng.tuner import SvdSteeringConfig

ROOT = Path(__file__).parent.parent
SOURCES = {path: path.read_text(encoding="utf-8") for path in [*ROOT.glob("repeng/**/*.py"), ROOT / "train.py"]}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_configuration_parses(path):
    parse_arguments(["--bf16", "false"], path)  # which a machine without a GPU refuses


def test_every_option_is_read():
    code = "\n".join(text for path, text in SOURCES.items())
    own = {f.name for f in fields(SteeringArguments)} - {f.name for f in fields(TrainingArguments)}
    for name in own:
        assert re.search(rf"args\.{name}\b", code), f"SteeringArguments.{name} is read nowhere"
    from peft import PeftConfig

    elsewhere = {"modules_to_save", "format_version"}  # PEFT reads the first, the configuration itself the second
    for name in {f.name for f in fields(SvdSteeringConfig)} - {f.name for f in fields(PeftConfig)} - elsewhere:
        assert re.search(rf"config\.{name}\b", code), f"SvdSteeringConfig.{name} is read nowhere"


def test_ci_runs_the_readmes_test_command():
    readme, ci = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    for command in ("pip install -q uv && uv run accelerate launch train.py",
                    "pip install -q uv && uv run pytest -v --tb=short"):  # fmt: skip
        assert command in readme
    assert "uv run pytest -v --tb=short" in ci and "ruff check" in ci and "ruff format --check" in ci


def test_the_readmes_snippets_are_of_public_names():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    assert snippets
    for snippet in snippets:
        compile(snippet, "README.md", "exec")
        for names in re.findall(r"^from repeng import (.+)$", snippet, flags=re.M):
            for name in names.split(","):
                assert name.strip() in {*repeng.__all__, "tiny"}


def test_the_readmes_snippets_run(tmp_path, monkeypatch):
    """All but the one that loads what training wrote, which the model card's test stands for."""
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ran = [snippet for snippet in re.findall(r"```python\n(.*?)```", readme, flags=re.S) if "outputs/" not in snippet]
    assert len(ran) >= 2
    for snippet in ran:
        exec(compile(snippet, "README.md", "exec"), {})


def test_imports_go_down_only():
    """tuner/ knows nothing of ours; the embedded world is known to nobody below the command lines."""
    for path, text in SOURCES.items():
        imported = re.findall(r"^\s*(?:from|import) (repeng[\w.]*)", text, flags=re.M)
        inside = path.relative_to(ROOT).parts
        if "tuner" in inside:
            assert all(name.startswith("repeng.tuner") for name in imported), path
        if "tiny" not in inside and path.name not in ("train.py", "cli.py"):
            assert not any(name.startswith("repeng.tiny") for name in imported), path
            assert not re.search(r"^\s*from repeng import .*\btiny\b", text, flags=re.M), path


def test_nothing_optional_is_imported_at_import_time():
    code = (
        "import sys, repeng; print([m for m in ('matplotlib', 'wandb', 'bitsandbytes', 'pytest') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_sorted_and_exist():
    assert repeng.__all__ == sorted(repeng.__all__)
    assert all(getattr(repeng, name).__doc__ for name in repeng.__all__)
    assert (ROOT / "repeng" / "py.typed").exists()


def test_only_safe_files_are_read():
    for path, text in SOURCES.items():
        assert not re.search(r"torch\.load\(|import pickle|trust_remote_code=True", text), path
