"""train.py as users run it, in processes of its own."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel
from support import ROOT

from repeng import steer, tiny
from repeng.commands.base import load_task_model
from repeng.data.arguments import TaskArguments
from repeng.data.kinds import layer_request
from repeng.data.task import make_task
from repeng.train import build as building
from repeng.train import run as script
from repeng.train.arguments import parse_arguments
from repeng.train.build import Sites, build
from repeng.train.recipe import Recipe
from repeng.train.run_folder import as_config

QUICK = "--max_steps 2 --save_steps 1 --num_pairs 24 --r 4 --logging_steps 1 --per_device_train_batch_size 4".split()


def launch(*argv, timeout=200):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(ROOT / "train.py")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    with one_core_for_a_child():
        return subprocess.run(
            [*command, *map(str, argv)], capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment
        )


@contextmanager
def one_core_for_a_child():
    """Beside another worker of the tests, more threads than cores would slow both many times over."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[int(worker.removeprefix("gw")) % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder, questions = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("data") / "questions.jsonl"
    some = tiny.questions("honesty", "held_out")[::16]
    questions.write_text("\n".join(json.dumps(asdict(question)) for question in some))
    neutral = questions.with_name("neutral.txt")
    neutral.write_text("\n".join(tiny.neutral_texts(40, seed=0)))
    done = launch(*QUICK, "--questions_file", questions, "--neutral_file", neutral, "--output_dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_the_folder_is_complete(outcome):
    folder, done = outcome
    report = json.loads((folder / "report.json").read_text())
    assert report["optimizer_steps"] == 2 and report["seed"] == 42
    assert report["seconds"]["training"] > 0 and report["seconds"]["comparison"] > 0
    assert set(report["versions"]) >= {"torch", "peft", "repeng", "python"}
    kinds = ("this adapter", "persona prompts", "mean difference", "random direction")
    assert all(any(name.startswith(kind) for name in report["rows"]) for kind in kinds)
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert log[0]["start_kl"] == 0.0 and {"separation", "coherence", "neutral"} <= set(log[1])
    for name in ("report.png", "learning_curve.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert 'id="samples"' in (folder / "report.html").read_text() and (folder / "report.csv").stat().st_size > 1000
    assert report["rows"]["this adapter"]["range_interval"][0] <= report["rows"]["this adapter"]["range"]
    assert str(folder.parent) not in (folder / "README.md").read_text()
    assert report["verdict"] in done.stdout
    assert not list(folder.glob(".saving-*")) and not list(folder.glob(".probe-*"))


@pytest.mark.parametrize(
    "world, device, threads, launched, wanted",
    [
        (1, "cpu", "1", True, True),
        (1, "cpu", "1", False, False),
        (1, "cpu", "2", True, False),
        (2, "cpu", "1", True, False),
        (1, "cuda", "1", True, False),
    ],
)
def test_one_process_on_a_cpu_uses_every_core(world, device, threads, launched, wanted, monkeypatch):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7))
    seen = []
    monkeypatch.setattr(script.torch, "set_num_threads", seen.append)
    script.use_all_cores(SimpleNamespace(world_size=world, device=torch.device(device)))
    assert seen == ([7] if wanted else [])


def test_the_resolved_configuration_repeats_the_run(outcome):
    folder, _ = outcome
    task, again = parse_arguments([], folder / "config.yaml")
    assert (again.max_steps, task.num_pairs, again.r, again.output_dir) == (2, 24, 4, str(folder))
    assert again.layers and again.loss_layer == max(layer_request(again.layers))
    assert "token" not in yaml.safe_load((folder / "config.yaml").read_text())


