"""Training: the same gradients however the batch is split, the right rows at the right coefficient, a safe stop."""

import copy
import signal
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import tiny_models
import torch
from peft import PeftModel
from support import arguments, prepare, step, trainer_for
from transformers.modeling_outputs import CausalLMOutput

from repeng import ContrastPair, steer
from repeng.data.word_questions import NEUTRAL_REQUEST
from repeng.model.logprob import has_plain_head, head_logp
from repeng.model.sites import capture, decoder_layers, edit_outputs, site_module
from repeng.model.tokens import encode
from repeng.train.callbacks import NonFiniteError
from repeng.train.collator import PROMPTS, tokenize_examples
from repeng.train.inner_contrastive_loss import inner_contrastive_loss
from repeng.train.reference import persona_gap, preference_direction
from repeng.train.trainer import StartError


def first_step_gradients(args):
    """Gradients as the optimizer sees them at its first step, before clipping."""
    seen = {}
    trainer = trainer_for(args)
    trainer.args.max_grad_norm = 0.0

    def keep(optimizer, *_):
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                seen[name] = parameter.grad.clone()

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return seen


@pytest.fixture(scope="module")
def gradients_of_whole_batches(tmp_path_factory):
    """Gradients of a plain run, by site of the loss."""
    return cache(lambda site: first_step_gradients(arguments(tmp_path_factory.mktemp(site), loss_site=site)))


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": "true", "gradient_checkpointing_kwargs": '{"use_reentrant": true}'},
        {"gradient_checkpointing": "true", "gradient_checkpointing_kwargs": '{"use_reentrant": false}'},
    ],
    ids=["accumulation", "reentrant", "non-reentrant"],
)
@pytest.mark.parametrize("site", ["residual", "up_proj"])
def test_gradients_do_not_depend_on_how_the_step_is_computed(tmp_path, changes, site, gradients_of_whole_batches):
    """With up_proj, hidden states are taken from inside of what a checkpointed layer would compute twice."""
    whole = gradients_of_whole_batches(site)
    other = first_step_gradients(arguments(tmp_path, loss_site=site, **changes))
    assert whole.keys() == other.keys() and len(whole) > 0
    assert sum(grad.abs().sum() for grad in whole.values()) > 0
    for name, grad in whole.items():
        assert torch.allclose(other[name], grad, atol=1e-5, rtol=1e-4), name


def test_packed_rows_give_the_gradients_of_padded_ones(tmp_path, monkeypatch):
    packed, sizes = first_step_gradients(arguments(tmp_path / "a")), []
    monkeypatch.setattr("repeng.train.trainer.packing_for", lambda *_: sizes.append(1))
    padded = first_step_gradients(arguments(tmp_path / "b"))
    assert sizes and packed.keys() == padded.keys()
    for name, grad in packed.items():
        assert torch.allclose(padded[name], grad, atol=1e-5, rtol=1e-3), name


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_gets_what_separate_forwards_give(tmp_path, side, packs):
    """Every tensor handed to the loss equals the one from single, unpadded rows at one coefficient."""
    args = arguments(tmp_path, num_pairs=8, per_device_train_batch_size=3, last_n_tokens=4)
    seen = {}

    def loss(**tensors):
        if not seen:  # the second call is of the base
            seen.update(tensors)
        return inner_contrastive_loss(**tensors)

    trainer = trainer_for(args, loss_func=loss)
    trainer.data_collator.tokenizer.padding_side = side
    assert trainer.data_collator.packing is not None
    trainer.data_collator.packing = trainer.data_collator.packing if packs else None
    examples = trainer.train_dataset[:3]
    step(trainer, examples)
    model = trainer.model.eval()
    site = site_module(model, trainer.loss_layer, args.loss_site)

    def single(ids, c):
        with steer(model, c), torch.no_grad(), capture([site]) as outputs:
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        logp = logits.gather(-1, torch.tensor(ids)[1:, None])[:, 0]
        return outputs[0][0, -4:], logp

    for b, example in enumerate(examples):
        for c, coefficient in enumerate((1.0, -1.0)):
            for p, key in enumerate(PROMPTS):
                hs, logp = single(example[key], coefficient)
                assert torch.allclose(seen["hs_pi"][c, p, b], hs, atol=1e-4)
                if c == p:
                    assert torch.allclose(seen["logp_pi"][c, b][seen["logp_mask"][c, b]], logp, atol=1e-4)
                hs, logp = single(example[key], 0.0)
                assert torch.allclose(seen["hs_ref"][p, b], hs, atol=1e-4)
                if p < 2:
                    assert torch.allclose(seen["logp_ref"][p, b][seen["logp_mask"][p, b]], logp, atol=1e-4)
            logp = single(example["neutral_ids"], coefficient)[1]
            assert torch.allclose(seen["neutral_logp_pi"][c, b][seen["neutral_mask"][b]], logp, atol=1e-4)
            logits = [end_logits(model, example[key], coefficient) for key in PROMPTS]
            q = torch.stack(
                [end_logits(model, example[key], 0.0).softmax(-1) for key in ("chosen_ids", "rejected_ids")]
            )
            d = q[0] - q[1]
            up, down = (x.clamp(min=0) * (x >= x.topk(32).values[-1]) for x in (d, -d))
            gaps = [(x @ (up / up.sum()) - x @ (down / down.sum())).item() for x in logits]
            assert seen["gap_pi"][c, :, b].tolist() == pytest.approx(gaps, abs=1e-3)
        weight = example["gap_weight"].item()
        assert weight == pytest.approx(d.abs().sum().item() / 2, abs=1e-4)
        assert seen["gap_weight"][b].item() == pytest.approx(weight / trainer.mean_weight)
        reference = [end_logits(model, example[key], 0.0) for key in PROMPTS]
        gaps = [(x @ (up / up.sum()) - x @ (down / down.sum())).item() for x in reference]
        assert seen["gap_ref"][:, b].tolist() == pytest.approx(gaps, abs=1e-3)
    assert not seen["logp_mask"].all() and seen["gap_unit"] == trainer.gap_unit


