"""`repeng evaluate` and `repeng calibrate` on what a user has: the folder of an adapter, the file of a vector."""

import inspect
import json
import math
import subprocess
import sys
from dataclasses import fields

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import randomise, some_questions
from transformers import AutoModelForCausalLM

from repeng import KLBudget, SteeringVector, SvdSteeringConfig, extract, steer, tiny
from repeng.cli import main, make_parser
from repeng.cli.keys import CalibrateArguments, EvaluateArguments
from repeng.cli.parsing import path_first
from repeng.data.arguments import TaskArguments
from repeng.data.configuration import names_of
from repeng.data.questions import Question
from repeng.eval import compare
from repeng.export.vectors import control_vector_name
from repeng.model.loading import load_base
from repeng.model.sources import find_source, gguf_path
from repeng.train.inner_contrastive_loss import inner_contrastive_loss
from repeng.train.recipe import Recipe

KEYS = ["--positive", "cheerful", "--negative", "gloomy"]


@pytest.fixture(scope="module", autouse=True)
def fewer_questions(module_patch):
    whole = tiny.questions
    module_patch.setattr(tiny, "questions", lambda *args, **kwargs: some_questions(whole(*args, **kwargs), 12))
    module_patch.setattr(compare, "screened_layers", lambda depth: [2])
    module_patch.setattr(compare, "FIXED_COSTS", (0.1,))
    module_patch.setattr(compare, "RANDOM_DIRECTIONS", 2)
    module_patch.setattr(tiny, "NEUTRAL_TEST", 16)


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def vector_file(embedded, tokenizer, tmp_path):
    vector = extract(embedded[0], tokenizer, tiny.pairs("mood", 72, 0), layers=[2], held_out=0)
    vector.save(tmp_path / "mood.safetensors")
    return tmp_path / "mood.safetensors"


@pytest.fixture
def adapter_folder(base, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(base, SvdSteeringConfig(r=4, target_modules=["up_proj"], init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    keys = {"positive": "cheerful", "negative": "gloomy", "output_dir": str(tmp_path / "adapter")}
    (tmp_path / "adapter" / "config.yaml").write_text(json.dumps(keys))
    return tmp_path / "adapter"


def test_a_vector_is_evaluated_and_passes(vector_file, capsys):
    main(["evaluate", str(vector_file), *KEYS, "--require_steering", "true"])
    folder = vector_file.with_name("mood-report")
    found = json.loads((folder / "report.json").read_text())
    assert found["shortcomings"] == [] and found["verdict"] in capsys.readouterr().out
    own = found["rows"]["this dial"]
    assert own["range"] > 5 and own["range_interval"][0] > 4
    effect, low, high = own["figures"]["effect"]
    assert low <= effect <= high and low > 4
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.csv", "report.html", "report.png"}


def test_an_adapter_that_was_never_trained_does_not_pass(adapter_folder):
    with pytest.raises(SystemExit, match="does not steer"):
        main(["evaluate", str(adapter_folder), "--require_steering", "true"])
    found = json.loads((adapter_folder / "evaluation" / "report.json").read_text())
    assert found["shortcomings"] and found["rows"]["this dial"]["range"] < 1


def test_a_vector_is_calibrated_where_it_lies(vector_file, embedded, batch, capsys):
    before = SteeringVector.load(vector_file)
    main(["calibrate", str(vector_file), *KEYS, "--nats", "0.5", "--sequences", "24"])
    after = SteeringVector.load(vector_file)
    units = after.metadata["calibration"]
    assert units["budget"]["nats"] == 0.5 and units["spent"]["plus"] == pytest.approx(1.0, abs=0.02)
    with torch.no_grad():
        with steer(embedded[0], units["plus"], vector=before):
            expected = embedded[0](batch).logits
        with steer(embedded[0], 1.0, vector=after):
            assert torch.allclose(embedded[0](batch).logits, expected, atol=1e-5)
    assert capsys.readouterr().out.count("The budget is 0.5") == 2


def test_an_adapter_is_calibrated_where_it_lies(adapter_folder, base, batch):
    plain = PeftModel.from_pretrained(tiny.load()[0], adapter_folder)
    main(["calibrate", str(adapter_folder), "--nats", "0.05", "--sequences", "24"])
    loaded = PeftModel.from_pretrained(tiny.load()[0], adapter_folder)
    units = loaded.peft_config["default"].calibration
    assert 0 < units["plus"] < math.inf and units["plus"] != 1.0
    with torch.no_grad():
        with steer(plain, -units["minus"]):
            expected = plain(batch).logits
        with steer(loaded, -1.0):
            assert torch.allclose(loaded(batch).logits, expected, atol=1e-4)


def test_a_lora_is_calibrated_by_its_weights(base, tmp_path, batch):
    """It has one scale: the stronger arm spends the budget at ±1, and every engine reads the same file."""
    torch.manual_seed(0)
    folder = tmp_path / "lora"
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    before = load_file(folder / "adapter_model.safetensors")
    argv = ["calibrate", str(folder), *KEYS, "--num_pairs", "12", "--nats", "0.05", "--sequences", "6"]
    main(argv)
    after = load_file(folder / "adapter_model.safetensors")
    factors = {key: (after[key].norm() / tensor.norm()).item() for key, tensor in before.items() if ".lora_B." in key}
    factor = next(iter(factors.values()))
    assert json.loads((folder / "calibration.json").read_text())["weights_times"] == pytest.approx(factor, rel=1e-4)
    assert abs(factor - 1) > 0.1 and all(value == pytest.approx(factor, rel=1e-4) for value in factors.values())
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items() if ".lora_A." in key)
    with torch.no_grad(), steer(model, factor):
        expected = model(batch).logits
    loaded = PeftModel.from_pretrained(tiny.load()[0], folder)
    with torch.no_grad():
        assert torch.allclose(loaded(batch).logits, expected, atol=1e-4)
    with pytest.raises(SystemExit, match="left as it is"):
        main([*argv, "--nats", "50"])
    again = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in after.items())


@pytest.mark.parametrize("to", ["lora", "dial", "merged"])
def test_an_adapter_is_exported(adapter_folder, batch, to, capsys):
    own = PeftModel.from_pretrained(tiny.load()[0], adapter_folder)
    coefficients = {"lora": ["-1", "0.5"], "merged": ["-1"]}.get(to, [])
    main(["export", str(adapter_folder), "--to", to, *(["--coefficients", *coefficients] if coefficients else [])])
    folder = adapter_folder.with_name(f"adapter-{to}")
    places = {"lora": ["c-1", "c+0.5"], "dial": ["odd", "even"], "merged": [""]}[to]
    said = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("written: ") for line in said if line.startswith("written")] == [
        str(folder / place) for place in places
    ]
    with torch.no_grad(), steer(own, -1.0):
        expected = own(batch).logits
    if to == "merged":
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert (folder / "tokenizer.json").is_file()
    else:
        plain = PeftModel.from_pretrained(tiny.load()[0], folder / places[0])
    if to != "dial":
        with torch.no_grad():
            assert torch.allclose(plain(batch).logits, expected, atol=1e-4)


