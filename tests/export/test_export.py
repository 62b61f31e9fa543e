"""What is exported does what `steer` does, and needs nothing of this package to be read."""

import json
from contextlib import nullcontext

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model, save_as_lora
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from support import randomise
from transformers import AutoModelForCausalLM

from repeng import SvdSteeringConfig, steer, tiny
from repeng.export import export_dial, export_lora, export_merged, vector_of

WRITERS = ["residual-writers", "up_proj"]


def adapted(kind):
    """A model whose adapter does something, by kind."""
    config = {
        "svd": SvdSteeringConfig(r=4, target_modules=WRITERS, rotate_output=True),
        "lora": LoraConfig(r=4, lora_alpha=12, target_modules=["up_proj", "k_proj"]),
        "ranks": LoraConfig(r=4, target_modules=["up_proj", "k_proj"], rank_pattern={"k_proj": 2}),
        "bias": SvdSteeringConfig(target_modules="residual", rotate_input=False),
        "residual": SvdSteeringConfig(r=4, target_modules="residual"),
    }[kind]
    model = get_peft_model(tiny.load()[0], config)
    randomise(model, 0.2)
    return model.eval()


def logits(model, batch, c=None):
    with torch.no_grad(), nullcontext() if c is None else steer(model, c):
        return model(batch).logits


@pytest.mark.parametrize("kind", ["svd", "lora", "ranks"])
def test_a_lora_is_exact_at_its_coefficient(kind, tmp_path, batch, recwarn):
    model = adapted(kind)
    folders = export_lora(model, tmp_path / "several", [1.0, -0.5, 0.0])
    assert [folder.name for folder in folders] == ["c+1", "c-0.5", "c+0"]
    assert export_lora(model, tmp_path / "one", -0.5) == [tmp_path / "one"]
    for folder, c in zip([*folders, tmp_path / "one"], (1.0, -0.5, 0.0, -0.5), strict=True):
        recwarn.clear()
        plain = PeftModel.from_pretrained(tiny.load()[0], folder).eval()
        assert not [w for w in recwarn if "missing" in str(w.message) or "lora" in str(w.message).lower()]
        assert type(plain.peft_config["default"]) is LoraConfig
        assert torch.allclose(logits(plain, batch), logits(model, batch, c), atol=1e-4)
        read = load_file(folder / "adapter_model.safetensors")
        inside = sum(isinstance(module, LoraLayer) for module in plain.modules())
        assert len(read) == 2 * inside  # nothing empty elsewhere
    assert not torch.allclose(logits(model, batch, 1.0), logits(model, batch, 0.0), atol=1e-2)
    assert 'load_model("tiny")' in (tmp_path / "one" / "README.md").read_text()


def test_pefts_own_conversion_is_at_the_coefficient_that_is_set(tmp_path, batch):
    model = adapted("svd")
    with steer(model, -0.5):
        save_as_lora(tmp_path, model, rank=4)
    plain = PeftModel.from_pretrained(tiny.load()[0], tmp_path).eval()
    assert torch.allclose(logits(plain, batch), logits(model, batch, -0.5), atol=1e-3)


def test_transposed_weights(tmp_path):
    base, ids = tiny_models.build("gpt2"), torch.arange(12).view(2, 6)
    model = get_peft_model(base, SvdSteeringConfig(r=4, target_modules="c_attn")).eval()
    randomise(model, 0.2)
    export_lora(model, tmp_path / "a b", 0.7)
    served = (tmp_path / "a b" / "README.md").read_text()
    assert "--max-loras 1 --max-lora-rank 8 --lora-modules" in served and f"'{tmp_path / 'a b'}'" in served
    plain = PeftModel.from_pretrained(tiny_models.build("gpt2"), tmp_path / "a b").eval()
    assert torch.allclose(logits(plain, ids), logits(model, ids, 0.7), atol=1e-4)


@pytest.mark.parametrize("kind, parts", [("svd", ["odd", "even"]), ("lora", ["odd"])])
def test_a_dial_is_exact_at_its_ends(kind, parts, tmp_path, batch):
    model = adapted(kind)
    assert [folder.name for folder in export_dial(model, tmp_path)] == parts
    assert [*json.loads((tmp_path / "dial.json").read_text())["scales"]] == parts
    plain = PeftModel.from_pretrained(tiny.load()[0], tmp_path / "odd", adapter_name="odd")
    if "even" in parts:
        plain.load_adapter(tmp_path / "even", adapter_name="even")
    plain.base_model.set_adapter(parts)
    scales = {"odd": lambda c: c, "even": lambda c: c * c}
    base = logits(model, batch, 0.0)
    for c, error in ((1.0, 1e-5), (-1.0, 1e-5), (0.0, 1e-5), (0.5, 0.1 if kind == "svd" else 1e-5)):
        for layer in (m for m in plain.modules() if isinstance(m, LoraLayer)):
            for part in parts:
                layer.set_scale(part, scales[part](c))
        moved, expected = logits(plain.eval(), batch) - base, logits(model, batch, c) - base
        assert (moved - expected).norm() <= error * max(expected.norm(), 1.0)


