"""An adapter that has no part in what the model says is found before it is trained."""

import families
import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model

from repeng import SvdSteeringConfig
from repeng.control import check_sites, idle_sites

IDS = torch.tensor([[1, 5, 9, 13]])


def test_layers_that_run_on_images_only_are_named():
    config = SvdSteeringConfig(r=2, target_modules=["residual", "mlp.up_proj"])
    model = get_peft_model(families.build("mllama"), config)
    layer = "base_model.model.model.language_model.layers.1"
    assert sorted(idle_sites(model, IDS)) == [layer, f"{layer}.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"layers\.1"):
        check_sites(model, IDS)


@pytest.mark.parametrize(
    "config",
    [
        SvdSteeringConfig(r=2, target_modules=["residual", "all-linear"]),
        LoraConfig(r=2, target_modules=["q_proj", "up_proj"]),
    ],
)
def test_a_new_adapter_acts_everywhere_and_the_probe_leaves_no_trace(config):
    model = get_peft_model(tiny_models.build("llama"), config).train()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    check_sites(model, IDS)
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 1 and bool((gradients[0] == 1).all())


def test_a_site_whose_output_is_not_used_is_idle():
    model = tiny_models.build("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _args, output: output.detach() * 0)
    adapted = get_peft_model(model, SvdSteeringConfig(r=2, target_modules=["down_proj", "o_proj"]))
    assert [name.split("layers.")[1] for name in idle_sites(adapted, IDS)] == ["1.mlp.down_proj"]