def end_logits(model, ids, c):
    """Logits of what follows one unpadded row."""
    with steer(model, c), torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float()


def test_the_coefficient_is_what_it_was_after_a_step(tmp_path, batch):
    trainer = trainer_for(arguments(tmp_path))
    trainer.model.eval()
    with torch.no_grad():
        before = trainer.model(batch).logits
    step(trainer, trainer.train_dataset[:2])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(trainer.model(batch).logits, before)


def test_direction_points_toward_chosen_with_the_mean_distance_as_unit():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    for sign in (1.0, -1.0):
        rejected = torch.randn(40, 2, 16, generator=generator)
        chosen = rejected + sign * 3 * wanted + 0.01 * torch.randn(40, 2, 16, generator=generator)
        mask = torch.ones(2, 2, dtype=torch.bool)
        examples = [{"ref_hs": torch.stack(hs), "ref_mask": mask} for hs in zip(chosen, rejected, strict=True)]
        direction, scale = preference_direction(examples, 1)
        assert torch.allclose(direction[:, 0], sign * wanted, atol=0.02)
        assert scale.item() == pytest.approx(3, rel=0.02)
    with pytest.raises(ValueError, match="num_directions=17"):
        preference_direction(examples, 17)


def test_tokens_beyond_a_short_prompt_do_not_count_in_the_direction():
    hs = torch.zeros(2, 3, 4)
    hs[0, -1, 0] = 2.0
    hs[:, 0] = 1e6
    mask = torch.tensor([[False, True, True]] * 2)
    direction, scale = preference_direction([{"ref_hs": hs, "ref_mask": mask}] * 3, 1)
    assert direction[:, 0].tolist() == pytest.approx([1, 0, 0, 0]) and scale.item() == pytest.approx(1.0)


def test_the_unit_of_the_gap_is_what_the_personas_change():
    gaps, weights = torch.tensor([[3.0, 1.0, 9.0], [5.0, -1.0, 9.0]]), torch.tensor([0.1, 0.3])
    examples = [{"ref_gap": gap, "gap_weight": weight} for gap, weight in zip(gaps, weights, strict=True)]
    assert persona_gap(examples) == pytest.approx(((0.1 * 2 + 0.3 * 6) / 0.4, 0.2))
    idle = [{"ref_gap": torch.zeros(3), "gap_weight": torch.tensor(0.0)}] * 2
    assert all(value > 0 for value in persona_gap(idle))


