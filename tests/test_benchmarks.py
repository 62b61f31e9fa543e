"""What the benchmarks compare does what it says."""

import pytest
import torch

from benchmarks import loss_forms


@pytest.mark.parametrize("name", loss_forms.FORMS)
def test_every_form_of_the_loss_pushes_from_the_start(name):
    """Where policy and reference are the same, the first step goes + at plus and − (or narrows the gap) at minus."""
    generator = torch.Generator().manual_seed(0)
    hs_ref = torch.randn(2, 3, 4, 8, generator=generator)
    hs_pi = torch.stack([hs_ref, hs_ref]).requires_grad_()
    logp = torch.randn(3, 5, generator=generator)
    ones = torch.ones(3, 5, dtype=torch.bool)
    result = loss_forms.FORMS[name].loss(
        hs_pi=hs_pi, hs_ref=hs_ref, hs_mask=torch.ones(2, 3, 4, dtype=torch.bool),
        logp_pi=logp.expand(2, 3, 5), logp_ref=logp.expand(2, 3, 5), logp_mask=ones.expand(2, 3, 5),
        neutral_logp_pi=logp.expand(2, 3, 5), neutral_logp_ref=logp, neutral_mask=ones,
        direction=torch.eye(8)[:, :1], scale=torch.ones(1), separation_target=20.0, coherence_margin=0.1,
        coherence_weight=30.0,
    )  # fmt: skip
    push = -torch.autograd.grad(result.loss, hs_pi)[0][..., 0]
    assert (push[0, 0] > 0).all()
    assert (push[1, 1] > 0).all() if name == "gap, unbounded" else (push[1].sum(dim=0) < 0).all()