@pytest.mark.parametrize("kind", ["svd", "lora"])
def test_a_merged_model_is_a_plain_one(kind, tmp_path, batch, tokenizer):
    model = adapted(kind)
    before = logits(model, batch, 1.0)
    export_merged(model, tmp_path / "whole", -0.7, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert torch.allclose(logits(plain, batch), logits(model, batch, -0.7), atol=1e-4)
    assert torch.equal(logits(model, batch, 1.0), before) and (tmp_path / "whole" / "tokenizer.json").is_file()
    (tmp_path / "usual").touch()
    modes = {path.stat().st_mode for path in [tmp_path / "usual", *(tmp_path / "whole").iterdir()]}
    assert len(modes) == 1  # whoever reads other files here reads these


def test_a_calibrated_dial_is_in_the_adapters_own_units(tmp_path, batch):
    model = adapted("svd")
    model.base_model.set_units({"plus": 0.5, "minus": 2.0}, "default")
    export_dial(model, tmp_path)
    assert json.loads((tmp_path / "dial.json").read_text())["units"] == {"plus": 0.5, "minus": 2.0}
    odd, even = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("odd", "even"))
    for folder, c in zip(export_lora(model, tmp_path / "own", [2.0, -0.5]), (1.0, -1.0), strict=True):
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            expected = c * odd[key] + even[key] if ".lora_B." in key else odd[key]
            assert torch.allclose(tensor, expected, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        SvdSteeringConfig(r=4, target_modules=["up_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=4, target_modules=["up_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=4, target_modules=["up_proj"], lora_bias=True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
def test_a_part_that_no_lora_holds_is_named(config, tmp_path, base):
    model = get_peft_model(base, config)
    for export in (export_lora, export_dial, export_merged):
        with pytest.raises(ValueError, match=r"has a trained copy of|has a bias at"):
            export(model, tmp_path / "out")


def test_nothing_is_written_over(tmp_path):
    model = adapted("lora")
    (tmp_path / "README.md").write_text("mine")
    for export in (export_lora, export_dial, export_merged):
        with pytest.raises(FileExistsError, match="not empty"):
            export(model, tmp_path)
    (tmp_path / "several" / "c+1").mkdir(parents=True)
    (tmp_path / "several" / "c+1" / "mine").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        export_lora(model, tmp_path / "several", [-1.0, 1.0])
    assert not (tmp_path / "several" / "c-1").exists() and (tmp_path / "README.md").read_text() == "mine"


def test_what_is_no_change_of_a_weight_is_named(tmp_path):
    for kind, message in (("residual", "rotates the residual stream"), ("bias", "vector_of")):
        for export in (export_lora, export_dial, export_merged):
            with pytest.raises(ValueError, match=message):
                export(adapted(kind), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="does more than that"):
        vector_of(adapted("residual"))
    with pytest.raises(ValueError, match="is not an adapter of this package"):
        vector_of(adapted("lora"))


def test_a_bias_is_a_vector(batch):
    model, calibration = adapted("bias"), {"plus": 0.5, "minus": 2.0}
    vector, base = vector_of(model), tiny.load()[0]
    for c in (1.0, -0.3):
        with torch.no_grad(), steer(base, c, vector=vector):
            assert torch.allclose(base(batch).logits, logits(model, batch, c), atol=1e-5)
    model.base_model.set_units(calibration, "default")
    with torch.no_grad(), steer(base, -1.0, vector=vector_of(model)):
        assert torch.allclose(base(batch).logits, logits(model, batch, -1.0), atol=1e-5)


def test_which_adapter_must_be_clear(tmp_path):
    model = adapted("svd")
    model.add_adapter("second", SvdSteeringConfig(r=2, target_modules=["up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"adapter_name must say which.*default, second"):
        export_lora(model, tmp_path / "out")
    with pytest.raises(ValueError, match="no active adapter 'third'"):
        export_lora(model, tmp_path / "out", adapter_name="third")
    export_lora(model, tmp_path / "out", adapter_name="second")
    assert all("up_proj" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    for wrong in ([], [1.0, 1.0], [0.1234561, 0.1234562]):
        with pytest.raises(ValueError, match="each once"):
            export_lora(model, tmp_path / "none", wrong, adapter_name="second")
