"""Packed rows: what they share is there once, and a model predicts each as it does alone, or they are not packed."""

import pytest
import tiny_models
import torch
import transformers as tf

from repeng.model.packing import Packing, additive, pack, packing_for

ROWS = [[1, 5, 6, 7], [1, 5, 6, 8, 9], [1, 5], [2, 6, 7], [1, 5, 6, 7]]


def long_rows(seed=0):
    """Rows of up to 14 tokens that share up to 8."""
    drawn = torch.randint(3, 60, (200,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [drawn[: 2 + 3 * (i % 3)] + drawn[40 + 6 * i : 44 + 6 * i + i % 3] for i in range(7)]


def test_a_beginning_is_there_once_and_only_own_tokens_are_read():
    batch, where = pack(ROWS, Packing())
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 8, 9, 2, 6, 7]]
    assert where == [[0, 1, 2, 3], [0, 1, 2, 4, 5], [0, 1], [6, 7, 8], [0, 1, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 2]]
    reads = [set(line.nonzero().flatten().tolist()) for line in batch["attention_mask"][0, 0]]
    assert reads == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 4}, {0, 1, 2, 4, 5}, {6}, {6, 7}, {6, 7, 8}]


def test_a_window_is_counted_along_the_own_row():
    batch, _ = pack(ROWS, Packing(window=2))
    reads = [set(line.nonzero().flatten().tolist()) for line in batch["attention_mask"][0, 0]]
    assert reads == [{0}, {0, 1}, {1, 2}, {2, 3}, {2, 4}, {4, 5}, {6}, {6, 7}, {7, 8}]


@pytest.mark.parametrize("longest, sizes", [(6, [6, 3]), (4, [4, 5, 3]), (1, [2, 4, 5, 3])])
def test_rows_are_cut_where_they_get_too_long(longest, sizes):
    batch, where = pack(ROWS, Packing(longest))
    flat, width = batch["input_ids"].flatten(), batch["input_ids"].shape[1]
    assert [[flat[node].item() for node in path] for path in where] == ROWS
    assert not batch["attention_mask"].sum(dim=-1).eq(0).any()
    used = [len({node for path in where for node in path if node // width == line}) for line in range(len(sizes))]
    assert used == sizes and width == max(sizes)


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
@torch.no_grad()
def test_a_model_predicts_packed_rows_as_each_alone(name):
    model, rows = tiny_models.build(name), long_rows()
    if name == "gemma2":  # its layers have windows of two sizes
        rows = [row[:8] for row in rows]
    packing = packing_for(model, rows[:3], max(map(len, rows)))
    assert packing is not None
    for longest in (512, 20):
        batch, where = pack(rows, packing._replace(longest=longest))
        assert (len(batch["input_ids"]) == 1) == (longest == 512)
        batch["attention_mask"] = additive(batch["attention_mask"], model.dtype)
        packed = model(**batch, use_cache=False).logits.flatten(0, 1)
        for row, path in zip(rows, where, strict=True):
            assert torch.allclose(packed[path], model(torch.tensor([row])).logits[0], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_low_precision_packs_as_well(dtype):
    assert packing_for(tiny_models.build("llama").to(dtype), long_rows()[:3], 14)


def test_mixed_windows_recurrence_and_alibi_are_left_alone():
    gemma, rows = tiny_models.build("gemma2"), long_rows()
    short = [row[:8] for row in rows[:3]]
    assert packing_for(gemma, short, 8) and packing_for(gemma, short, 9) is None
    sizes = {"vocab_size": tiny_models.VOCABULARY, "hidden_size": 32}
    torch.manual_seed(0)
    mamba = tf.MambaForCausalLM(tf.MambaConfig(**sizes, num_hidden_layers=2, state_size=4)).eval()
    bloom = tf.BloomForCausalLM(tf.BloomConfig(**sizes, n_layer=2, n_head=4)).eval()
    neo = tf.GPTNeoForCausalLM(tf.GPTNeoConfig(**sizes, num_layers=2, num_heads=4, attention_types=[[["local"], 2]]))
    assert all(packing_for(model, rows[:3], 14) is None for model in (mamba, bloom, neo.eval()))


def test_attention_without_a_mask_is_found_out():
    """A kernel that ignores the mask reads the tokens of other rows."""
    model = tiny_models.build("llama")
    forward = model.forward
    model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)
    assert packing_for(model, long_rows()[:3], 14) is None


def test_attention_that_takes_no_mask_is_not_tried():
    model = tiny_models.build("llama")
    model.forward = None
    model.config._attn_implementation = "flash_attention_2"
    assert packing_for(model, long_rows()[:3], 14) is None
