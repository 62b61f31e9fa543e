"""The reference kept in files: the same as computed, and never another model's or other data's."""

import copy
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support import arguments, prepare

from repeng.train.collator import PairCollator
from repeng.train.reference import add_reference
from repeng.train.reference_cache import STACKED, cached_reference, reference_key
from repeng.train.trainer import SteeringTrainer

PLACE = {"site": "residual", "layer": 2, "last_n": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    args = arguments(tmp_path_factory.mktemp("run"), num_pairs=11, max_steps=2)
    return prepare(args)


def fresh(run, examples):
    return add_reference(run.model, PairCollator(run.tokenizer), examples, batch_size=4, **PLACE)


def cached(run, folder, compute, examples=None, world=1, rank=0, wait=lambda: None, **changes):
    accelerator = SimpleNamespace(
        num_processes=world, process_index=rank, mixed_precision="no", wait_for_everyone=wait
    )
    options = {"model": run.model, "tokenizer": run.tokenizer, **PLACE, **changes}
    return cached_reference(examples or run.examples, compute, folder=folder, accelerator=accelerator, **options)


@pytest.mark.parametrize("world", [1, 2])
def test_cached_is_what_was_computed(run, tmp_path, world):
    calls = []

    def compute(share):
        calls.append(len(share))
        return fresh(run, share)

    for _ in range(2):
        # The last process waits for the first, which finds the other's share written.
        first = partial(cached, run, tmp_path, compute, world=world, rank=0)
        found = first() if world == 1 else cached(run, tmp_path, compute, world=world, rank=1, wait=first)
    assert calls == ([11] if world == 1 else [5, 6])  # computed once an example, by all processes
    expected = fresh(run, run.examples)
    assert len(found) == 11 and len(found[2:5]) == 3
    for copied in (found, pickle.loads(pickle.dumps(found))):
        for one, other in zip(copied, expected, strict=True):
            assert one["chosen_ids"] == other["chosen_ids"]
            for name in STACKED:
                assert torch.allclose(one[name].float(), other[name].float(), atol=1e-4), name
            rows = zip(one["ref_logp"], other["ref_logp"], strict=True)
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in rows)


def test_the_key_follows_everything_that_the_reference_depends_on(run):
    def key(examples=run.examples, model=run.model, tokenizer=run.tokenizer, **settings):
        return reference_key(examples, model, tokenizer, **{"precision": "no", **PLACE, **settings})

    keys = {key(), key(precision="bf16"), key(layer=3), key(last_n=5), key(examples=run.examples[::-1])}
    changed = copy.deepcopy(run.model)
    with torch.no_grad():
        changed.get_base_model().model.embed_tokens.weight[0, 0] += 1e-3
    keys.add(key(model=changed))
    keys.add(key(model=copy.deepcopy(run.model).half()))
    other = copy.deepcopy(run.tokenizer)
    other.add_tokens(["extra"])
    keys.add(key(tokenizer=other))
    assert len(keys) == 8 and key() == key()
    trained = copy.deepcopy(run.model)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 1.0
    assert key(model=trained) == key()  # the adapter is not part of the reference


def test_a_broken_file_is_computed_again(run, tmp_path):
    cached(run, tmp_path, lambda share: fresh(run, share))
    (path,) = tmp_path.glob("reference-*")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    cached(run, tmp_path, lambda share: fresh(run, share))
    assert path.read_bytes() == whole


def test_files_of_other_keys_are_dropped(run, tmp_path):
    cached(run, tmp_path, lambda share: fresh(run, share))
    (old,) = tmp_path.glob("reference-*")
    cached(run, tmp_path, lambda share: fresh(run, share), examples=run.examples[:4])
    (new,) = tmp_path.glob("reference-*")
    assert new != old


def test_the_order_is_kept_whatever_goes_through_the_model_together(run):
    """Examples with the same neutral text are computed together."""
    texts = [example["neutral_ids"] for example in run.examples[:3]]
    examples = [{**example, "neutral_ids": texts[-i % 3]} for i, example in enumerate(run.examples)]
    together = fresh(run, examples)
    for example, found in zip(examples, together, strict=True):
        (alone,) = fresh(run, [example])
        assert found["chosen_ids"] == example["chosen_ids"]
        for name in ("ref_hs", "ref_gap"):
            assert torch.allclose(found[name], alone[name], atol=1e-4)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found["ref_logp"], alone["ref_logp"], strict=True))


def test_training_reads_the_file(tmp_path, monkeypatch):
    args = arguments(tmp_path, num_pairs=8)
    prepared = prepare(args)
    SteeringTrainer(prepared.model, args, prepared.examples, prepared.tokenizer)
    monkeypatch.setattr("repeng.train.trainer.add_reference", None)
    SteeringTrainer(prepared.model, args, prepared.examples, prepared.tokenizer).train()
