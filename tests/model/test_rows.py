"""Rows that share a beginning give what they give alone."""

from functools import wraps

import pytest
import tiny_models
import torch

from repeng import steer
from repeng.model import rows as module
from repeng.model.logprob import has_plain_head
from repeng.model.rows import can_share, read_rows
from repeng.vectors.vector import SteeringVector

KINDS = ["llama", "gemma3-text", "gpt2", "mixtral"]


class Plain:
    """What padding needs of a tokenizer."""

    padding_side, pad_token_id, eos_token_id = "left", 0, 0


def some_rows(n=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, 60, (200,), generator=generator).tolist()
    starts = [drawn[:12], drawn[12:30], drawn[:10]]
    rows = [starts[i % 3] + drawn[40 + 5 * i : 43 + 5 * i + i % 4] for i in range(n)]
    spans = [(len(row) - 1 - i % 2, len(row)) for i, row in enumerate(rows)]
    return rows, spans


def logits(states, head, members):
    return head(states).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [0.0, 2.0])
def test_shared_beginnings_change_nothing(kind, c, monkeypatch):
    model = tiny_models.build(kind)
    vector = SteeringVector({("residual", 1): torch.randn(model.config.hidden_size)})
    rows, spans = some_rows()
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", wraps(forward)(lambda *a, **k: calls.append(k) or forward(*a, **k)))
    with torch.no_grad(), steer(model, c, vector=vector):
        alone = [forward(torch.tensor([row])).logits[0, slice(*span)] for row, span in zip(rows, spans, strict=True)]
        for plain in (False, has_plain_head(model, rows[0])):
            found = read_rows(model, Plain, rows, spans, logits, plain=plain, batch_size=4)
            for one, other in zip(alone, found, strict=True):
                assert torch.allclose(one, other, atol=1e-4)
    sizes = [call["input_ids"].numel() for call in calls if "input_ids" in call]
    assert sum(sizes) < 2 * sum(map(len, rows)) * 0.8, sizes


def test_what_depends_on_the_cut_is_not_shared():
    """A slice counted from the end of the prompt: the last token of a beginning is none of the text's."""
    model = tiny_models.build("llama")
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector({("residual", 1): 5 * torch.randn(model.config.hidden_size, generator=generator)})
    ids = some_rows()[0][0]
    with torch.no_grad():
        assert can_share(model, ids)
        with steer(model, 1.0, vector=vector):
            assert can_share(model, ids)
        with steer(model, 1.0, vector=vector, positions=slice(-1, None)):
            assert not can_share(model, ids)


def test_rows_with_little_in_common_go_together():
    groups = module._groups([[1, 2, 3], [4, 5], [1, 2, 9]], [(2, 3), (1, 2), (2, 3)], 2, share=True)
    assert [group.shared for group in groups] == [0, 0]
    assert sorted(i for group in groups for i in group.members) == [0, 1, 2]


def test_groups_share_what_saves_most():
    a, b = list(range(1, 21)), list(range(100, 130))
    rows = [*([*a, 50 + i] for i in range(4)), *([*b, 200 + i] for i in range(3)), [*a, 51, 9, 9]]
    groups = module._groups(rows, [(len(row) - 1, len(row)) for row in rows], 128, share=True)
    found = {tuple(sorted(group.members)): group.shared for group in groups}
    odd = [*rows, [*a[:10], 77, 78]]  # it has ten tokens in common with rows that share twenty
    joined = module._groups(odd, [(len(row) - 1, len(row)) for row in odd], 128, share=True)
    assert {tuple(sorted(group.members)): group.shared for group in joined} == {**found, (8,): 0}
    assert found == {(0, 1, 2, 3, 7): 20, (4, 5, 6): 30}
    whole = module._groups(rows, [(5, len(row)) for row in rows], 128, share=True)
    assert all(group.shared == 0 for group in whole)  # what is read must not lie in what is shared
    assert module._groups(rows, [(20, 21)] * 8, 3, share=False)[0].members == [0, 1, 7]
