"""`steer` on PEFT's own LoRA: its change times the coefficient, row by row, and nothing of PEFT's is touched."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import cache_name
from transformers.cache_utils import Cache

from repeng import SvdSteeringConfig, steer, tiny

ROWS = [0.0, 1.0, -0.5, 2.0]


def lora(base, **options):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    return get_peft_model(base, config).eval()


@pytest.fixture
def model(base):
    return lora(base)


def logits(model, batch, **options):
    with torch.no_grad():
        return model(batch, **options).logits


def with_factor(model, c):
    """A copy whose B is c times as large."""
    scaled = copy.deepcopy(model)
    for name, parameter in scaled.named_parameters():
        if "lora_B" in name:
            parameter.data *= c
    return scaled


@pytest.mark.parametrize("rslora", [False, True])
def test_the_change_is_scaled_row_by_row(base, embedded, batch, rslora):
    model = lora(base, use_rslora=rslora)
    expected = [logits(with_factor(model, c), batch)[row] for row, c in enumerate(ROWS)]
    with steer(model, torch.tensor(ROWS)):
        found = logits(model, batch)
    for row, logit in enumerate(expected):
        assert torch.allclose(found[row], logit, atol=1e-4)
    with steer(model, 0.0):
        assert torch.equal(logits(model, batch), logits(embedded[0], batch))
    with steer(model, 1.0):
        assert torch.equal(logits(model, batch), logits(model, batch))
        one = logits(model, batch)
    assert torch.equal(one, logits(model, batch))


def test_contexts_nest_and_leave_no_hooks(model, batch):
    before = logits(model, batch)
    with steer(model, -1.0):
        minus = logits(model, batch)
        with pytest.raises(RuntimeError, match="inside"), steer(model, 0.5):
            raise RuntimeError("inside")
        assert torch.equal(logits(model, batch), minus)
        with steer(model, 0.5):
            assert torch.equal(logits(model, batch), logits(with_factor(model, 0.5), batch))
        assert torch.equal(logits(model, batch), minus)
    assert torch.equal(logits(model, batch), before)
    assert not any(module._forward_hooks for name, module in model.named_modules() if "lora_B" in name)


def test_one_of_several_adapters_by_name(model, batch):
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    with steer(model, 0.0, adapter_name="second"):
        found = logits(model, batch)
    model.set_adapter("default")
    assert torch.equal(found, logits(model, batch))
    with pytest.raises(ValueError, match="default"), steer(model, 1.0, adapter_name="second"):
        pass  # it is not active


def test_beams_repeat_the_coefficient_of_their_row(model, batch):
    options = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with steer(model, torch.tensor([3.0, -3.0])):
        both = model.generate(batch[:2], **options)
    for row, c in enumerate((3.0, -3.0)):
        with steer(model, c):
            alone = model.generate(batch[row : row + 1], **options)[0]
        assert torch.equal(both[row][: len(alone)], alone)


def test_gradients_reach_both_sides(model, batch):
    model.train()
    with steer(model, torch.tensor([1.0, -1.0, 0.0, 0.0])):
        rows = model(batch).logits.square().sum(dim=(1, 2))
    learned = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(r, learned, retain_graph=True)]) for r in rows]
    assert gradients[0].abs().sum() > 0 and gradients[1].abs().sum() > 0
    assert gradients[2].abs().sum() == 0


def test_a_cache_of_another_coefficient_raises(model, batch):
    with steer(model, 0.5):
        first = model(batch[:, :3], use_cache=True)
    cache = next(value for value in first.values() if isinstance(value, Cache))
    with pytest.raises(ValueError, match="cache"), steer(model, -0.5):
        model(batch[:, 3:], **{cache_name(): cache})


def test_what_does_not_scale_is_refused(base, batch):
    for options, message in (
        ({"use_dora": True}, "Dora"),
        ({"target_modules": ["embed_tokens"]}, "embedding"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_parameters": ["model.layers.0.mlp.up_proj.weight"], "target_modules": []}, "ParamWrapper"),
    ):
        config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
        other = get_peft_model(copy.deepcopy(base), config)
        with pytest.raises(ValueError, match=message), steer(other, 0.5):
            pass
        with pytest.raises(ValueError, match=r"lacks the steering adapter .other.*default"):
            with steer(other, 0.5, adapter_name="other"):
                pass
    merged = lora(base)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"), steer(merged, 0.5):
        pass


def test_steering_adapters_come_first(base, batch):
    """A fine-tune by LoRA below a steering adapter is part of what is steered."""
    tuned = lora(base)
    config = SvdSteeringConfig(r=4, target_modules=["up_proj"], init_weights=False)
    with pytest.warns(UserWarning):
        both = get_peft_model(tuned.base_model.model, config)
    with steer(both, 0.0):
        assert torch.equal(logits(both, batch), logits(tuned, batch))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_lora_whose_start_has_changed_the_base_is_refused(start):
    """At 0 it would leave the changed base behind."""
    model = get_peft_model(tiny.load()[0], LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start))
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'"), steer(model, 0.0):
        pass
