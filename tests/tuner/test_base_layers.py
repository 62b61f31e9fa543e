"""Base layers that are not plain: quantised by a library, or offloaded by accelerate."""

import copy

import pytest
import tiny_models
import torch
from accelerate import dispatch_model
from peft import PeftModel, get_peft_model
from support import arguments, step, trainer_for
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from repeng import SteeringVector, SvdSteeringConfig, steer
from repeng.model.loading import load_base
from repeng.model.sites import capture
from repeng.tuner.base import dense_weight, entries, is_quantised
from repeng.tuner.layer import Linear

IDS = torch.randint(3, 59, (3, 12), generator=torch.Generator().manual_seed(0))
CONFIG = SvdSteeringConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj", "residual"], init_weights=False)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits


def llama(bias=False):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1, attention_bias=bias))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.eval()


def torchao_int8(_folder):
    quantization = pytest.importorskip("torchao.quantization")
    model = llama(bias=True)
    how = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, how, filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")
    return model


def bitsandbytes(folder, device, **how):
    pytest.importorskip("bitsandbytes")
    llama(bias=True).save_pretrained(folder)
    config = BitsAndBytesConfig(**how)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": device}).eval()


FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SCHEMES = {
    "torchao int8": torchao_int8,
    "bitsandbytes 4-bit": lambda folder: bitsandbytes(folder, "cpu", **FOUR_BIT),
    "bitsandbytes 8-bit": lambda folder: bitsandbytes(folder, "cpu", load_in_8bit=True),
    "bitsandbytes 4-bit on a GPU": lambda folder: bitsandbytes(folder, 0, **FOUR_BIT),
    "bitsandbytes 8-bit on a GPU": lambda folder: bitsandbytes(folder, 0, load_in_8bit=True),
}
schemes = pytest.mark.parametrize(
    "scheme", [pytest.param(name, marks=pytest.mark.gpu if "GPU" in name else ()) for name in SCHEMES]
)


def test_training_in_four_bits_has_the_gradients_of_the_dense_weights(tmp_path, tokenizer):
    """Also after passes in evaluation mode, which building and the reference are."""
    pytest.importorskip("bitsandbytes")
    four = load_base("tiny", torch.device("cpu"), load_in_4bit=True)
    dense = load_base("tiny", torch.device("cpu"))
    for name, module in four.named_modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            dense.get_submodule(name).weight.data = dense_weight(module)
    gradients = []
    for base in (four, dense):
        trainer = trainer_for(
            arguments(tmp_path / f"run-{len(gradients)}"), given={"model": base, "tokenizer": tokenizer}
        )
        step(trainer, trainer.train_dataset[:8])
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(
        grad.abs().max() > 1e-3 for grad in gradients[1].values()
    )
    for name, grad in gradients[1].items():
        assert torch.allclose(gradients[0][name], grad, atol=1e-4), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_in_four_bits_on_a_gpu(tmp_path):
    pytest.importorskip("bitsandbytes")
    keys = {"load_in_4bit": "true", "bf16": "true", "use_cpu": "false", "max_steps": 8, "learning_rate": 1e-2}
    trainer = trainer_for(arguments(tmp_path, num_pairs=32, logging_steps=1, **keys))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert trainer.model.device.type == "cuda" and losses[-1] < losses[0]


@schemes
def test_a_quantised_base_runs_untouched(scheme, tmp_path):
    base = SCHEMES[scheme](tmp_path)
    expected = logits(base)  # the first forward, at which some libraries repack weights
    original = dict(llama(bias=True).named_modules())
    model = get_peft_model(base, copy.deepcopy(CONFIG)).eval()
    with steer(model, 0.0):
        assert torch.equal(logits(model), expected)
    with steer(model, 1.0):
        assert (logits(model) - expected).abs().max() > 0.05
    for name, site in model.get_base_model().named_modules():
        if not isinstance(site, Linear):
            continue
        weight = original[name].weight
        assert is_quantised(site.base_layer)
        assert (dense_weight(site.base_layer).cpu() - weight).norm() < 0.15 * weight.norm()
        held = sum(b.numel() for key, b in site.named_buffers() if "svd_steering" in key)
        assert held <= 8 * (site.in_features + site.out_features + 1)


