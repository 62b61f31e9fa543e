"""Every command, snippet, file, link and quoted message of README and docs is one that works, and so are all helps."""

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from dataclasses import asdict
from functools import cache, reduce
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from pages import GENERATED, anchors, fences, links, prose, read_pages, sentences
from support import ROOT

import repeng
from repeng import cli, extract, load_pairs, load_questions, tiny
from repeng.cli import make_parser
from repeng.data.arguments import TaskArguments
from repeng.data.configuration import hints_for, names_of, read_configs
from repeng.data.files import load_texts
from repeng.export.lora import serving_commands
from repeng.serve.protocol import Completion
from repeng.serve.protocol import parse as parse_body
from repeng.train import run
from repeng.train.arguments import SteeringArguments, parse_arguments
from repeng.train.launch import split_flags

SCRIPTS = [*ROOT.glob("docs/*.py"), *ROOT.glob("configs/data/*.py")]
PAGES = read_pages()
FENCES = [fence for name, page in PAGES.items() for fence in fences(name, page)]
FILES = [fence for fence in FENCES if fence.title]
PYTHON = list(dict.fromkeys(fence.text for fence in FENCES if fence.kind == "python"))
LINES = (
    line.partition("  #")[0].strip() for fence in FENCES if fence.kind == "bash" for line in fence.text.splitlines()
)
COMMANDS = [line for line in dict.fromkeys(LINES) if line and not line.startswith("#")]
# Pages whose sentences are held short: not those that scripts write, nor the ones that derive the method.
PLAIN = [
    name
    for name in PAGES
    if name not in (*GENERATED, "docs/how_it_works.md", "docs/loss_geometry.md", "docs/ideas.md")
]
LINKING = {
    **PAGES,
    **{path.name: path.read_text(encoding="utf-8") for path in [ROOT / "CONTRIBUTING.md"] if path.is_file()},
}
LONGEST_SENTENCE, LONGEST_README = 40, 138  # words, lines
# What makes a command quick enough for a test.
QUICK = {
    "train": "--max_steps 2 --save_steps 1 --num_pairs 40 --use_cpu true --questions_file quick.jsonl",
    "evaluate": "--questions_file quick.jsonl",
    "calibrate": "--sequences 8",
    "export": "--output exported-{}",
}
# A hub, a GPU or a quarter of an hour: parsed, not run.
NEEDS = re.compile(r"qwen|llama|gemma|own\.yaml|--with |smollm2|concise", re.I)
# A snippet that takes an adapter, a server or a training.
SLOW = re.compile(r"outputs/|localhost|\.train\(")


def words_of(command):
    """The program and its words, without what starts it."""
    words = shlex.split(command.split("&&")[-1])
    if words[:2] == ["uv", "run"]:
        words = words[2:]
    while words[0] in ("--with", "--extra", "--group"):
        words = words[2:]
    return words


def flags_in(words):
    return {word for word in words if word.startswith("--")}


def parse(words):
    """Let the command's own parsers read it; raises if they refuse."""
    match words:
        case ["repeng", *before, "--help"]:
            assert not before or (len(before) == 1 and before[0] in cli.COMMANDS)
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
        case ["vllm", "serve", _, *rest]:
            written = serving_commands([Path("a"), Path("b")], "BASE", 8)
            assert flags_in(rest) <= flags_in(shlex.split(written))
        case ["llama-server", *rest]:  # which the export writes into a README
            written = (ROOT / "repeng" / "export" / "gguf.py").read_text(encoding="utf-8")
            assert all(flag in written for flag in flags_in(rest))
        case ["pip", "install", wheel]:
            version, extras = re.fullmatch(r"dist/repeng-(.+)-py3-none-any\.whl(?:\[(.+)\])?", wheel).groups()
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            assert version == repeng.__version__ and {*(extras or "plot").split(",")} <= {
                *project["optional-dependencies"]
            }
        case ["cd", "repeng"]:  # behind `git clone`
            pass
        case ["pytest", *_] | ["uv", "build"] | ["mkdocs", "build", *_] | ["ruff", *_]:
            pass
        case _:
            pytest.fail(f"nobody knows how to check {words}")


