"""What the benchmarks compare does what it says."""

import pytest
import torch
from support import randomise

from benchmarks import baselines, loss_forms
from benchmarks.training import CONFIG
from repeng import tiny
from repeng.model.tokens import encode, pad_rows
from repeng.train.arguments import parse_arguments
from repeng.train.build import build


@pytest.mark.parametrize("name", loss_forms.FORMS)
def test_every_form_of_the_loss_pushes_from_the_start(name):
    """Where policy and reference are the same, the first step goes + at plus and − (or narrows the gap) at minus."""
    generator = torch.Generator().manual_seed(0)
    hs_ref = torch.randn(2, 3, 4, 8, generator=generator)
    hs_pi = torch.stack([hs_ref, hs_ref]).requires_grad_()
    logp = torch.randn(3, 5, generator=generator)
    ones = torch.ones(3, 5, dtype=torch.bool)
    result = loss_forms.FORMS[name].loss(
        hs_pi=hs_pi,
        hs_ref=hs_ref,
        hs_mask=torch.ones(2, 3, 4, dtype=torch.bool),
        logp_pi=logp.expand(2, 3, 5),
        logp_ref=logp.expand(2, 3, 5),
        logp_mask=ones.expand(2, 3, 5),
        neutral_logp_pi=logp.expand(2, 3, 5),
        neutral_logp_ref=logp,
        neutral_mask=ones,
        direction=torch.eye(8)[:, :1],
        scale=torch.ones(1),
        gap_pi=torch.zeros(2, 2, 3),
        gap_ref=torch.zeros(2, 3),
        gap_weight=torch.ones(3),
        gap_unit=1.0,
        separation_target=20.0,
        order_target=8.0,
        order_weight=3.0,
        coherence_margin=0.1,
        coherence_weight=30.0,
    )
    if name == "no separation":
        assert not result.loss.requires_grad  # nothing of the hidden states is left
        return
    push = -torch.autograd.grad(result.loss, hs_pi)[0][..., 0]
    assert (push[0, 0] > 0).all()
    narrows = name == "distance chosen − rejected, without a target"
    assert (push[1, 1] > 0).all() if narrows else (push[1].sum(dim=0) < 0).all()


@pytest.fixture
def prepared(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--num_pairs", "16", "--r", "4", "--layers", "2", "--use_cpu", "true"]
    task_args, args = parse_arguments([*argv, "--per_device_train_batch_size", "4"], CONFIG)
    return build(task_args, args, tiny.task(task_args, args.seed)), args


@pytest.mark.parametrize("dial", [baselines.arms_dial, baselines.weight_dial])
def test_other_methods_have_a_coefficient_by_row_too(prepared, batch, embedded, dial):
    run, args = prepared
    baselines.use_two_loras(run, args)
    model = run.model.eval()
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())
    randomise(model, 0.1)
    with torch.no_grad():
        with dial(model, torch.tensor([1.0, -1.0, 0.0, 2.0])):
            rows = model(batch).logits
        singles = []
        for c in (1.0, -1.0, 0.0, 2.0):
            with dial(model, c):
                singles.append(model(batch).logits)
        for index, single in enumerate(singles):
            assert torch.allclose(rows[index], single[index], atol=1e-5)
        assert torch.allclose(singles[2], embedded[0](batch).logits, atol=1e-6)
        assert (singles[0] - singles[2]).abs().max() > 0.01 and (singles[1] - singles[2]).abs().max() > 0.01


def test_distillation_compares_what_is_behind_the_persona(prepared):
    """The loss of one batch against single rows: the base after the persona, the model without it at ±1."""
    run, args = prepared
    baselines.use_two_loras(run, args)
    randomise(run.model, 0.1)
    trainer = baselines.DistillationTrainer(run.model, args, run.examples, run.tokenizer, steer_fn=baselines.arms_dial)
    inputs = trainer.data_collator(trainer.train_dataset[:3])
    model = run.model.eval()
    with trainer.both_sides(model, inputs), torch.no_grad():
        found = trainer.compute_loss(model, inputs)
    expected = []
    tokenizer = run.tokenizer
    for pair, example in zip(run.task.pairs[:3], trainer.train_dataset[:3], strict=True):
        for c, opening in ((1.0, pair.chosen), (-1.0, pair.rejected)):
            for text in (pair.suffix, tokenizer.decode(example["neutral_ids"], skip_special_tokens=True)):
                n = len(text.split())
                with torch.no_grad():
                    with baselines.arms_dial(model, 0.0):
                        rows = pad_rows([encode(tokenizer, f"{opening} {text}").ids], tokenizer)
                        p = model(**rows).logits[0, -n:].log_softmax(-1)
                    with baselines.arms_dial(model, c):
                        q = model(**pad_rows([encode(tokenizer, text).ids], tokenizer)).logits[0, -n:].log_softmax(-1)
                expected.append((p.exp() * (p - q)).sum(-1).mean())
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
