"""Vectors on models without attention, with an encoder, with layers that do not run on text, with unusual names."""

import inspect

import families
import pytest
import tiny_models
import torch
from peft import get_peft_model
from transformers import Cache

from repeng import ContrastPair, SteeringVector, SvdSteeringConfig, extract, steer, tiny
from repeng.control.positions import TokenFilter
from repeng.model.sites import decoder_layers, trunk

IDS = torch.tensor([[1, 5, 9, 13], [0, 1, 7, 11]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
PAIRS = [ContrastPair("the lime is", "the rain is"), ContrastPair("a lime is", "a rain is")]


def vector(site="residual", width=families.WIDTH):
    return SteeringVector({(site, 1): torch.arange(width) - 8.0})


def generate(model, rows=2, **settings):
    plain = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        return model.generate(input_ids=IDS[:rows], attention_mask=MASK[:rows], **plain, **settings)


@pytest.mark.parametrize("name", ["mamba", "falcon-h1", "recurrent-gemma"])
@pytest.mark.parametrize(
    "positions, prompt, later", [("prompt", True, False), ("generated", False, True), (slice(0, 1), None, False)]
)
def test_every_decode_step_of_a_recurrent_model_steers_the_right_tokens(name, positions, prompt, later, monkeypatch):
    steered = []
    before = TokenFilter._before

    def keep(self, trunk, args, kwargs):
        before(self, trunk, args, kwargs)
        steered.append(self.tokens)

    monkeypatch.setattr(TokenFilter, "_before", keep)
    model = families.build(name)
    with steer(model, 1.0, vector=vector(), positions=positions):
        generate(model)
    first = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]]) if prompt is None else MASK * prompt
    assert torch.equal(steered[0], first.bool())
    for tokens in steered[1:]:
        assert torch.equal(tokens, torch.full((2, 1), later))
    assert len(steered) == 3


def test_a_model_that_hands_on_a_state_without_a_mask_takes_all_positions_only():
    model = families.build("rwkv")
    with steer(model, 1.0, vector=vector()):
        steered = generate(model, rows=1)
    assert not torch.equal(steered, generate(model, rows=1))
    with pytest.raises(ValueError, match=r"'generated'.*state"):
        with steer(model, 1.0, vector=vector(), positions="generated"):
            generate(model, rows=1)


def test_a_state_that_was_made_elsewhere_is_asked_for_a_mask():
    model = families.build("mamba")
    name = next(n for n in ("cache", "cache_params") if n in inspect.signature(model.forward).parameters)
    with torch.no_grad():
        made = model(input_ids=IDS[:1], use_cache=True)
    state = {name: next(value for value in made.values() if isinstance(value, Cache)), "use_cache": True}
    with steer(model, 1.0, vector=vector(), reuse_cache=True, positions="generated"):
        with pytest.raises(ValueError, match=r"'generated'.*mask"), torch.no_grad():
            model(input_ids=IDS[:1, :1], **state)
    with pytest.raises(ValueError, match="reuse_cache"), steer(model, 1.0, vector=vector()), torch.no_grad():
        model(input_ids=IDS[:1, :1], **state)


@pytest.mark.parametrize("name", ["modernbert-decoder", "rwkv", "jetmoe"])
def test_a_residual_vector_needs_the_width_only(name):
    model = families.build(name)
    layer = decoder_layers(model)[1]
    module = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear))
    module.register_module("unlisted", torch.nn.Linear(families.WIDTH, families.WIDTH))
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        with steer(model, 1.0, vector=vector()):
            assert not torch.allclose(model(input_ids=IDS).logits, base, atol=1e-3)
    with (
        pytest.raises(ValueError, match="32"),
        steer(model, 1.0, vector=vector(width=8)),
    ):
        pass


def test_layers_that_do_not_run_on_text_are_left_out_with_a_warning():
    model, tokenizer = families.build("mllama"), tiny.load()[1]
    with pytest.warns(UserWarning, match="residual of layer 1"):
        assert extract(model, tokenizer, PAIRS, held_out=0).layers == [0, 2]
    with pytest.warns(UserWarning, match="o_proj of layer 1"):
        found = extract(model, tokenizer, PAIRS, held_out=0, sites=["o_proj"], method="gradient")
    assert found.layers == [0, 2]
    with pytest.raises(ValueError, match="residual of layer 1"):
        extract(model, tokenizer, PAIRS, held_out=0, layers=1)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_takes_adapters_only(name):
    model = families.build(name)
    for request in (
        lambda: extract(model, tiny.load()[1], PAIRS),
        lambda: steer(model, 1.0, vector=vector()).__enter__(),
    ):
        with pytest.raises(ValueError, match="encoder") as error:
            request()
        assert "layers_pattern" not in str(error.value)
    assert trunk(model) is model.get_decoder()


def test_an_adapter_on_the_decoder_is_dialled():
    told = {"output_logits": True, "return_dict_in_generate": True}
    base = generate(families.build("t5", num_decoder_layers=2).requires_grad_(False), **told)
    config = SvdSteeringConfig(r=2, target_modules=["residual", "SelfAttention.q"], init_weights=False)
    adapted = get_peft_model(families.build("t5", num_decoder_layers=2), config).eval()
    for c, same in ((0.0, True), (1.0, False)):
        with steer(adapted, c):
            found = generate(adapted, **told)
        assert torch.equal(found.logits[0], base.logits[0]) is same


@pytest.mark.parametrize("name", ["gemma3n", "deepseek-v4"])
def test_several_residual_streams_have_no_one_direction(name):
    model = families.build(name)
    with pytest.raises(ValueError, match=r"streams.*=\d"), steer(model, 1.0, vector=vector()):
        pass
    site = {"gemma3n": "o_proj", "deepseek-v4": "o_b_proj"}[name]
    with steer(model, torch.tensor([0.0, 1.0]), vector=vector(site)), torch.no_grad():
        rows = model(input_ids=IDS).logits
    with torch.no_grad():
        assert torch.allclose(rows[0], model(input_ids=IDS).logits[0], atol=1e-5)


@pytest.mark.parametrize("name, site", [("mamba", "dt_proj"), ("falcon-h1", "mamba.out_proj")])
def test_a_site_that_is_never_called_is_refused(name, site):
    model = families.build(name)
    steering = vector(site, 64 if site == "dt_proj" else 32)
    with pytest.raises(ValueError, match=site), steer(model, 1.0, vector=steering):
        pass


def test_an_output_of_another_shape_is_refused_where_padding_counts():
    model = families.build("opt")
    with steer(model, 1.0, vector=vector("fc1", 48)), torch.no_grad():
        with pytest.raises(ValueError, match="batch, tokens"):
            model(input_ids=IDS, attention_mask=MASK)


@pytest.mark.parametrize("method", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused_before_it_starts(method):
    """It would log the error in a thread of its own, and answer without tokens."""
    config = SvdSteeringConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(tiny_models.build("llama"), config)
    for context in (
        steer(model, 1.0, vector=vector(), positions="generated"),
        steer(model, 1.0, vector=vector(), positions=slice(0, 2)),
        steer(model, torch.tensor([0.0, 1.0]), vector=vector()),
        steer(model, torch.tensor([0.0, 1.0])),
    ):
        with context, pytest.raises(ValueError, match="continuous batching"):
            getattr(model, method)([[1, 5, 9]])
        assert method not in vars(model.base_model.model)
    with steer(model, 1.0, vector=vector()):
        assert method not in vars(model.base_model.model)