def write_files(folder):
    """The files that the pages let their reader write."""
    for fence in FILES:
        (folder / fence.title).write_text(fence.text, encoding="utf-8")


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


# -- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_its_program_takes(command, own_files):
    parse(words_of(command))


def test_the_parsers_see_a_mistake(own_files):
    mistakes = (
        "repeng train --config own.yaml --learning_rat 1",
        "repeng evaluate x --learning_rate 1",
        "repeng trian --help",
        "pip install 'dist/repeng-0.1.0-py3-none-any.whl[plots]'",
        "vllm serve BASE --max-lora 2",
    )
    for command in mistakes:
        with pytest.raises((ValueError, AssertionError)):
            parse(words_of(command))


# -- files ---------------------------------------------------------------------------------------------------------


def test_no_two_pages_give_one_file_two_contents():
    for fence in FILES:
        others = [one for one in FILES if one.title == fence.title and one.text != fence.text]
        assert not others, f"{fence.title} in {fence.page} and in {others[0].page}"


@pytest.mark.parametrize("name", sorted({fence.title for fence in FILES}))
def test_a_file_is_read_by_the_package(name, own_files):
    if name.endswith(".yaml"):
        assert read_configs([name], hints_for([TaskArguments, SteeringArguments]))
        parse_arguments(["--config", name], run.DEFAULT_CONFIG)
    elif "pairs" in name:
        assert load_pairs(name)
    elif "neutral" in name or name.endswith(".txt"):
        assert load_texts(name)
    else:
        assert load_questions(name)


@pytest.mark.parametrize("fence", [fence for fence in FENCES if fence.kind in ("json", "yaml") and not fence.title])
def test_data_without_a_name_parses(fence):
    assert json.loads(fence.text) if fence.kind == "json" else yaml.safe_load(fence.text)


# -- snippets ------------------------------------------------------------------------------------------------------


def needs(text):
    """Whether a snippet names a model that is not here."""
    texts = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return any(isinstance(value, str) and NEEDS.search(value) for value in texts)


