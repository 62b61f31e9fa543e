"""Every command and snippet that README and docs print does what they say, and every entry point has a help."""

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from dataclasses import asdict

import pytest
from accelerate.commands.launch import launch_command_parser
from support import ROOT

import repeng
from repeng import extract, tiny
from repeng.cli import make_parser
from repeng.data.arguments import TaskArguments
from repeng.data.configuration import names_of
from repeng.serve.protocol import Completion
from repeng.serve.protocol import parse as parse_body
from repeng.train import run
from repeng.train.arguments import SteeringArguments, parse_arguments
from repeng.train.launch import split_flags

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = [*ROOT.glob("docs/*.py"), *ROOT.glob("configs/data/*.py")]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
PYTHON = [
    (name, text) for name, page in PAGES.items() for text in re.findall(r"```python\n(.*?)```", page, flags=re.S)
]
COMMANDS = [
    line.partition("  #")[0].strip()
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, flags=re.S)
    for line in block.splitlines()
    if line.strip()
]
# What makes a command of the README quick enough for a test.
QUICK = {
    "train": "--max_steps 2 --save_steps 1 --num_pairs 40 --use_cpu true --questions_file few.jsonl",
    "evaluate": "--questions_file few.jsonl",
    "calibrate": "--sequences 8",
    "export": "",
}
# A hub, a GPU or a quarter of an hour: parsed, not run.
NEEDS = re.compile(r"qwen|llama|gemma|own\.yaml|--with |smollm2")


def words_of(command):
    """The program and its words, without what starts it."""
    words = shlex.split(command.split("&&")[-1])
    if words[:2] == ["uv", "run"]:
        words = words[2:]
    while words[0] in ("--with", "--extra"):
        words = words[2:]
    return words


def parse(words):
    """Let the command's own parsers read it; raises if they refuse."""
    match words:
        case ["accelerate", "launch", *rest]:
            arguments = launch_command_parser().parse_args(rest)
            assert arguments.training_script == "train.py"
            parse_arguments(arguments.training_script_args, run.DEFAULT_CONFIG)
        case ["torchrun", "--nproc_per_node", _, "train.py", *rest]:
            parse_arguments(rest, run.DEFAULT_CONFIG)
        case ["repeng", "train", *rest]:
            own = {"config", *names_of((TaskArguments, SteeringArguments))}
            _, ours = split_flags(rest, launch_command_parser(), own)
            parse_arguments([*ours, "--bf16", "false"], run.DEFAULT_CONFIG)
        case ["repeng", _, *_]:
            _, unknown = make_parser().parse_known_args(words[1:])
            assert not unknown
        case ["curl", url, "-d", body]:
            assert url == "localhost:8000/v1/completions" and parse_body(Completion, body.encode()).steer
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), module
        case ["pytest", *_]:
            pass
        case _:
            pytest.fail(f"nobody knows how to check {words}")


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """The files that the README lets its reader write."""
    monkeypatch.chdir(tmp_path)
    (own,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.S)
    (tmp_path / "own.yaml").write_text(own)
    (tmp_path / "pairs.jsonl").write_text(re.search(r"# (\{.*\})", own)[1] + "\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_its_program_takes(command, own_files):
    parse(words_of(command))


def test_the_parsers_see_a_mistake(own_files):
    for command in ("repeng train --config own.yaml --learning_rat 1", "repeng evaluate x --learning_rate 1"):
        with pytest.raises((ValueError, AssertionError)):
            parse(words_of(command))


@pytest.mark.parametrize("text", [text for _, text in PYTHON])
def test_a_snippet_is_of_public_names(text):
    compile(text, "snippet", "exec")
    for names in re.findall(r"^from repeng import (.+)$", text, flags=re.M):
        for name in names.split(","):
            assert name.strip() in {*repeng.__all__, "tiny"}


@pytest.mark.parametrize("text", [text for _, text in PYTHON if "outputs/" not in text])
def test_a_snippet_runs(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "snippet", "exec"), {})


@pytest.mark.processes
def test_the_commands_run_one_after_the_other(tmp_path):
    """In a folder of their own, made quick; a model and a GPU that are not there are left out."""
    shutil.copy(ROOT / "train.py", tmp_path)
    some = tiny.questions("honesty", "held_out")[::16]
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps(asdict(question)) for question in some))
    model, tokenizer = tiny.load()
    extract(model, tokenizer, tiny.pairs("mood", 72, 0), layers=[2], held_out=0).save(tmp_path / "mood.safetensors")
    programs = {
        "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
        "torchrun": ["-m", "torch.distributed.run"],
        "repeng": ["-m", "repeng"],
    }
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = []
    for command in COMMANDS:
        words = words_of(command)
        if words[0] not in programs or NEEDS.search(command) or words[1] == "serve":
            continue
        kind = words[1] if words[1] in QUICK else "train"
        argv = [sys.executable, *programs[words[0]], *words[1:], *QUICK[kind].split()]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=500, cwd=tmp_path, env=environment)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        ran.append(command)
    assert len(ran) >= 6 and (tmp_path / "outputs" / "tiny" / "evaluation" / "report.html").is_file()
    for text in (text for _, text in PYTHON if "outputs/" in text):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=200, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]

    answered_as_the_readme_asks(tmp_path, environment)


def answered_as_the_readme_asks(folder, environment):
    """Its `repeng serve` runs in a folder, and its `curl` gets an answer."""
    (serve,) = (words_of(command) for command in COMMANDS if " serve " in command)
    (curl,) = (words_of(command) for command in COMMANDS if command.startswith("curl "))
    command = [sys.executable, "-m", *serve, "--port", "0", "--use_cpu"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stderr if "running on" in line)
        port = re.search(r"127\.0\.0\.1:(\d+)", line)[1]
        request = urllib.request.Request(f"http://{curl[1].replace('8000', port)}", curl[3].encode())
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["choices"][0]["text"]
    finally:
        process.terminate()
        process.communicate(timeout=60)


ENTRY_POINTS = [path.stem for path in sorted(ROOT.glob("benchmarks/*.py")) if "argparse" in path.read_text()]


@pytest.mark.parametrize("module", [*(f"benchmarks.{name}" for name in ENTRY_POINTS), "repeng.tiny.pretrain"])
def test_every_entry_point_has_a_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(module).main()
    assert stop.value.code == 0 and "usage:" in capsys.readouterr().out


def test_the_training_script_has_a_help(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{name} " in shown for name in names_of((TaskArguments, SteeringArguments)))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_beside_a_document_imports_exists(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
