"""`steer` and the hooks below it."""

import pytest
import torch
from torch import nn

from repeng import SteeringVector, steer
from repeng.model.sites import capture, decoder_layers, edit_outputs, site_module


def logits(model, batch):
    with torch.no_grad():
        return model(batch).logits


def test_contexts_nest_and_restore_also_after_an_exception(steered, batch):
    default = logits(steered, batch)
    with steer(steered, -1.0):
        minus = logits(steered, batch)
        with pytest.raises(RuntimeError, match="inside"), steer(steered, torch.tensor([0.0, 1.0, 2.0, 3.0])):
            raise RuntimeError("inside")
        assert torch.equal(logits(steered, batch), minus)
        with steer(steered, 2.0):
            assert not torch.equal(logits(steered, batch), minus)
        assert torch.equal(logits(steered, batch), minus)
    assert torch.equal(logits(steered, batch), default)
    with steer(steered, 1.0):
        assert torch.equal(logits(steered, batch), default)


@pytest.mark.parametrize("value", [float("nan"), torch.ones(2, 2, 2), torch.empty(0)])
def test_a_bad_coefficient_raises_and_leaves_the_state(steered, batch, value):
    before = logits(steered, batch)
    with pytest.raises(ValueError, match="coefficient"), steer(steered, value):
        pass
    assert torch.equal(logits(steered, batch), before)


def test_a_model_without_adapters_or_another_name_raises(base, steered):
    with pytest.raises(ValueError, match="default"), steer(steered, 1.0, adapter_name="other"):
        pass
    with pytest.raises(ValueError, match="none"), steer(nn.Linear(2, 2), 1.0):
        pass


def test_gradients_flow_at_the_set_coefficient_only(steered, batch):
    with steer(steered, 0.0):
        loss = steered(batch, labels=batch).loss
    assert not loss.requires_grad


@pytest.mark.parametrize("layer", range(6))
def test_a_vector_is_added_at_its_site_and_nowhere_before(base, batch, layer):
    direction = torch.randn(128, generator=torch.Generator().manual_seed(layer))
    vector = SteeringVector({("residual", layer): direction})
    modules = list(decoder_layers(base))
    with capture(modules) as clean, torch.no_grad():
        base(batch)
    with torch.no_grad(), steer(base, torch.tensor([2.0, 0.0, -1.0, 0.5]), vector=vector), capture(modules) as moved:
        base(batch)
    for index in range(layer):
        assert torch.equal(moved[index], clean[index])
    wanted = clean[layer] + torch.tensor([2.0, 0.0, -1.0, 0.5])[:, None, None] * direction
    assert torch.allclose(moved[layer], wanted, atol=1e-5)
    assert torch.equal(moved[layer][1], clean[layer][1])
    with steer(base, 0.0, vector=vector), capture(modules) as zero, torch.no_grad():
        base(batch)
    assert all(torch.equal(a, b) for a, b in zip(zero, clean, strict=True))


def test_hooks_take_tensors_and_tuples_and_every_batch_row():
    class Pair(nn.Module):
        def forward(self, x):
            return x, "kept"

    x = torch.zeros(3, 2, 4)
    for module in (nn.Identity(), Pair()):
        with edit_outputs([(module, lambda h: h + 1)]):
            out = module(x)
        hidden = out[0] if isinstance(module, Pair) else out
        assert torch.equal(hidden, torch.ones(3, 2, 4))
        assert torch.equal(x, torch.zeros(3, 2, 4))
        if isinstance(module, Pair):
            assert out[1] == "kept"
            assert torch.equal(module(x)[0], x)


def test_cached_generation_equals_uncached(steered, batch):
    for c in (1.0, -1.0):
        with steer(steered, c):
            cached, uncached = (
                steered.generate(input_ids=batch, max_new_tokens=30, do_sample=False, use_cache=use)
                for use in (True, False)
            )
        assert torch.equal(cached, uncached)


def test_sites_name_what_exists(base, steered):
    assert site_module(base, 2, "residual") is decoder_layers(base)[2]
    assert site_module(steered, 1, "up_proj").svd_steering_u
    with pytest.raises(ValueError, match="layers 0 to 5"):
        site_module(base, 6, "residual")
    with pytest.raises(ValueError, match="up_proj"):
        site_module(base, 1, "upproj")