def test_a_vector_is_exported(vector_file, capsys):
    main(["export", str(vector_file), "--to", "gguf"])
    path = vector_file.with_name("mood-tiny-add-residual-layers2.gguf")
    assert capsys.readouterr().out == f"written: {path}\n"
    again = SteeringVector.load_gguf(path)
    assert [*again.directions] == [("residual", 2)] and again.metadata["model"] == "tiny"
    with pytest.raises(SystemExit, match="no command overwrites"):
        main(["export", str(vector_file), "--to", "gguf"])
    main(["export", str(vector_file), "--to", "gguf", "--output", str(vector_file.with_name("mine"))])
    assert SteeringVector.load_gguf(vector_file.with_name("mine.gguf")) == again


def test_layers_in_the_name_of_a_control_vector():
    vector = SteeringVector({("residual", i): torch.ones(2) for i in (3, 4, 5, 7, 9, 10)}, {"model": "Qwen/Qwen3 1"})
    assert control_vector_name("mood", vector) == "mood-Qwen3_1-add-residual-layers3-5+7+9-10.gguf"
    assert control_vector_name("a", SteeringVector({("residual", 1): torch.ones(2)}, {"model_type": "llama"})) == (
        "a-llama-add-residual-layers1.gguf"
    )


def test_an_adapter_is_exported_for_llama_cpp(adapter_folder, capsys):
    argv = ["export", str(adapter_folder), "--to", "gguf"]
    main(argv)
    dial = adapter_folder.with_name("adapter-gguf")
    assert {path.name for path in dial.iterdir()} == {"odd.gguf", "even.gguf", "dial.json", "README.md"}
    out = capsys.readouterr().out
    assert f"how to serve it: {dial / 'README.md'}" in out and f"written: {dial / 'odd.gguf'}" in out
    main([*argv, "--coefficients", "1"])
    main([*argv, "--coefficients", "1", "--output", str(adapter_folder.with_name("own"))])
    main([*argv, "--coefficients", "1", "-1", "--output", str(adapter_folder.with_name("both"))])
    for name in ("adapter-c+1.gguf", "own.gguf", "both/c+1.gguf", "both/c-1.gguf"):
        assert adapter_folder.with_name(name.split("/")[0]).joinpath(*name.split("/")[1:]).is_file()
    with pytest.raises(SystemExit, match=r"convert_hf_to_gguf\.py"):
        main(["export", str(adapter_folder), "--to", "merged", "--output", str(adapter_folder.with_name("m.gguf"))])


