"""From requests to modules: names, groups of names, expressions, depth; what is not there raises."""

import copy

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from repeng import SvdSteeringConfig, steer
from repeng.tuner.targets import find_decoder, resolve, select_layers


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def names(model, targets, **settings):
    found = resolve(model, SvdSteeringConfig(r=4, target_modules=targets, **settings))
    prefix = f"{find_decoder(model).name}."
    return [name.removeprefix(prefix) for name in found]


@pytest.mark.parametrize(
    "depth, layers, expected",
    [
        (6, None, [0, 1, 2, 3, 4, 5]),
        (6, 2, [2]),
        (6, [4, 1, 1], [1, 4]),
        (10, "0.3-0.7", [3, 4, 5, 6]),
        (6, "0.3-0.7", [1, 2, 3, 4]),
        (28, "0-0.25", [0, 1, 2, 3, 4, 5, 6]),
        (3, "0.9 - 1", [2]),
        (3, "0.34-0.35", [1]),
    ],
)
def test_layers_by_index_or_by_share_of_the_depth(depth, layers, expected):
    assert select_layers(depth, layers) == expected


@pytest.mark.parametrize("layers", [[6], -1, "0.7-0.3", "0.3", "30-70", "1.0-1.1", "a-b", "0..3-0.7", []])
def test_layers_that_are_not_there_raise(layers):
    with pytest.raises(ValueError, match="layer"):
        select_layers(6, layers)


@pytest.mark.parametrize(
    "architecture, target, expected",
    [
        ("llama", "residual-writers", {"self_attn.o_proj", "mlp.down_proj"}),
        ("llama", "kv", {"self_attn.k_proj", "self_attn.v_proj"}),
        ("phi3", "residual-readers", {"self_attn.qkv_proj", "mlp.gate_up_proj"}),
        ("phi3", "residual-writers", {"self_attn.o_proj", "mlp.down_proj"}),
        ("gpt2", "residual-writers", {"attn.c_proj", "mlp.c_proj"}),
        ("gpt2", "residual-readers", {"attn.c_attn", "mlp.c_fc"}),
        ("neox", "residual-writers", {"attention.dense", "mlp.dense_4h_to_h"}),
        ("neox", "residual-readers", {"attention.query_key_value", "mlp.dense_h_to_4h"}),
        ("llama", "mlp.up_proj", {"mlp.up_proj"}),
    ],
)
def test_groups_of_sites(architecture, target, expected):
    found = names(tiny_models.build(architecture), [target], layers_to_transform=[1])
    assert {name.split(".", 1)[1] for name in found} == expected and {name[0] for name in found} == {"1"}


def test_readers_and_writers_together_are_all_linear_modules():
    for architecture in ("llama", "phi3", "gpt2", "neox", "olmo2"):
        model = tiny_models.build(architecture)
        assert names(model, ["residual-readers", "residual-writers"]) == names(model, "all-linear")


def test_a_regular_expression_reaches_linear_modules_and_decoder_layers():
    model = tiny_models.build("llama")
    assert names(model, r".*layers\.[02]\.self_attn\.(q|v)_proj") == [
        f"{i}.self_attn.{name}" for i in (0, 2) for name in ("q_proj", "v_proj")
    ]
    assert names(model, r"model\.layers\.1") == ["1"]


def test_exclude_modules_takes_names_and_expressions():
    model = tiny_models.build("llama")
    assert names(model, ["kv"], exclude_modules=["v_proj"], layers_to_transform=0) == ["0.self_attn.k_proj"]
    assert names(model, ["kv"], exclude_modules=r".*(v_proj|layers\.[12].*)") == ["0.self_attn.k_proj"]
    assert names(model, ["kv", "residual"], exclude_modules="v_proj", layers_to_transform=0) == [
        "0",
        "0.self_attn.k_proj",
    ]
    assert names(
        model, ["q_proj", "kv", "residual"], exclude_modules=["kv", "residual"], layers_to_transform=range(1)
    ) == ["0.self_attn.q_proj"]
    with pytest.raises(ValueError, match="nothing is left"):
        names(model, ["v_proj"], exclude_modules=["v_proj"])
    for nonsense in (["v_proj", "v_prj"], ".*v_prj"):
        with pytest.raises(ValueError, match=r"v_prj.*covers none"):
            names(model, ["kv"], exclude_modules=nonsense)


def test_the_default_targets_are_those_of_lora():
    model = get_peft_model(tiny_models.build("llama"), SvdSteeringConfig(r=4))
    assert {name.rsplit(".", 1)[-1] for name in model.peft_config["default"].resolved_modules} == {"q_proj", "v_proj"}


