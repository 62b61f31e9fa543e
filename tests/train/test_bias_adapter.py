"""`adapter: bias`: one vector that is added to the residual stream after each layer."""

import pytest
import torch
from peft import PeftModel
from support import arguments, prepare

from repeng import steer, tiny
from repeng.model.sites import capture, decoder_layers
from repeng.train.adapter_files import save_adapter
from repeng.train.arguments import parse_arguments
from repeng.train.run_folder import as_config
from repeng.train.trainer import SteeringTrainer


def test_it_is_trained_saved_and_read_back(tmp_path, batch, embedded):
    args = arguments(tmp_path, adapter="bias", layers="1", r=None, num_pairs=32, max_steps=3)
    run = prepare(args)
    trained = {name: p.numel() for name, p in run.model.named_parameters() if p.requires_grad}
    assert [*trained.values()] == [embedded[0].config.hidden_size] and run.sites.loss_layer == 1
    SteeringTrainer(run.model, args, run.examples, run.tokenizer).train()
    model = run.model.eval()
    again = as_config(args.task_args, args, run)
    assert "r" not in again and again["adapter"] == "bias" and "rank" not in model.base_model.describe()
    (bias,) = [p for p in model.parameters() if p.requires_grad]
    save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.load()[0], tmp_path / "adapter").eval()

    def after(model, c):
        with torch.no_grad(), capture([decoder_layers(model)[1]]) as outputs, steer(model, c):
            model(batch)
        return outputs[0]

    base = after(model, 0.0)
    assert bias.norm() > 0
    for c in (1.0, -0.5):
        assert torch.allclose(after(model, c) - base, c * bias.expand_as(base), atol=1e-4)
        assert torch.equal(after(loaded, c), after(model, c))
    with torch.no_grad(), steer(model, 0.0):
        assert torch.equal(model(batch).logits, embedded[0](batch).logits)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--r", "8"], "a bias has no rank"),
        (["--target_modules", "up_proj"], "a bias acts on the residual stream"),
        (["--directions", "top"], "a bias has no such directions"),
    ],
)
def test_what_a_bias_does_not_have_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", "tiny", "--adapter", "bias", *flags])
    parse_arguments(["--config", "tiny", "--adapter", "bias", "--target_modules", "residual"])