def test_an_adapter_of_biases_is_exported_as_a_vector(base, tmp_path):
    model = get_peft_model(
        base, SvdSteeringConfig(target_modules="residual", rotate_input=False, layers_to_transform=[1, 2])
    )
    randomise(model)
    model.save_pretrained(tmp_path / "bias")
    argv = ["export", str(tmp_path / "bias"), "--to", "gguf", "--model_name_or_path", "tiny"]
    main(argv)
    again = SteeringVector.load_gguf(tmp_path / "bias-tiny-add-residual-layers1-2.gguf")
    assert again.layers == [1, 2] and again.metadata["model_type"] == "mistral"
    with pytest.raises(SystemExit, match="a control vector serves all of them"):
        main([*argv, "--coefficients", "1"])


def test_an_adapter_is_merged_into_the_gguf_file_of_its_base(tmp_path):
    pytest.importorskip("gguf")
    from tiny_gguf import write_base

    write_base(tiny_models.build("llama"), tmp_path / "base.gguf")
    model = get_peft_model(tiny_models.build("llama"), SvdSteeringConfig(r=4, target_modules=["q_proj"]))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    argv = ["export", str(tmp_path / "adapter"), "--to", "merged", "--coefficients", "-1"]
    argv += ["--model_name_or_path", str(tmp_path), "--gguf_file", "base.gguf", "--output", str(tmp_path / "m.gguf")]
    main(argv)
    merged, ids = load_base(str(tmp_path / "m.gguf")).eval(), torch.arange(6)[None]
    with torch.no_grad(), steer(model.eval(), -1.0):
        assert torch.allclose(merged(ids).logits, model(ids).logits, atol=0.01)
    assert gguf_path(find_source("tiny")) is None


@pytest.mark.parametrize(
    "argv, message",
    [
        (["export", "nowhere", "--to", "lora"], "nowhere"),
        (["export", "{vector}", "--to", "lora"], "use --to gguf"),
        (["export", "{folder}", "--to", "dial", "--coefficients", "2"], "serves all of them"),
        (["export", "{folder}", "--to", "merged", "--coefficients", "1", "2"], "at one coefficient"),
        (["export", "{vector}", "--to", "gguf", "--coefficients", "1"], "control vector serves all of them"),
        (["export", "{folder}", "--to", "lora", "--output", "{vector}/out"], "mood.safetensors"),
    ],
)
def test_what_cannot_be_exported_is_refused(vector_file, adapter_folder, argv, message):
    with pytest.raises(SystemExit) as stop:
        main([word.replace("{vector}", str(vector_file)).replace("{folder}", str(adapter_folder)) for word in argv])
    assert message in str(stop.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["serve", "nowhere"], "nowhere"),
        (["serve", "{unnamed}"], "does not name its base model"),
        (["serve", "{vector}", "mood={vector}"], "two paths have the name 'mood'"),
        (["serve", "a.b={vector}", "--model_name_or_path", "tiny"], "'a.b' cannot name"),
        (["serve", "{folder}", "--host", "0.0.0.0"], "REPENG_API_KEY"),
        (["serve", "{folder}", "--gguf_file", "x.gguf"], "needs --model_name_or_path"),
        (["serve", "{folder}", "--max_concurrent", "0"], "max_concurrent must be above 0"),
        (["serve", "{folder}", "--max_length", "513", "--use_cpu"], "the model has only 512 positions"),
    ],
)
def test_what_cannot_be_served_is_refused(vector_file, adapter_folder, monkeypatch, argv, message):
    monkeypatch.delenv("REPENG_API_KEY", raising=False)
    unnamed = vector_file.with_name("unnamed.safetensors")
    SteeringVector(SteeringVector.load(vector_file).directions).save(unnamed)
    with pytest.raises(SystemExit) as stop:
        main([word.format(vector=vector_file, folder=adapter_folder, unnamed=unnamed) for word in argv])
    assert message in str(stop.value) and stop.value.code == 2


