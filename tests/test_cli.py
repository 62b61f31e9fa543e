"""`repeng evaluate` and `repeng calibrate` on what a user has: the folder of an adapter, the file of a vector."""

import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model

from repeng import SteeringVector, SvdSteeringConfig, commands, extract, steer, tiny
from repeng.cli import main
from repeng.data.questions import Question
from repeng.eval import compare

KEYS = ["--positive", "cheerful", "--negative", "gloomy"]


@pytest.fixture(scope="module", autouse=True)
def fewer_questions(module_patch):
    whole = tiny.questions
    module_patch.setattr(tiny, "questions", lambda *args, **kwargs: whole(*args, **kwargs)[::6])
    module_patch.setattr(compare, "MAX_VECTOR_LAYERS", 2)
    for module in (compare, commands):
        module_patch.setattr(module, "VECTOR_COEFFICIENTS", (-2, -1, -0.5, 0.5, 1, 2))
        module_patch.setattr(module, "ADAPTER_COEFFICIENTS", (-2, -1, 1, 2))


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
    assert capsys.readouterr().out.count("the budget is 0.5") == 2


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


@pytest.mark.parametrize(
    "argv, message",
    [
        (["evaluate", "nowhere"], "nowhere"),
        (["calibrate", "{vector}"], "either pairs_file, or positive and negative"),
        (["evaluate", "{vector}", *KEYS, "--questions_fil", "q"], "did you mean 'questions_file'"),
        (["evaluate", "{vector}", *KEYS, "--output", "{vector}/out"], "mood.safetensors"),
        (["evaluate", "{vector}", *KEYS, "--config", "absent.yaml"], "absent.yaml"),
        (["calibrate", "{vector}", *KEYS, "--nats", "0"], "nats above 0"),
    ],
)
def test_bad_input_ends_with_a_sentence(vector_file, argv, message):
    with pytest.raises(SystemExit) as stop:
        main([word.replace("{vector}", str(vector_file)) for word in argv])
    assert message in str(stop.value)


def test_questions_of_another_tokenizer_are_refused_before_any_work(vector_file, tmp_path):
    bad = Question("", ("xyz", "zyx"), ("xyz",), suffix="the lime looks")
    (tmp_path / "q.jsonl").write_text(json.dumps({"suffix": bad.suffix, "choices": bad.choices, "target": "xyz"}))
    with pytest.raises(SystemExit, match="different tokens"):
        main(["evaluate", str(vector_file), *KEYS, "--questions_file", str(tmp_path / "q.jsonl")])
