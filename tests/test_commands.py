"""The commands that make and describe things: `extract`, `pairs`, `new`, `info`, `demo`, `completion`."""

import json
import subprocess
import warnings
from dataclasses import asdict
from functools import partial
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from repeng import SteeringVector, SvdSteeringConfig, extract, load_model, load_pairs, steer, tiny
from repeng._command import command
from repeng.cli import COMMANDS, main
from repeng.commands import demo as showing
from repeng.commands import extract as extracting
from repeng.commands.base import base_of_vector
from repeng.commands.new import TEMPLATES, _fitting
from repeng.commands.pairs import _wrong_articles
from repeng.data.behaviours import OPPOSITES, behaviour_of, opposite_of, takes_an
from repeng.data.files import write_json
from repeng.model.sources import find_source
from repeng.train.launch import _status_of

UNIT = {"plus": 2.0, "minus": 1.5}
TASK = ["--model_name_or_path", "tiny", "--positive", "cheerful", "--negative", "gloomy", "--num_pairs", "24"]


def result(capsys, *argv):
    """The JSON that a command prints; nothing else may be on its standard output."""
    capsys.readouterr()
    main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "sentence, found",
    [
        ("more concise", ("concise", 1)),
        ("Be less formal.", ("formal", -1)),
        ("not rude", ("rude", -1)),
        ("not so formal", ("formal", -1)),
        ("kind", ("kind", 1)),
        ("very old-fashioned", ("old-fashioned", 1)),
    ],
)
def test_a_sentence_names_a_behaviour(sentence, found):
    assert behaviour_of(sentence) == found


@pytest.mark.parametrize("sentence", ["", "more", "be", "someone who never answers any question at all"])
def test_a_sentence_without_a_word_is_refused(sentence):
    with pytest.raises(ValueError, match="behaviour in one word"):
        behaviour_of(sentence)


def test_opposites_are_mutual():
    rows = [line.split("\t") for line in OPPOSITES.read_text(encoding="utf-8").splitlines()]
    assert all(len(row) == 2 and row[0] != row[1] for row in rows)
    firsts = [row[0] for row in rows]
    assert len({*firsts}) == len(firsts) and opposite_of("verbose") == "concise"
    assert opposite_of("blue") is None


def test_articles_fit_their_words():
    words = ("honest", "open", "unimaginative", "useful", "european", "one-sided", "kind", "unique")
    assert [word for word in words if takes_an(word)] == ["honest", "open", "unimaginative"]
    assert _wrong_articles("You are a honest person and an kind one") == ["a honest", "an kind"]
    assert _fitting(TEMPLATES, "kind", "cruel") == list(TEMPLATES)
    assert all("a {" not in one for one in _fitting(TEMPLATES, "honest", "evasive"))
    assert any("an {persona}" in one for one in _fitting(TEMPLATES, "honest", "evasive"))
    assert all("a {" not in one and "an {" not in one for one in _fitting(TEMPLATES, "honest", "dishonest"))


