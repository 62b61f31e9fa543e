"""Adapter files: versions, the base model they are for, everything else that PEFT writes beside them."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from repeng import SvdSteeringConfig, steer, tiny
from repeng.tuner import SvdSteeringLayer
from repeng.tuner import layer as layer_module

# Version 1 as repeng 0.1.0 wrote it; later versions must go on reading it.
GOLDEN = Path(__file__).parents[1] / "golden" / "v1"
IDS = torch.arange(3, 13)[None]


def golden_base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(GOLDEN / "base").eval()


@pytest.fixture
def golden(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def rewrite(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_version_1_loads_and_does_what_it_did():
    expected = load_file(GOLDEN / "logits.safetensors")
    model = PeftModel.from_pretrained(golden_base(), GOLDEN).eval()
    assert (expected["1.0"] - expected["0.0"]).abs().max() > 0.1
    for c, wanted in expected.items():
        with steer(model, float(c)):
            assert torch.allclose(logits(model), wanted, atol=1e-5), c


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments.*a_field_of_tomorrow:UserWarning")  # PEFT's own
@pytest.mark.parametrize("changes", [{"format_version": 3}, {"format_version": 7, "a_field_of_tomorrow": [1]}])
def test_a_newer_file_is_refused(golden, changes):
    rewrite(golden, **changes)
    with pytest.raises(ValueError, match=f"file format {changes['format_version']}.*install a newer repeng"):
        PeftModel.from_pretrained(golden_base(), golden)


def moved(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.add_(1e-3)
    return model


@pytest.mark.parametrize("change", ["value", "dtype and value"])
def test_another_base_of_the_same_shape_is_refused(change):
    base = moved(golden_base())
    if change == "dtype and value":
        base = moved(base).bfloat16()
        base.model.layers[1].mlp.up_proj.weight.data.mul_(1.05)
    with pytest.raises(ValueError, match=r"another base model \(tiny-llama\).*allow_other_base=True"):
        PeftModel.from_pretrained(base, GOLDEN)
    assert not any(isinstance(m, SvdSteeringLayer) for m in base.modules())
    model = PeftModel.from_pretrained(base, GOLDEN, allow_other_base=True).eval()
    with steer(model, 0.0):
        before = logits(model)
    with steer(model, 1.0):
        assert not torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore:(Unable to fetch remote file|Could not find a config file):UserWarning")  # PEFT's
def test_the_override_is_not_saved(tmp_path):
    model = PeftModel.from_pretrained(moved(golden_base()), GOLDEN, allow_other_base=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(moved(golden_base()), tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_the_same_base_in_half_precision_is_accepted(low_cpu_mem_usage):
    model = PeftModel.from_pretrained(golden_base().bfloat16(), GOLDEN, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    here = model.state_dict()
    for key, tensor in load_file(GOLDEN / "adapter_model.safetensors").items():
        assert torch.equal(here[f"{key}.default"], tensor), key  # not rounded on the way
    expected = load_file(GOLDEN / "logits.safetensors")
    with steer(model, 1.0):
        assert torch.allclose(logits(model).float(), expected["1.0"], atol=0.05)


def test_a_base_without_the_modules_is_refused():
    with pytest.raises(ValueError, match=r"lacks 3 of them: model\.layers\.1"):
        PeftModel.from_pretrained(tiny_models.build("gpt2"), GOLDEN)


def test_the_base_and_what_is_adapted_are_recorded(tmp_path):
    base = golden_base()
    base.config._commit_hash = "abc123"
    model = get_peft_model(base, SvdSteeringConfig(r=2, target_modules=["kv"], layers_to_transform="0-0.5"))
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.base_model_name_or_path == str(GOLDEN / "base") and config.revision == "abc123"
    assert config.resolved_modules == ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"]
    assert set(config.fingerprint["weights"]) == set(config.resolved_modules)
    assert config.init_bases is False and config.format_version == 1


def test_a_configuration_used_again_records_the_second_base():
    config = SvdSteeringConfig(r=2, target_modules=["kv"])
    for commit in ("aaa", "bbb"):
        base = golden_base()
        base.config._commit_hash = commit
        get_peft_model(base, config)
        assert config.revision == commit


def test_a_whole_model_loads_by_the_adapters_name_alone(tmp_path, monkeypatch):
    model = get_peft_model(
        golden_base(), SvdSteeringConfig(r=2, target_modules=["kv"], init_weights=False, task_type="CAUSAL_LM")
    ).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(layer_module, "top_singular_triples", None)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    with steer(model, -1.0), steer(again, -1.0):
        assert torch.equal(logits(again), logits(model))


def test_modules_to_save_come_along(base, batch, tmp_path):
    config = SvdSteeringConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_weights=False)
    base.config.tie_word_embeddings = False
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.load()[0], tmp_path).eval()
    assert torch.equal(logits(again, batch), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again, batch), logits(tiny.load()[0], batch))


@pytest.mark.parametrize("saved", [None, ["gate_proj"]])
def test_a_second_adapter_is_loaded_beside_the_first(saved):
    """Also where the first has put copies of its modules_to_save into the layers."""
    config = SvdSteeringConfig(r=2, target_modules=["up_proj", "residual"], init_weights=False, modules_to_save=saved)
    torch.manual_seed(3)
    model = get_peft_model(golden_base(), config).eval()
    expected = logits(model)
    model.load_adapter(GOLDEN, adapter_name="golden")
    model.set_adapter("golden")
    assert torch.allclose(logits(model), load_file(GOLDEN / "logits.safetensors")["1.0"], atol=1e-5)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