@schemes
def test_a_vector_acts_on_a_quantised_base(scheme, tmp_path):
    base = SCHEMES[scheme](tmp_path)
    expected = logits(base)
    for site, width in (("residual", 64), ("k_proj", 32)):
        direction = torch.ones(width)
        module = base.model.layers[1] if site == "residual" else base.model.layers[1].self_attn.k_proj
        with capture([module]) as clean:
            logits(base)
        with steer(base, 2.0, vector=SteeringVector({(site, 1): direction})), capture([module]) as moved:
            assert not torch.equal(logits(base), expected)
        wanted = (clean[0].float() + 2.0).to(clean[0].dtype)
        assert torch.equal(moved[0], wanted)
    assert torch.equal(logits(base), expected)


@schemes
def test_an_adapter_trains_on_a_quantised_base(scheme, tmp_path):
    model = get_peft_model(SCHEMES[scheme](tmp_path), copy.deepcopy(CONFIG)).train()
    with steer(model, torch.tensor([1.0, -1.0, 0.5])):
        model(input_ids=IDS.to(model.device), labels=IDS.to(model.device)).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.isfinite().all() and g.any() for g in gradients)


@schemes
def test_a_quantised_base_cannot_be_merged_and_loads_its_adapter(scheme, tmp_path):
    config = SvdSteeringConfig(r=8, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(SCHEMES[scheme](tmp_path / "base"), config).eval()
    with pytest.raises(ValueError, match="quantised"):
        model.merge_adapter()
    model.save_pretrained(tmp_path / "adapter")
    with steer(model, -1.0):
        expected = logits(model)
    for base in (SCHEMES[scheme](tmp_path / "again"), llama(bias=True)):
        again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval().to(model.device)
        with steer(again, -1.0):
            same = torch.allclose(logits(again), expected, atol=1e-5)
        assert same == is_quantised(base.model.layers[0].self_attn.q_proj.base_layer)


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 7), lambda: Conv1D(7, 5)], ids=["Linear", "Conv1D"])
def test_entries_are_those_of_the_dense_weight(make):
    layer, outputs, inputs = make(), torch.tensor([6, 0, 3]), torch.tensor([1, 4, 4])
    weight = dense_weight(layer)
    assert weight.shape == (7, 5)
    assert torch.equal(entries(layer, outputs, inputs), weight[outputs, inputs])
    assert torch.allclose(layer(torch.eye(5)) - layer.bias, weight.T, atol=1e-6)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_offloaded_weights_are_as_good_as_those_in_memory(kind, tmp_path):
    def adapt(base):
        torch.manual_seed(1)
        config = SvdSteeringConfig(r=6, target_modules=tiny_models.targets("qwen3", kind), init_weights=False)
        return get_peft_model(base, config).eval()

    devices = {f"model.layers.{i}": where for i, where in enumerate(("cpu", "disk", "disk"))}
    devices |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    base = dispatch_model(
        tiny_models.build("qwen3"), devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    assert any(p.is_meta for p in base.parameters())
    offloaded, plain = adapt(base), adapt(tiny_models.build("qwen3"))
    for c in (0.0, 1.0, -1.0):
        with steer(offloaded, c), steer(plain, c):
            assert torch.equal(logits(offloaded), logits(plain))
    if kind == "linear":
        for model in (offloaded, plain):
            with steer(model, 1.0):
                model.merge_adapter()
        assert torch.equal(logits(offloaded), logits(plain))
        for model in (offloaded, plain):
            model.unmerge_adapter()
        with steer(offloaded, 0.0), steer(plain, 0.0):
            assert torch.equal(logits(offloaded), logits(plain))