def test_pairs_are_made_and_checked(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    made = result(capsys, "pairs", "make", *TASK, "--output", file)
    pairs = load_pairs(file)
    assert made["pairs"] == len(pairs) == len({*pairs}) > 2
    found = result(capsys, "pairs", "check", file, "--model_name_or_path", "tiny")
    assert found == {"pairs": len(pairs), "problems": [], "warnings": []}
    before = file.read_bytes()
    with pytest.raises(SystemExit, match="no command overwrites") as stop:
        main(["pairs", "make", *TASK, "--output", str(file)])
    assert stop.value.code == 2 and file.read_bytes() == before


def test_a_pairs_file_replaces_the_behaviour_of_a_configuration(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("model_name_or_path: tiny\npositive: cheerful\nnegative: gloomy\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in tiny.pairs("mood", 5, 0)))
    found = result(capsys, "pairs", "check", tmp_path / "p.jsonl", "--config", tmp_path / "own.yaml")
    assert found["pairs"] == 5 and not found["problems"]


def test_problems_of_pairs_end_with_status_1(tmp_path, capsys):
    good, *_ = tiny.pairs("mood", 2, 0)
    rows = [asdict(good), {**asdict(good), "rejected": good.chosen}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as stop:
        main(["pairs", "check", str(tmp_path / "p.jsonl"), "--model_name_or_path", "tiny", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert stop.value.code == 1 and [problem["index"] for problem in found["problems"]] == [1]


def test_all_problems_of_pairs_from_keys_are_listed(tmp_path, capsys):
    (tmp_path / "suffixes.txt").write_text("".join(f"{text}\n" for text in ("zorp", "quux", "flib", "grun")))
    words = ["--positive", "cheerful", "--negative", "gloomy", "--templates", "be {persona} . "]
    task = ["--model_name_or_path", "tiny", "--suffixes_file", str(tmp_path / "suffixes.txt"), *words]
    with pytest.raises(SystemExit) as stop:
        main(["pairs", "check", *task, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert stop.value.code == 1 and {problem["index"] for problem in found["problems"]} == {0, 1, 2, 3}
    with pytest.raises(SystemExit, match="4 problems in 4 pairs"):
        main(["pairs", "make", *task, "--output", str(tmp_path / "pairs.jsonl")])
    assert not (tmp_path / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["pairs"], "check, make"),
        (["pairs", "check", "p.jsonl"], "--model_name_or_path"),
        (["pairs", "make", *TASK], "needs --output"),
        (["pairs", "check", *TASK, "--output", "x"], "leave it out"),
        (["extract", *TASK, "--method", "mean_dif"], "did you mean 'mean_diff'"),
        (["extract", *TASK, "--output", "x.gguf"], ".safetensors"),
        (["extract", *TASK, "--outptu", "x"], "did you mean 'output'"),
        (["new", "more", "blue"], "Give --opposite"),
        (["new"], "Give WORDS"),
        (["new", "more", "kind", "--output", "kind.txt"], ".yaml"),
        (["new", "kind", "--opposite", "kind"], "two different words"),
        (["demo", "moood"], "did you mean 'mood'"),
        (["info", "nowhere"], "nowhere"),
        (["completion", "fishy"], "fishy"),
        ([], "required"),
        (["demoo"], "did you mean 'demo'"),
    ],
)
def test_bad_input_of_these_commands_has_status_2(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extracting, "load_task_model", None)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and message in str(stop.value)
    assert not any(tmp_path.iterdir())


def test_a_vector_is_extracted(tmp_path, capsys, embedded, tokenizer):
    file = tmp_path / "mood.safetensors"
    told = result(capsys, "extract", *TASK, "--use_cpu", "--output", file)
    vector = SteeringVector.load(file)
    assert told["layers"] == vector.layers == [4] and vector.model_name == "tiny"  # two thirds of six layers
    assert told["accuracy"] == vector.metadata["accuracy"] and min(told["accuracy"].values()) > 0.6
    told = result(
        capsys, "extract", *TASK, "--layers", 1, 3, "--method", "svd", "--output", tmp_path / "b.safetensors"
    )
    assert told["layers"] == [1, 3] and SteeringVector.load(tmp_path / "b.safetensors").metadata["method"] == "svd"
    before = file.read_bytes()
    with pytest.raises(SystemExit, match="no command overwrites"):
        main(["extract", *TASK, "--seed", "7", "--use_cpu", "--output", str(file)])
    assert file.read_bytes() == before


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with one thing of each kind that `info` knows."""
    folder = tmp_path_factory.mktemp("made")
    base, tokenizer = tiny.load()
    vector = extract(base, tokenizer, tiny.pairs("mood", 24, 0), layers=[2])
    vector.save(folder / "v.safetensors")
    vector.save_gguf(folder / "v.gguf")
    for name, config in (
        ("svd", SvdSteeringConfig(r=4, target_modules=["up_proj"], init_weights=False)),
        ("lora", LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False)),
    ):
        get_peft_model(tiny.load()[0], config).save_pretrained(folder / name)
    (folder / "svd" / "config.yaml").write_text("model_name_or_path: tiny\npositive: cheerful\nnegative: gloomy\n")
    write_json(folder / "svd" / "report.json", {"verdict": "so so", "rows": {"a": {"figures": {"effect": [1, 0, 2]}}}})
    write_json(folder / "lora" / "calibration.json", UNIT)
    for place, verdict in (("", "as trained"), ("evaluation", "as evaluated later")):
        (folder / "lora" / place).mkdir(exist_ok=True)
        write_json(folder / "lora" / place / "report.json", {"verdict": verdict, "rows": {}})
    (folder / "p.jsonl").write_text(json.dumps(asdict(tiny.pairs("mood", 1, 0)[0])))
    (folder / "q.jsonl").write_text(json.dumps({"prompt": "a", "choices": ["b", "c"], "target": "b"}))
    return folder


@pytest.mark.parametrize(
    "name, kind, facts",
    [
        ("v.safetensors", "a steering vector", {"base model": "tiny", "layers": [2], "method": "mean_diff"}),
        ("v.gguf", "a steering vector", {"layers": [2], "sites": ["residual"]}),
        ("svd", "an adapter", {"method": "SVD steering", "positive": "cheerful", "verdict": "so so", "rank": 4}),
        ("lora", "an adapter", {"method": "LoRA", "base model": "tiny", "rank": 4, "calibration": UNIT}),
        ("lora", "an adapter", {"verdict": "as evaluated later"}),
        ("svd/report.json", "a report", {"verdict": "so so"}),
        ("p.jsonl", "pairs", {"rows": 1}),
        ("q.jsonl", "questions", {"rows": 1}),
    ],
)
def test_info_knows_what_things_are(made, capsys, name, kind, facts):
    found = result(capsys, "info", made / name)
    assert found["kind"] == kind and facts.items() <= found.items()
    for line in found["commands"]:
        assert line.split()[1] in (*COMMANDS, "chat")


def test_info_knows_models(capsys):
    found = result(capsys, "info", find_source("tiny").path)
    assert found["kind"] == "a model" and found["num_hidden_layers"] == 6


def test_info_shows_texts_as_they_are(tmp_path, capsys):
    """Neither marks of the table's library nor control characters act."""
    row = {"chosen": "[INST] [/b] be kind\x1b[2J", "rejected": "[INST] be cruel"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    main(["info", str(tmp_path / "p.jsonl")])
    told = "".join(capsys.readouterr().out.split())
    assert "[INST][/b]bekind" in told and "\x1b" not in told
    write_json(tmp_path / "report.json", {"verdict": "[/red]", "rows": {"a": {"figures": 3}, "b": 4}})
    assert result(capsys, "info", tmp_path / "report.json")["verdict"] == "[/red]"


def test_a_vector_of_a_folder_names_the_whole_folder(tmp_path, embedded, tokenizer, monkeypatch):
    folder, pairs = tmp_path / "models" / "gpt2", tiny.pairs("mood", 12, 0)
    embedded[0].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = load_model(str(folder))[0]
    extract(model, tokenizer, pairs, layers=[2], held_out=0).save(tmp_path / "v.safetensors")
    assert base_of_vector(tmp_path / "v.safetensors") == str(folder)
    SteeringVector({("residual", 2): torch.ones(96)}, {"model": find_source("tiny").path}).save(
        tmp_path / "t.safetensors"
    )
    assert base_of_vector(tmp_path / "t.safetensors") == "tiny"
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is not here"):  # and no model of the hub is called gpt2 by mistake
        base_of_vector(tmp_path / "v.safetensors")


def test_the_end_of_the_input_is_no_answer(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: "", fileno=lambda: 0))
    with pytest.raises(SystemExit, match="Give WORDS") as stop:
        main(["new"])
    assert stop.value.code == 2


@pytest.mark.parametrize("name, text", [("x.jsonl", '{"a": 1}'), ("x.safetensors", "no"), ("report.json", "[]")])
def test_info_says_what_is_wrong_with_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=name) as stop:
        main(["info", str(tmp_path / name)])
    assert stop.value.code == 2


def test_the_completion_script_is_one(capsys):
    main(["completion", "bash"])
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert all(name in script for name in COMMANDS) and "--learning_rate" in script


@pytest.mark.parametrize("usual, shown", [("default", ["mine"]), ("error", ["`gradient_checkpointing` is old"])])
def test_warnings_that_no_user_can_act_on_are_not_shown_unless_asked_for(usual, shown):
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        if usual == "error":  # as `python -W error` does
            warnings.simplefilter("error")
        told = []
        try:
            with command():
                warnings.warn("`gradient_checkpointing` is old", FutureWarning, stacklevel=1)
                warnings.warn("mine", stacklevel=1)
        except FutureWarning as error:
            told.append(str(error))
    assert [str(one.message) for one in caught] + told == shown


def test_the_unit_of_the_demo_is_a_cost(monkeypatch):
    model, tokenizer = tiny.load()
    monkeypatch.setattr(showing, "some_suffixes", lambda *_: [])
    monkeypatch.setattr(showing, "trait_pairs", lambda *_: tiny.pairs("mood", 48, 0))
    asked = showing.Asked(model, tokenizer, ["the rain settles on", "today the weather"])
    vector = showing.trait_vector(model, tokenizer, "mood", asked)
    dial = partial(steer, model, vector=vector)
    with torch.no_grad():
        assert asked.cost(dial, 0.0) == 0.0 and asked.answers(dial, 0.0) == asked.base
        for sign, arm in ((-1.0, "minus"), (1.0, "plus")):
            cost = asked.cost(dial, sign)
            assert cost == pytest.approx(showing.NATS, rel=0.3)
            assert vector.metadata["calibration"]["spent"][arm] * showing.NATS == pytest.approx(cost, rel=0.01)
        assert asked.answers(dial, 1.0) != asked.answers(dial, -1.0)


def test_a_training_tells_its_report_as_json(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def trained(argv):
        subprocess.run(["echo", "from another process"], check=True)
        print("from this one", argv)
        write_json(tmp_path / "here" / "report.json", {"verdict": "fine"})

    monkeypatch.setattr("repeng.train.launch.launch", trained)
    told = result(capfd, "train", "--config", "tiny", "--output_dir", "elsewhere", "--output_dir=here")
    assert told == {"output_dir": "here", "verdict": "fine"}


@pytest.mark.parametrize(
    "error, status",
    [(CalledProcessError(2, "x"), 2), (CalledProcessError(-9, "x"), 137), (SystemExit(3), 3), (SystemExit("no"), 1)],
)
def test_the_status_of_the_training_is_passed_on(error, status, capsys):
    assert _status_of(error) == status
    assert bool(capsys.readouterr().err) == (status == 137)


@pytest.mark.real
def test_the_demo_dials_a_real_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = result(capsys, "demo", "mood", "--use_cpu")
    assert first["kl_per_token"]["+0"] == 0.0
    assert all(0.2 < first["kl_per_token"][c] < 0.6 for c in ("-1", "+1"))
    assert all(len({row["-1"], row["+0"], row["+1"]}) == 3 for row in first["answers"])
    again = result(capsys, "demo", "mood", "--use_cpu")  # the vector is read from its file
    assert again["answers"] == first["answers"] and again["seconds"] < first["seconds"]


@pytest.mark.real
def test_a_behaviour_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = result(capsys, "new", "less", "gloomy", "--opposite", "cheerful", "--use_cpu")
    assert (found["positive"], found["negative"], found["moves"]) == ("cheerful", "gloomy", True)
    assert all(0 < found["standard_errors"][name] < abs(effect) + 1 for name, effect in found["effects"].items())
    assert max(found["effects"].values()) > 1.0 and 0 < len(found["templates"]) <= 3
    checked = result(capsys, "pairs", "check", "--config", "smollm2", "cheerful.yaml")
    assert checked["pairs"] == 400 and not checked["problems"]