@pytest.mark.parametrize("text", PYTHON)
def test_a_snippet_is_of_names_that_exist(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                if node.module == "repeng":
                    assert alias.name in {*repeng.__all__, "tiny", "tuner", "export"}


@pytest.mark.parametrize("text", [text for text in PYTHON if not SLOW.search(text) and not needs(text)])
def test_a_snippet_runs(text, own_files):
    exec(compile(text, "snippet", "exec"), {})


# -- what the text says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINKING)
def test_a_link_leads_somewhere(name):
    for target in links(LINKING[name]):
        path, _, anchor = target.partition("#")
        place = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert place.exists(), f"{name}: {target}"
        if place.suffix == ".png":
            assert place.read_bytes().startswith(b"\x89PNG"), target
        if anchor:
            assert anchor in anchors(place.read_text(encoding="utf-8")), f"{name}: {target}"


@cache
def known_flags():
    """Flags of this package's commands, of the launcher, and those that an export hands on."""
    parser = make_parser()
    commands = next(action for action in parser._actions if hasattr(action, "choices") and action.choices).choices
    parsers = [parser, *commands.values(), launch_command_parser()]
    ours = {option for one in parsers for action in one._actions for option in action.option_strings}
    keys = {f"--{name}" for name in names_of((TaskArguments, SteeringArguments))}
    return ours | keys | {"--control-vector", "--lora", "--cpu", "--nproc_per_node"}


@pytest.mark.parametrize("name", [name for name in PAGES if name not in GENERATED])
def test_a_flag_or_a_name_in_the_text_exists(name):
    for code in re.findall(r"`([^`\n]+)`", prose(PAGES[name])):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", code):
            modules = re.match(r"python -m ([\w.]+)", code)
            assert modules or flag in known_flags(), f"{name}: {flag}"
        for dotted in re.findall(r"(?<![\w./])repeng(?:\.[A-Za-z_]\w*)+(?![\w/])", code):
            if not dotted.endswith((".html", ".py")):
                parts = dotted.split(".")
                assert reduce(attribute_or_module, parts[1:], "repeng"), f"{name}: {dotted}"


def attribute_or_module(owner, part):
    """The attribute or submodule of what was found before; at first of the name of a package."""
    owner = importlib.import_module(owner) if isinstance(owner, str) else owner
    if not hasattr(owner, part):
        importlib.import_module(f"{owner.__name__}.{part}")
    return getattr(owner, part)


def test_a_message_that_a_heading_quotes_is_one_of_the_code():
    constants = [
        node.value
        for path in ROOT.glob("repeng/**/*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    quoted = re.findall(r'"([^"]+)"', "\n".join(re.findall(r"^### (.+)$", PAGES["docs/failure_modes.md"], re.M)))
    assert len(quoted) > 10
    for message in quoted:
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert any(part in constant for constant in constants), message


@pytest.mark.parametrize("name", PLAIN)
def test_sentences_are_short(name):
    long = [sentence for sentence in sentences(PAGES[name]) if len(sentence.split()) > LONGEST_SENTENCE]
    assert not long, f"{name}: {long}"


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= LONGEST_README


# -- all commands, one after the other -----------------------------------------------------------------------------


@pytest.mark.processes
def test_the_commands_run_one_after_the_other(tmp_path):
    """In a folder of their own, made quick; a model and a GPU that are not there are left out."""
    shutil.copy(ROOT / "train.py", tmp_path)
    write_files(tmp_path)
    some = tiny.questions("honesty", "held_out")[::16]
    (tmp_path / "quick.jsonl").write_text("\n".join(json.dumps(asdict(question)) for question in some))
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
        if words in ran or words[0] not in programs or NEEDS.search(command) or words[1] in ("serve", "chat"):
            continue
        kind = words[1] if words[1] in QUICK else "train"
        more = "" if "--help" in words else QUICK[kind].format(len(ran))
        if "--eval_steps" in words:
            more += " --eval_steps 1"
        argv = [sys.executable, *programs[words[0]], *words[1:], *more.split()]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=900, cwd=tmp_path, env=environment)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        ran.append(words)
    assert len(ran) >= 6 and (tmp_path / "outputs" / "tiny" / "report.html").is_file()
    assert (tmp_path / "outputs" / "tiny" / "adapter_model.safetensors").is_file()
    here = [text for text in PYTHON if SLOW.search(text) and not needs(text)]
    for text in (text for text in here if "localhost" not in text):
        run_snippet(text, tmp_path, environment)
    answered_as_the_pages_ask(tmp_path, environment, [text for text in here if "localhost" in text])


def run_snippet(text, folder, environment):
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=300, cwd=folder, env=environment
    )
    assert done.returncode == 0, f"{text}\n{done.stderr[-3000:]}"


def answered_as_the_pages_ask(folder, environment, snippets):
    """Their `repeng serve` runs in a folder, and their `curl` and their clients get an answer."""
    serve = next(words_of(command) for command in COMMANDS if " serve outputs" in command)
    curls = [words_of(command) for command in COMMANDS if command.startswith("curl ")]
    command = [sys.executable, "-m", *serve, "--port", "0", "--use_cpu"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stderr if "running on" in line)
        port = re.search(r"127\.0\.0\.1:(\d+)", line)[1]
        for curl in curls:
            request = urllib.request.Request(f"http://{curl[1].replace('8000', port)}", curl[3].encode())
            with urllib.request.urlopen(request, timeout=60) as response:
                assert json.load(response)["choices"][0]["text"]
        for text in snippets:
            run_snippet(text.replace("8000", port), folder, environment)
    finally:
        process.terminate()
        process.communicate(timeout=60)


# -- helps ---------------------------------------------------------------------------------------------------------

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
