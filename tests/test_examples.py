"""The example without a trainer is the method: it computes the trainer's loss, and it steers."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import arguments, randomise

from examples import loop
from repeng import SteeringTrainer, steer, tiny
from repeng.train.collator import tokenize_examples


def test_the_example_trains_a_dial(tmp_path, monkeypatch, base, batch):
    monkeypatch.setattr(loop, "PAIRS", 24)
    monkeypatch.setattr(loop, "BATCH", 6)
    model, losses, report = loop.main(str(tmp_path), steps=12, ask_every=10)
    assert losses[-1] < 0.8 * losses[0]
    minus, zero, plus = (report.mean_log_odds(c) for c in (-1.0, 0.0, 1.0))
    assert minus + 0.5 < zero < plus - 0.5
    assert report.kl[report.at(0.0)] == 0 < report.kl[report.at(1.0)]

    saved = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        with saved.disable_adapter():
            expected = saved(batch).logits
        for coefficient, same in ((0.0, True), (1.0, False)):
            with steer(saved, coefficient):
                logits = saved(batch).logits
            assert torch.equal(logits, expected) == same
            with steer(model, coefficient):
                assert torch.equal(model(batch).logits, logits)


def test_the_example_computes_the_trainers_loss(tmp_path, base, tokenizer):
    """On the same pairs, with an adapter that does something, so that every term is above 0."""
    padding_side = tokenizer.padding_side
    pairs, neutral = tiny.pairs("honesty", 12, seed=0), tiny.neutral_texts(12, seed=0)
    examples = tokenize_examples(tokenizer, pairs, neutral, seed=0)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=loop.TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    randomise(model, 0.3)

    texts = loop.make_batch(examples, tokenizer)
    tokenizer.padding_side = padding_side  # the fixture belongs to all tests
    ref = loop.make_reference(model, texts)
    index = torch.tensor([7, 2, 9, 4])
    result = loop.loss_of(model, texts, ref, index)

    trainer = SteeringTrainer(model, arguments(tmp_path, adapter="lora"), examples, tokenizer)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in index.tolist()])
    with trainer.both_sides(model, inputs):
        expected = trainer.policy_loss(model, inputs)
    assert min(term.abs().max() for term in expected.terms.values()) > 0, expected.terms
    for name, term in expected.terms.items():
        assert torch.allclose(result.terms[name], term, rtol=1e-3, atol=1e-5), name
    assert torch.allclose(result.loss, expected.loss, rtol=1e-4)
