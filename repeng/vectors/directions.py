"""From hidden states of both sides to one direction: the methods of `extract`, as functions of tensors.

`chosen` and `rejected` are `(b d)`, row for row of one pair; `dHS = chosen − rejected`, and m is its mean over the
pairs. Each result is `(d)`, + toward chosen; `extract` gives all of them the length of m, so that c = 1 is
an intervention of one size.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def mean_diff(chosen: Tensor, rejected: Tensor) -> Tensor:
    """`m`. Contrastive activation addition (CAA), arXiv 2312.06681, equation 1."""
    return (chosen - rejected).mean(dim=0)


def pca_diff(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Projection of m on the first principal component of dHS, its mean removed first.

    The reading vector of representation engineering (arXiv 2310.01405) as vgel/repeng 0.4 computes it in "pca_diff".
    As the mean is removed, it finds where pairs disagree with one another, which is not always where the sides differ.
    """
    dhs = chosen - rejected
    return _onto(_top_directions(dhs - dhs.mean(dim=0), 1), dhs)


def pca_center(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Projection of m on the first principal component of both sides, each pair centred at its midpoint.

    vgel/repeng 0.4, "pca_center". The centred sides are ± dHS/2, so that this is `svd` with k = 1.
    """
    dhs = chosen - rejected
    return _onto(_top_directions(torch.cat([dhs, -dhs]) / 2, 1), dhs)


def svd(chosen: Tensor, rejected: Tensor, *, k: int = 1, whiten: bool = False) -> Tensor:
    """Projection of m on the leading `k` right singular vectors of dHS `(b d)`, which is not centred.

    With `whiten`, coordinate j counts `mean_j / std_j` instead of `mean_j`: directions along which the pairs agree
    weigh more, as in Fisher's linear discriminant.

    Raises:
        ValueError: `k` is not between 1 and the rank that dHS can have.
    """
    dhs = chosen - rejected
    _require_k(k, min(dhs.shape))
    directions = _top_directions(dhs, k)
    return _whitened(directions, dhs) if whiten else _onto(directions, dhs)


def weight_svd(chosen: Tensor, rejected: Tensor, basis: Tensor, *, k: int = 16) -> Tensor:
    """Projection of m on the `k` columns of `basis (d r)` with the largest mean |dHS U|.

    `basis` are the left singular vectors U of the weight that writes the site (for the residual stream, of all that
    write to it in the layer): the S-space in which AntiPaSTO (arXiv 2601.07473) adapts.

    Raises:
        ValueError: `k` is not between 1 and r.
    """
    _require_k(k, basis.shape[1])
    dhs = chosen - rejected
    along = (dhs @ basis).mean(dim=0)
    strongest = along.abs().topk(k).indices
    return basis[:, strongest] @ along[strongest]


def gradient(chosen: Tensor, rejected: Tensor, descent: Tensor) -> Tensor:
    """The mean of `descent (n d)`, minus the gradient of a loss with respect to the site.

    The first-order answer to "which shift of the activation lowers this loss most": gradient-to-steering mapping.
    """
    return descent.mean(dim=0)


def fisher(chosen: Tensor, rejected: Tensor, descent: Tensor, scores: Tensor, *, damping: float = 10.0) -> Tensor:
    """`(F + λI)⁻¹ · mean(descent)`: the natural gradient (Amari 1998).

    `F = scoresᵀ scores / n` estimates the Fisher information of the activation about the next token, from random
    `scores (n d)` with that covariance; λ is `damping` times its mean eigenvalue.

    Raises:
        ValueError: `damping` is not above 0.
    """
    if damping <= 0:
        raise ValueError(f"damping must be above 0; got {damping}")
    mean = descent.mean(dim=0)
    n = scores.shape[0]
    strength = damping * scores.square().sum() / n / scores.shape[1]
    # Woodbury: with fewer rows than dimensions, the small system (n n) is the one to solve.
    inner = scores @ scores.mT + n * strength * torch.eye(n)
    return (mean - scores.mT @ torch.linalg.solve(inner, scores @ mean)) / strength


METHODS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (mean_diff, pca_diff, pca_center, svd, weight_svd, gradient, fisher)
}


def _top_directions(rows: Tensor, k: int) -> Tensor:
    """The leading right singular vectors `(d k)` of `rows (b d)`."""
    return torch.linalg.svd(rows, full_matrices=False).Vh[:k].mT


def _onto(directions: Tensor, dhs: Tensor) -> Tensor:
    """The mean of `dhs (b d)` projected on orthonormal `directions (d k)`, which also settles their signs."""
    return directions @ (dhs @ directions).mean(dim=0)


def _whitened(directions: Tensor, dhs: Tensor) -> Tensor:
    """The sum of orthonormal `directions (d k)`, weighted by mean over standard deviation of `dhs` along them."""
    along = dhs @ directions
    return directions @ (along.mean(dim=0) / along.std(dim=0, correction=0).clamp_min(1e-6 * along.abs().max()))


def _require_k(k: int, most: int) -> None:
    """Raise ValueError unless `k` directions can be chosen."""
    if not 1 <= k <= most:
        raise ValueError(
            f"k must be from 1 to {most}, the rank that the site and the pairs (held-out ones apart) leave; got {k}"
        )