@pytest.mark.parametrize(
    "argv, message",
    [
        (["evaluate", "nowhere"], "nowhere"),
        (["calibrate", "{vector}"], "either pairs_file, or positive and negative"),
        (["evaluate", "{vector}", *KEYS, "--questions_fil", "q"], "did you mean 'questions_file'"),
        (["evaluate", "{vector}", *KEYS, "--output", "{vector}/out"], "mood.safetensors"),
        (["evaluate", "{vector}", *KEYS, "--config", "absent.yaml"], "absent.yaml"),
        (["calibrate", "{vector}", *KEYS, "--nats", "0"], "--nats"),
    ],
)
def test_bad_input_ends_with_a_sentence(vector_file, argv, message):
    with pytest.raises(SystemExit) as stop:
        main([word.replace("{vector}", str(vector_file)) for word in argv])
    assert message in str(stop.value)


@pytest.mark.parametrize(
    "words",
    [
        ["v", "--config", "a", "b"],
        ["--config", "a", "b", "v"],
        ["--require_steering", "v"],
        ["--seed", "3", "v"],
        ["--json", "v", "--seed", "3"],
        ["--json", "--seed", "3", "v"],
    ],
)
def test_the_path_stands_first_or_last(words):
    assert path_first(words)[0] == "v" and sorted(path_first(words)) == sorted(words)


def python(*argv):
    """A command's outcome, and which slow packages it imported."""
    code = (
        "import atexit, sys; sys.argv[0] = 'repeng'\n"
        "atexit.register(lambda: print(*(m for m in ('torch', 'transformers', 'peft') if m in sys.modules)))\n"
        "from repeng.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, timeout=120)
    return done, done.stdout.splitlines()[-1].split()


def test_keys_may_be_spelled_with_hyphens():
    options, unknown = make_parser().parse_known_args(["evaluate", "v", "--questions-file", "q", "--use-cpu"])
    assert (options.questions_file, options.use_cpu, unknown) == ("q", None, [])


@pytest.mark.parametrize("command", [(), ("train",), ("evaluate",), ("calibrate",)])
def test_help_lists_the_keys_before_anything_slow_is_imported(command):
    done, slow = python(*command, "--help")
    assert done.returncode == 0 and slow == [], done.stderr[-2000:]
    own = {"train": Recipe, "evaluate": EvaluateArguments, "calibrate": CalibrateArguments}
    for name in names_of([TaskArguments, own[command[0]]] if command else []):
        assert f"--{name} " in done.stdout


@pytest.mark.parametrize(
    "argv, message",
    [
        (["evaluate", "nowhere"], "at 'nowhere'"),
        (["evaluate", "{file}", "--learning_rate", "9"], "unknown key 'learning_rate'"),
        (["evaluate", "{file}", "--nats", "9"], "unknown key 'nats'"),
        (["calibrate", "{file}", "--sequence", "9"], "did you mean 'sequences'"),
        (["evaluate", "{file}", "--no_require_steering"], "unknown key 'no_require_steering'"),
        (["evaluate", "{file}", "--config", "moood"], "did you mean 'mood'"),
        (["train", "--config", "tinny"], "did you mean 'tiny'"),
    ],
)
def test_what_is_mistyped_is_refused_before_anything_slow_is_imported(argv, message, tmp_path):
    (tmp_path / "v.safetensors").write_bytes(b"")
    done, slow = python(*(word.replace("{file}", str(tmp_path / "v.safetensors")) for word in argv))
    assert done.returncode == 2 and message in done.stderr and slow == []


def test_defaults_that_are_written_twice_are_equal():
    """The command line states them without importing what they belong to."""
    loss = inspect.signature(inner_contrastive_loss).parameters
    for field in fields(Recipe):
        if field.name in loss:
            assert field.default == loss[field.name].default, field.name
    budget = {field.name: field.default for field in fields(KLBudget)}
    for field in fields(CalibrateArguments):
        assert budget.get(field.name, field.default) == field.default, field.name


def test_questions_of_another_tokenizer_are_refused_before_any_work(vector_file, tmp_path):
    bad = Question("", ("xyz", "zyx"), ("xyz",), suffix="the lime looks")
    (tmp_path / "q.jsonl").write_text(json.dumps({"suffix": bad.suffix, "choices": bad.choices, "target": "xyz"}))
    with pytest.raises(SystemExit, match="different tokens"):
        main(["evaluate", str(vector_file), *KEYS, "--questions_file", str(tmp_path / "q.jsonl")])


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "a: &a [x, x, x]\n" + "\n".join(f"b{i}: &b{i} [*a, *a, *a]" for i in range(3)), "r: !!set {a}"],
)
def test_a_configuration_of_a_stranger_is_read_as_any_other(adapter_folder, text):
    """By export too, which asks it for the base model only."""
    (adapter_folder / "config.yaml").write_text(f"{text}\nmodel_name_or_path: [tiny]\n")
    with pytest.raises(SystemExit, match=r"config\.yaml") as stop:
        main(["export", str(adapter_folder), "--to", "lora"])
    assert "\n" not in str(stop.value)