def test_a_configuration_holds_what_was_given_and_nothing_that_follows_from_it(tmp_path):
    """What `TrainingArguments` derives would win over the command line when the file is used again."""
    given = {"gradient_checkpointing": "true", "adam_beta2": "0.9", "max_steps": "3", "output_dir": str(tmp_path)}
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    task, args = parse_arguments(["--config", "tiny", *words])
    built = SimpleNamespace(base="tiny", sites=Sites([2, 3], 3, 8))
    keys = as_config(task, args, built)
    assert keys.keys() >= given.keys() and keys["layers"] == [2, 3]
    ours = {f.name for f in fields(Recipe)} | {f.name for f in fields(TaskArguments)}
    assert keys.keys() - ours == {"gradient_checkpointing", "adam_beta2"}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(keys))
    _, again = parse_arguments(["--config", str(tmp_path / "again.yaml"), "--gradient_checkpointing", "false"])
    assert not again.gradient_checkpointing and again.adam_beta2 == 0.9


def test_an_evaluation_asks_about_the_pairs_that_training_held_out(tmp_path):
    """`repeng evaluate` reads config.yaml and draws by its seed."""
    rows = [
        {"chosen": f"{p.chosen} {p.suffix}", "rejected": f"{p.rejected} {p.suffix}"} for p in tiny.pairs("mood", 40, 0)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--pairs_file", str(tmp_path / "pairs.jsonl"), "--seed", "7", "--output_dir", str(tmp_path / "out")]
    task_args, args = parse_arguments([*words, "--use_cpu", "true", "--r", "4"])
    run = build(task_args, args, tiny.task(task_args, args.seed))
    keys = as_config(task_args, args, run)
    loaded = load_task_model(task_args, keys["seed"], use_cpu=True, bf16=False)
    task = make_task(task_args, loaded.model, loaded.tokenizer, loaded.pairs, seed=keys["seed"], own=loaded.own)
    assert task.questions == run.task.questions and task.pairs == run.task.pairs
    assert task.unseen_neutral_texts == run.task.unseen_neutral_texts


def test_every_directory_that_training_writes_loads(outcome, batch):
    folder, _ = outcome
    adapters = [path.parent for path in folder.rglob("adapter_config.json")]
    assert {path.name for path in adapters} == {folder.name, "checkpoint-1", "checkpoint-2"}
    expected = tiny.load()[0](batch).logits
    results = {}
    for path in adapters:
        model = PeftModel.from_pretrained(tiny.load()[0], path).eval()
        with torch.no_grad():
            with steer(model, 0.0):
                assert torch.equal(model(batch).logits, expected)
            with steer(model, 1.0):
                results[path.name] = model(batch).logits
    assert torch.equal(results[folder.name], results["checkpoint-2"])
    assert not torch.equal(results["checkpoint-1"], results["checkpoint-2"])


def test_the_model_cards_snippet_runs(outcome, capsys, monkeypatch):
    folder, _ = outcome
    monkeypatch.chdir(folder)
    snippet = (folder / "README.md").read_text().split("```python")[1].split("```")[0]
    exec(compile(snippet, "README.md", "exec"), {})
    assert [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()] == [-1, 0, 1]


@pytest.mark.processes
def test_a_model_and_a_pairs_file_are_enough(tmp_path):
    """Another architecture, saved to a folder, and JSON Lines with two keys: nothing else is said."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    _, tokenizer = tiny.load()
    torch.manual_seed(0)
    model = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"chosen": f"{p.chosen} {p.suffix}", "rejected": f"{p.rejected} {p.suffix}"} for p in tiny.pairs("mood", 40, 0)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.yaml").write_text(f"model_name_or_path: {tmp_path}/model\npairs_file: {tmp_path}/pairs.jsonl\n")
    done = launch(
        "--config",
        tmp_path / "own.yaml",
        "--output_dir",
        tmp_path / "out",
        "--max_steps",
        "2",
        "--save_strategy",
        "no",
        "--require_steering",
        "true",
        "--learning_rate",
        "1e-9",
    )
    # An adapter that has hardly moved does not steer: the command fails, but everything has been written.
    assert done.returncode != 0 and "does not steer" in done.stderr, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {name.split(".")[2] for name in report["adapted"]} == {"0", "1", "2", "3"}
    PeftModel.from_pretrained(Olmo2ForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out")


@pytest.mark.parametrize(
    "text, argv, layers",
    [
        ("layers: 0.3-0.7\n", [], "0.3-0.7"),
        ("layers: [2, 3]\n", [], [2, 3]),
        ("layers: 2\n", [], [2]),
        ("", ["--layers", "0.3-0.7"], "0.3-0.7"),
        ("", ["--layers", "4", "1"], [4, 1]),
        ("", [], None),
    ],
)
def test_layers_are_indices_or_a_share_of_the_depth(tmp_path, text, argv, layers):
    config = write(tmp_path / "c.yaml", f"positive: a\nnegative: b\ntarget_modules: residual\n{text}")
    _, args = parse_arguments([*argv, "--adapter", "svd", "--directions", "top"], config)
    request = args.layers and layer_request(args.layers)
    assert (request, args.target_modules, args.directions) == (layers, ["residual"], "top")


def write(path, text):
    path.write_text(text)
    return path


BAD_INPUT = {
    "unknown key in the file": ("separation_traget: 2\n", [], "did you mean 'separation_target'"),
    "unknown key on the line": ("", ["--coherence_wieght", "3"], "did you mean 'coherence_weight'"),
    "unknown module": ("target_modules: [q_prj]\n", [], "down_proj, gate_proj, k_proj"),
    "no share": ("layers: deep\n", [], "0.3-0.7"),
    "share outside": ("", ["--layers", "30-70"], "within 0-1"),
    "unknown layer": ("", ["--layers", "2", "9"], "layers 0 to 5"),
    "rank": ("r: 65\n", [], "give r ≤ 64"),
    "unknown loss site": ("loss_site: up_prj\n", [], "up_proj"),
    "missing pairs": ("positive:\nnegative:\npairs_file: nowhere.jsonl\n", [], "nowhere.jsonl"),
    "both sources": ("pairs_file: nowhere.jsonl\n", [], "either pairs_file or positive"),
    "one word": ("negative:\n", [], "both positive and negative"),
    "unknown persona": ("positive: brave\n", [], "honest, truthful"),
    "target": ("", ["--separation_target", "0"], "separation_target should be greater than 0"),
    "missing config": (None, [], "absent.yaml"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_any_work(tmp_path, name, monkeypatch, capsys):
    text, argv, message = BAD_INPUT[name]
    config = tmp_path / "absent.yaml"
    if text is not None:
        config = write(tmp_path / "c.yaml", "model_name_or_path: tiny\npositive: honest\nnegative: dishonest\n")
        given = yaml.safe_load(config.read_text()) | (yaml.safe_load(text) or {})
        config.write_text(yaml.safe_dump(given))
    monkeypatch.setattr(script, "SteeringTrainer", None)
    with pytest.raises(SystemExit) as stop:
        script.main(["--config", str(config), "--output_dir", str(tmp_path / "out"), *argv])
    assert message in str(stop.value)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.processes
def test_a_bad_run_ends_with_a_status_and_one_sentence(tmp_path):
    diverges = ("--max_steps", "3", *QUICK[2:], "--learning_rate", "100", "--warmup_steps", "0")
    done = launch(*diverges, "--output_dir", tmp_path)
    assert done.returncode != 0
    assert "not finite at optimizer step" in done.stderr
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_an_unwritable_folder_is_refused(tmp_path):
    blocker = write(tmp_path / "file", "")
    with pytest.raises(SystemExit, match="file"):
        script.main(["--output_dir", str(blocker / "out")])


def test_personas_that_do_little_are_named_before_training(monkeypatch):
    monkeypatch.setattr(building, "traits_that_move", lambda model, tokenizer, least: {"mood": 1.24, "warmth": least})
    doubt = building._doubt(SimpleNamespace(persona_effect=(0.3, 0.1)), None, None)
    assert "0.3 nats" in doubt and "mood (1.2), warmth (1.0)" in doubt
    for effect in (None, (0.9, 0.2), (2.0, 0.1)):  # not known, not known well enough, enough
        assert building._doubt(SimpleNamespace(persona_effect=effect), None, None) is None