def test_bare_rows_have_no_persona_and_neutral_texts_are_answers(embedded):
    tokenizer = copy.deepcopy(embedded[1])
    pair = ContrastPair("the speaker is honest .", "the speaker is dishonest .", "the lime is")
    (example,) = tokenize_examples(tokenizer, [pair], ["two plus three is five ."], seed=0)
    assert example["bare_ids"] == encode(tokenizer, "", "the lime is").ids
    assert example["neutral_ids"] == encode(tokenizer, "", "two plus three is five .").ids
    whole = ContrastPair("the speaker is honest", "the speaker lies", "")
    (example,) = tokenize_examples(tokenizer, [whole], ["two plus three is five ."], seed=0)
    assert example["bare_ids"] == [tokenizer.bos_token_id]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}the answer is"
    pair = replace(pair, chosen=f"{pair.chosen} what is it ?", rejected=f"{pair.rejected} what is it ?")
    (example,) = tokenize_examples(tokenizer, [pair], ["two plus three is five ."], seed=0)
    assert example["bare_ids"] == encode(tokenizer, "what is it ?", "the lime is").ids
    assert example["neutral_ids"] == encode(tokenizer, NEUTRAL_REQUEST, "two plus three is five .").ids


def test_the_first_token_does_not_count_in_separation(tmp_path, embedded):
    """A row that is no longer than what is read: its BOS, where attention rests, is left out."""
    trainer = trainer_for(arguments(tmp_path, num_pairs=8, last_n_tokens=64))
    for example in trainer.train_dataset:
        lengths = [len(example[side]) for side in PROMPTS]
        assert example["ref_mask"].sum(dim=-1).tolist() == [n - 1 for n in lengths]
        assert all(example[side][0] == embedded[1].bos_token_id for side in PROMPTS)


def test_packing_is_tried_as_it_will_be_steered(tmp_path):
    """A dial that looks at places in the row: it would hit another row's tokens."""

    @contextmanager
    def dial(model, c):
        def last(hs):
            value = torch.as_tensor(c, dtype=hs.dtype)
            return torch.cat([hs[:, :-1], hs[:, -1:] + 30 * value.reshape(-1, 1, 1)], dim=1)

        with edit_outputs([(decoder_layers(model)[1], last)]):
            yield

    trainer = trainer_for(arguments(tmp_path), steer_fn=dial)
    assert trainer.data_collator.packing is None


def test_every_example_ends_as_its_pair_does(tmp_path):
    args = arguments(tmp_path)
    run = prepare(args)
    for pair, example in zip(run.task.pairs, run.examples, strict=True):
        suffix = encode(run.tokenizer, "", pair.suffix).suffix
        assert example["chosen_ids"][-len(suffix) :] == example["rejected_ids"][-len(suffix) :] == suffix


def test_the_terms_are_logged(tmp_path):
    trainer = trainer_for(arguments(tmp_path, logging_steps=1))
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    args = trainer.args
    total = (
        row["separation"]
        + args.order_weight * row["order"]
        + args.coherence_weight * (row["coherence"] + row["neutral"])
    )
    assert row["loss"] == pytest.approx(total, abs=5e-3)


def test_training_stops_at_a_nan_and_the_last_checkpoint_is_intact(tmp_path, embedded, batch):
    """At step 3 the learning rate is absurd: the parameters stay finite, the loss of the next step would not."""
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 8}
    args = arguments(tmp_path, num_pairs=16, per_device_train_batch_size=4, max_steps=8, **saves)
    trainer = trainer_for(args)
    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0 if step < 2 else 1e6)
    with pytest.raises(NonFiniteError, match="optimizer step 4"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    model = PeftModel.from_pretrained(copy.deepcopy(embedded[0]), tmp_path / "checkpoint-2").eval()
    for c in (-1.0, 1.0):
        with steer(model, c), torch.no_grad():
            assert model(batch).logits.isfinite().all()


def test_a_nan_gradient_stops_before_the_parameters_take_it(tmp_path):
    trainer = trainer_for(arguments(tmp_path))
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * float("nan"))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(NonFiniteError, match="optimizer step 1"):
        trainer.train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.gpu
