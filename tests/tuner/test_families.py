"""Architectures beyond attention: in each family a site acts, or it is refused by name."""

import families
import pytest
import torch
from peft import get_peft_model
from torch import nn

from repeng import SvdSteeringConfig, steer
from repeng.tuner.base import base_of, is_linear, linear_shape
from repeng.tuner.bypassed import bypassed
from repeng.tuner.decoder import find_decoder, linear_modules
from repeng.tuner.groups import role_of, unknown
from repeng.tuner.targets import resolve, writers

IDS = torch.tensor([[1, 5, 9, 13, 21, 7], [1, 6, 8, 14, 22, 3]])
QUICK = ["falcon-h1", "granite4-hybrid", "lfm2", "mamba", "modernbert-decoder", "qwen3-next", "rwkv", "t5"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in families.FAMILIES if name not in QUICK]


def logits(model):
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def adapted(name, targets, **settings):
    model = families.build(name).requires_grad_(False)  # which weights of a CPU product have gradients is in its bits
    config = SvdSteeringConfig(r=2, target_modules=targets, init_weights=False, **settings)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_every_linear_module_has_a_role_and_what_writes_has_the_width(name):
    model = families.build(name)
    for layer in find_decoder(model).layers:
        assert not unknown(layer, families.WIDTH)
        for module_name, module in linear_modules(layer).items():
            d_in, d_out = linear_shape(base_of(module))
            if role_of(module_name) == "writes":
                assert d_out == families.WIDTH, module_name
            if role_of(module_name) is None:
                assert families.WIDTH not in (d_in, d_out), module_name
        assert writers(layer, families.WIDTH)


@pytest.mark.parametrize("name", ["granite4-hybrid", "mamba", "rwkv", *SLOW])
def test_linear_modules_act_and_merge_or_are_refused(name):
    model = families.build(name).requires_grad_(False)
    base, decoder = logits(model), find_decoder(model)
    places = [f"{decoder.name}.{i}.{n}" for i, layer in enumerate(decoder.layers) for n in linear_modules(layer)]
    bad = {place for place in places if bypassed(model, place) or "shared_expert_gate" in place}
    bad |= {place for place in places if "shared_transformer" in place}  # of Zamba2
    for place in bad:
        with pytest.raises(ValueError, match=place):
            resolve(model, SvdSteeringConfig(r=2, target_modules=[place]))
    model = adapted(name, [place for place in places if place not in bad])
    with steer(model, 0.0):
        assert torch.equal(logits(model), base)
    with steer(model, 1.0):
        steered = logits(model)
        assert not torch.allclose(steered, base, atol=1e-4)
        assert torch.allclose(logits(model.merge_and_unload()), steered, atol=1e-3)


@pytest.mark.parametrize(
    "name, group, parts",
    [
        ("lfm2", "residual-writers", {"conv.out_proj", "self_attn.out_proj", "feed_forward.w2"}),
        ("lfm2", "residual-readers", {"conv.in_proj", "feed_forward.w1", "feed_forward.w3", "self_attn.q_proj"}),
        ("granite4-hybrid", "residual-writers", {"shared_mlp.output_linear", "self_attn.o_proj"}),
        ("granite4-hybrid", "residual-readers", {"mamba.in_proj", "shared_mlp.input_linear"}),
        ("rwkv", "residual-writers", {"attention.output", "feed_forward.value"}),
        ("rwkv", "residual-readers", {"attention.value", "feed_forward.key"}),
        ("t5", "residual-writers", {"SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"}),
    ],
)
def test_groups_take_in_all_parts(name, group, parts):
    exclude = ["mamba.out_proj"] if name == "granite4-hybrid" and group == "residual-writers" else None
    found = resolve(families.build(name), SvdSteeringConfig(r=2, target_modules=[group], exclude_modules=exclude))
    for part in parts:
        assert any(one.endswith(part) for one in found), part


