"""`adapter: lora`: a plain PEFT LoRA, trained as a dial, in the file that every PEFT reads."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from support import arguments, prepare, randomise

from repeng import steer, tiny
from repeng.train.adapter_files import adapter_state, load_adapter_state, save_adapter
from repeng.train.arguments import parse_arguments
from repeng.train.checkpoints import newest
from repeng.train.run import _describe
from repeng.train.trainer import SteeringTrainer

STEPS = {
    "adapter": "lora",
    "num_pairs": 16,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
}


def trained(args, resume=None):
    run = prepare(args)
    SteeringTrainer(run.model, args, run.examples, run.tokenizer).train(resume_from_checkpoint=resume)
    return run.model


def test_it_is_trained_saved_and_read_as_any_lora(tmp_path, batch, embedded):
    model = trained(arguments(tmp_path, **STEPS))
    config = model.peft_config["default"]
    assert type(config) is LoraConfig and config.r == config.lora_alpha == 8
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(tiny.load()[0], tmp_path / "adapter")
    with torch.no_grad():
        plain = loaded(batch).logits
        for c in (1.0, -1.0, 0.3):
            with steer(model.eval(), c), steer(loaded, c):
                assert torch.equal(model(batch).logits, loaded(batch).logits)
        with steer(loaded, 1.0):
            assert torch.equal(loaded(batch).logits, plain)  # without this package it stands at 1
        with steer(model, 0.0):
            assert torch.equal(model(batch).logits, embedded[0](batch).logits)
        assert not torch.equal(plain, embedded[0](batch).logits)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = adapter_state(trained(arguments(tmp_path / "whole", **STEPS)))
    assert newest(tmp_path / "whole").endswith("checkpoint-4")
    again = trained(arguments(tmp_path / "again", **STEPS), resume=tmp_path / "whole" / "checkpoint-2")
    assert whole and all(torch.equal(tensor, whole[name]) for name, tensor in adapter_state(again).items())


def test_the_file_is_read_into_a_model_in_pieces(tmp_path):
    """What FSDP does: the names of the file, without the adapter's, are those of the model."""
    run = prepare(arguments(tmp_path, adapter="lora"))
    randomise(run.model)
    state = {name: tensor.clone() for name, tensor in adapter_state(run.model).items()}
    save_adapter(run.model, tmp_path / "adapter")
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    load_adapter_state(run.model, tmp_path / "adapter")
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter_state(run.model).items())


def test_rank_sites_and_layers_are_those_of_the_recipe(tmp_path):
    args = arguments(tmp_path, adapter="lora", layers="1", target_modules="kv", r=3)
    run = prepare(args)
    shapes = {name: p.shape for name, p in run.model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rsplit("layers.", 1)[1] for name in shapes} == {
        "1.self_attn.k_proj",
        "1.self_attn.v_proj",
    }
    assert all(3 in shape for shape in shapes.values())
    assert _describe(run.model).startswith("LoRA on 2 modules")


def test_what_a_lora_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'residual'.*a LoRA cannot adapt"):
        prepare(arguments(tmp_path, adapter="lora", target_modules="residual"))
    with pytest.raises(ValueError, match="directions=top is for adapter: svd"):
        parse_arguments(["--config", "tiny", "--adapter", "lora", "--directions", "top"])