def test_bf16_training_on_a_gpu(tmp_path, batch):
    """The whole step in bfloat16 on CUDA: finite terms, and c = 0 stays the base bit for bit."""
    args = arguments(tmp_path, use_cpu="false", bf16="true", max_steps=3, num_pairs=32, logging_steps=1)
    trainer = trainer_for(args)
    trainer.train()
    model = trainer.model.eval()
    assert model.device.type == "cuda"
    rows = [row for row in trainer.state.log_history if "separation" in row]
    assert len(rows) == 3 and all(row["loss"] == row["loss"] for row in rows)
    ids = batch.to(model.device)
    with torch.no_grad(), steer(model, 0.0):
        zero = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(zero, model(ids).logits)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_log_probabilities_by_chunks_are_those_of_whole_logits(chunk):
    """Values and gradients, for any size of chunk."""
    generator = torch.Generator().manual_seed(0)
    hs = torch.randn(19, 8, generator=generator, dtype=torch.float64)
    head = torch.nn.Linear(8, 11).double()
    ids = torch.randint(11, (19,), generator=generator)
    found, expected = hs.clone().requires_grad_(), hs.clone().requires_grad_()
    logp = head_logp(found, head, ids, chunk)
    whole = head(expected).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    weight = torch.randn(19, generator=generator)
    (logp * weight).sum().backward()
    (whole * weight).sum().backward()
    assert torch.allclose(logp.double(), whole, atol=1e-6) and torch.allclose(found.grad, expected.grad, atol=1e-5)


def test_a_head_with_something_behind_it_is_read_as_logits(tmp_path):
    """A cap on the logits, as in Gemma 2: the loss sees what the model really says."""
    args = arguments(tmp_path)
    trainer = trainer_for(args)
    assert trainer.plain_head
    plain = gradients(trainer)
    trainer.plain_head = False
    for name, grad in gradients(trainer).items():
        assert torch.allclose(grad, plain[name], atol=1e-6, rtol=1e-4), name
    model = tiny_models.build("gemma2")
    assert not has_plain_head(model, [1, 5, 6])
    functional = tiny_models.build("llama")

    class Functional(type(functional)):
        def forward(self, input_ids, **_):
            hs = self.model(input_ids=input_ids).last_hidden_state
            return CausalLMOutput(logits=hs @ self.lm_head.weight.mT)

    functional.__class__ = Functional  # the head's weight is used, the head never called
    assert not has_plain_head(functional, [1, 5, 6]) and has_plain_head(tiny_models.build("gemma3-text"), [1, 5, 6])


def gradients(trainer):
    """Of one step on the first examples."""
    trainer.model.zero_grad()
    step(trainer, trainer.train_dataset[:3])
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plain", [True, False])
def test_training_starts_at_the_base_model_exactly(tmp_path, plain):
    """With dropout in the attention as well, which the policy must not have."""

    def add_dropout(model):
        for layer in decoder_layers(model):
            layer.self_attn.attention_dropout = 0.5
            layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(0.5))

    trainer = trainer_for(arguments(tmp_path), add_dropout)
    trainer.plain_head = plain
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["step"] == 0 and first["start_kl"] == 0.0
    assert sum("start_kl" in row for row in trainer.state.log_history) == 1


def test_a_start_away_from_the_base_model_is_refused(tmp_path):
    trainer = trainer_for(
        arguments(tmp_path), steer_fn=lambda model, c: steer(model, c if torch.is_tensor(c) else 1.0)
    )
    with pytest.raises(StartError, match=r"at c = 0 the policy is .* nats away"):
        trainer.train()


def test_the_reference_is_computed_in_the_precision_of_training(tmp_path):
    """On a float32 base under bf16 autocast: what the policy, as it trains, says at c = 0 on the same texts."""
    trainer = trainer_for(arguments(tmp_path, bf16="true"))
    trainer.train()
    seen = {}
    trainer.loss_func = lambda **tensors: seen.update(tensors) or inner_contrastive_loss(**tensors)
    with torch.no_grad(), steer(trainer.model, 0.0):
        trainer.policy_loss(trainer.model_wrapped, trainer._last_inputs)
    mask = seen["logp_mask"]
    off = (seen["logp_pi"] - seen["logp_ref"])[mask].abs().mean()
    assert mask.sum() > 50 and off < 1e-4, off


def test_the_schedule_counts_optimizer_steps(tmp_path):
    def rates(**batches):
        args = arguments(tmp_path, max_steps=3, num_pairs=12, logging_steps=1, warmup_steps=1, **batches)
        trainer = trainer_for(args)
        trainer.train()
        return [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]

    whole = rates(per_device_train_batch_size=4)
    assert len(set(whole)) == 3 and whole == rates(per_device_train_batch_size=2, gradient_accumulation_steps=2)
