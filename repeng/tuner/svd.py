"""The leading singular triples of a weight."""

import torch
from torch import Tensor

OVERSAMPLING = 16


@torch.no_grad()
def top_singular_triples(weight: Tensor, r: int, niter: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U `(d_out r)`, S `(r)`, V `(d_in r)` of `weight (d_out d_in)`: exact if `niter` is 0, else randomised.

    The randomised SVD is that of Halko, Martinsson and Tropp (2011) with 16 extra directions. It runs with a forked
    random number generator, so the caller's random state does not change.
    """
    if niter == 0:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :r].contiguous(), s[:r].contiguous(), vh[:r].mT.contiguous()
    devices = [] if weight.device.type == "cpu" else [weight.device]
    with torch.random.fork_rng(devices=devices, device_type="cuda" if not devices else weight.device.type):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=min(r + OVERSAMPLING, *weight.shape), niter=niter)
    return u[:, :r].contiguous(), s[:r].contiguous(), v[:, :r].contiguous()


@torch.no_grad()
def subspace_error(weight: Tensor, u: Tensor) -> float:
    """‖W − U Uᵀ W‖ / ‖W‖ (Frobenius) of `weight (d_out d_in)` and orthonormal `u (d_out r)`."""
    total = weight.square().sum()
    return (1 - (u.mT @ weight).square().sum() / total).clamp_min(0).sqrt().item() if total > 0 else 0.0