def test_a_group_does_not_leave_out_a_module_that_it_does_not_know():
    model = families.build("lfm2")
    model.model.layers[1].mystery = nn.Linear(families.WIDTH, families.WIDTH)
    for targets in (["residual-writers"], ["residual"]):
        with pytest.raises(ValueError, match="mystery"):
            resolve(model, SvdSteeringConfig(r=2, target_modules=targets))
    config = SvdSteeringConfig(r=2, target_modules=["residual-writers"], exclude_modules=["mystery"])
    with pytest.raises(ValueError, match=r"exclude_modules 'mystery' covers none"):
        resolve(model, config)
    config = SvdSteeringConfig(r=2, target_modules=["residual"], rotate_input=False, scale=False)
    assert resolve(model, config) == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize(
    "name, target, site",
    [
        ("mamba", "dt_proj", "dt_proj"),  # never called
        ("mamba", "all-linear", "dt_proj"),
        ("falcon-h1", "out_proj", "out_proj"),  # not called by fused kernels
        ("granite4-hybrid", "residual-writers", "mamba.out_proj"),
        ("jamba", ".*mamba.dt_proj", "dt_proj"),
    ],
)
def test_weights_that_are_read_past_their_module_are_refused(name, target, site):
    targets = target if "*" in target else [target]
    with pytest.raises(ValueError, match=rf"layers\.0\.\S*{site}.*exclude_modules"):
        resolve(families.build(name), SvdSteeringConfig(r=2, target_modules=targets))


def test_a_file_with_such_a_site_is_refused_too():
    config = SvdSteeringConfig(r=2, target_modules=["dt_proj"], init_bases=False, allow_other_base=True)
    config.resolved_modules = ["backbone.layers.0.mixer.dt_proj"]
    with pytest.raises(ValueError, match="dt_proj"):
        get_peft_model(families.build("mamba"), config)


class Reading(nn.Module):
    """Reads one weight's values, and asks the others about themselves only."""

    def __init__(self):
        super().__init__()
        self.read, self.asked, self.sliced = (nn.Linear(4, 4) for _ in range(3))
        nn.init.zeros_(self.sliced.weight)

    def _init_weights(self):
        nn.init.zeros_(self.asked.weight)

    def forward(self, x):
        x = self.asked(x).to(self.asked.weight.dtype)
        if isinstance(self.asked.weight, nn.Parameter):
            x = self.sliced(x)
        return nn.functional.linear(x, self.read.weight)


def test_asking_a_weight_for_its_dtype_does_not_read_it():
    outer = nn.ModuleDict({"inner": Reading()})
    assert [name for name in ("read", "asked", "sliced") if bypassed(outer, f"inner.{name}")] == ["read"]


def test_weights_that_several_modules_share_are_refused():
    """Zamba2's attention blocks are one block with several adapters: merged at one place, the others would change."""
    with pytest.raises(ValueError, match=r"layers\.1\.shared_transformer\S*q_proj.*layers\.3"):
        resolve(families.build("zamba2"), SvdSteeringConfig(r=2, target_modules=r".*layers\.1\..*q_proj"))


def test_routers_and_grouped_layers_are_no_linear_layers():
    for name, end in (("llama4", "router"), ("phimoe", "router"), ("deepseek-v4", "o_a_proj")):
        model = families.build(name)
        modules = [module for key, module in model.named_modules() if key.endswith(end)]
        assert modules and not any(map(is_linear, modules))
    falcon = families.build("falcon").transformer.h[0].self_attention.dense
    assert type(falcon).forward is not nn.Linear.forward and is_linear(falcon)


@pytest.mark.parametrize("name", ["gemma3n", "deepseek-v4"])
def test_several_residual_streams_are_refused(name):
    with pytest.raises(ValueError, match=r"streams.*=\d"):
        resolve(families.build(name), SvdSteeringConfig(r=2, target_modules=["residual"]))


@pytest.mark.parametrize("name, decoder", [("t5", "decoder.block"), ("bart", "model.decoder.layers")])
@pytest.mark.parametrize("changes", [{}, {"num_decoder_layers": 2, "decoder_layers": 2}])
def test_the_decoder_of_an_encoder_decoder_is_adapted(name, decoder, changes):
    changes = {key: value for key, value in changes.items() if (key == "decoder_layers") == (name == "bart")}
    model = families.build(name, **changes)
    query = {"t5": "SelfAttention.q", "bart": "self_attn.q_proj"}[name]
    for targets in ([query], rf".*{query}", ["residual", "residual-writers"]):
        found = resolve(model, SvdSteeringConfig(r=2, target_modules=targets))
        assert found and all(one.startswith(decoder) for one in found)
    with pytest.raises(ValueError, match="encoder"):
        resolve(model, SvdSteeringConfig(r=2, target_modules=rf".*encoder\..*{query}"))


def test_depths_that_a_configuration_calls_otherwise():
    assert find_decoder(families.build("longcat-flash")).name == "model.layers"