def uneven():
    model = tiny_models.build("llama")
    del model.model.layers[1].mlp.up_proj
    return model


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    "build, targets, settings, words",
    [
        (uneven, ["up_proj"], {}, ["'up_proj' matches no linear module in layer 1 (1 of 3 layers)", "residual"]),
        (uneven, ["q_proj", "up_proj"], {"layers_to_transform": [0, 1]}, ["'up_proj'", "layer 1"]),
        (lambda: tiny_models.build("gpt2"), ["q_proj"], {}, ["layers 0–2", "c_attn"]),
        (lambda: tiny_models.build("llama"), ["mlp"], {}, ["'mlp', which cannot be adapted"]),
        (lambda: tiny_models.build("llama"), ".*nothing", {}, ["'.*nothing'", "q_proj"]),
        (lambda: tiny_models.build("llama-bias-tied"), ["lm_head"], {}, ["lm_head", "model.embed_tokens"]),
        (lambda: tiny_models.build("llama"), ["residual"], {"r": 33}, ["r=33", "32"]),
        (lambda: tiny_models.build("llama"), ["q_proj"], {"modules_to_save": ["q_proj"]}, ["modules_to_save"]),
        (lambda: tiny_models.build("llama"), ["up_proj"], {"modules_to_save": ["mlp"]}, ["modules_to_save, as 'mlp'"]),
        (
            lambda: tiny_models.build("llama"),
            ["residual"],
            {"rotate_input": False, "shift": False},
            ["nothing to learn at 'model.layers.0'", "shift"],
        ),
        (lambda: Plain(), ["residual"], {"layers_pattern": "blocks"}, ["residual-writers", "linear modules", "0"]),
        (lambda: tiny_models.build("llama"), ["q_proj"], {"layers_pattern": "h"}, ["'h'", "model.layers"]),
    ],
)
def test_what_is_not_there_raises_and_leaves_the_model_alone(build, targets, settings, words):
    model = build()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError) as error:
        get_peft_model(model, SvdSteeringConfig(**{"r": 4, "target_modules": targets, **settings}))
    for word in words:
        assert word in str(error.value)
    assert [name for name, _ in model.named_modules()] == before


class Plain(nn.Module):
    """A model without a transformers configuration."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.heads[0](x)


def test_layers_pattern_names_the_list_that_cannot_be_found():
    with pytest.raises(ValueError, match=r"blocks, heads.*layers_pattern"):
        get_peft_model(Plain(), SvdSteeringConfig(r=4, target_modules=["0"]))
    config = SvdSteeringConfig(
        r=4, target_modules=["0"], layers_pattern="blocks", layers_to_transform=[0, 2], init_weights=False
    )
    model = get_peft_model(Plain(), config)
    assert config.resolved_modules == ["blocks.0.0", "blocks.2.0"]
    x = torch.ones(1, 5, 8)
    with steer(model, 0.0):
        before = model(x)
    with steer(model, 1.0):
        assert not torch.equal(model(x), before)


def test_a_later_adapter_is_checked_like_the_first():
    model = get_peft_model(tiny_models.build("llama"), SvdSteeringConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_prj"):
        model.add_adapter("second", SvdSteeringConfig(r=4, target_modules=["q_prj"]))


def test_bases_are_not_taken_from_merged_weights():
    config = SvdSteeringConfig(r=4, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(tiny_models.build("llama"), config)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.add_adapter("second", copy.deepcopy(config))


@pytest.mark.parametrize("argument", ["adapter_names", "alora_offsets"])
def test_what_lora_layers_take_in_a_forward_is_refused_by_name(argument):
    model = get_peft_model(tiny_models.build("llama"), SvdSteeringConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=f"{argument}.*own coefficient"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), **{argument: ["default"]})


@pytest.mark.filterwarnings("ignore:(You are trying to modify a model|Already found a `peft_config`):UserWarning")
def test_it_works_on_top_of_lora():
    """A site that another method has wrapped keeps that method's change."""
    ids = torch.arange(3, 9)[None]
    lora = get_peft_model(
        tiny_models.build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    expected = logits(lora, ids)
    config = SvdSteeringConfig(r=4, target_modules=["q_proj"], init_weights=False)
    both = get_peft_model(lora.base_model.model, config).eval()
    with steer(both, 0.0):
        assert torch.equal(logits(both, ids), expected)
    with steer(both, 1.0):
        assert not torch.allclose(logits(both, ids), expected, atol=1e-3)
    with pytest.raises(ValueError, match="below another method"):
        both.merge_adapter()
    assert torch.equal(logits(both.unload(), ids), expected)
