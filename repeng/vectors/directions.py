"""The methods of `extract`: functions that compute a direction from the hidden states of both sides.

`chosen` and `rejected` are `(b d)`; row i of both belongs to pair i. `dHS = chosen − rejected`, and m is the mean of
dHS over the pairs. Each result is `(d)`, with + toward chosen. `extract` rescales every result to the length of m, so
c = 1 is an intervention of the same size for every method.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def mean_diff(chosen: Tensor, rejected: Tensor) -> Tensor:
    """`m`. Contrastive activation addition (CAA), arXiv 2312.06681, equation 1."""
    return (chosen - rejected).mean(dim=0)


def pca_diff(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Projection of m on the first principal component of dHS, after dHS is centred at its mean.

    The reading vector of representation engineering (arXiv 2310.01405), as vgel/repeng 0.4 computes it in "pca_diff".
    Because the mean is removed, the component is the direction along which pairs differ from each other, which is not
    always the direction along which the two sides differ.
    """
    dhs = chosen - rejected
    return _onto(_top_directions(dhs - dhs.mean(dim=0), 1), dhs)


def pca_center(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Projection of m on the first principal component of both sides, each pair centred at its midpoint.

    This is "pca_center" of vgel/repeng 0.4. The centred sides are ± dHS/2, so the result equals `svd` with k = 1.
    """
    dhs = chosen - rejected
    return _onto(_top_directions(torch.cat([dhs, -dhs]) / 2, 1), dhs)


def svd(chosen: Tensor, rejected: Tensor, *, k: int = 1, whiten: bool = False) -> Tensor:
    """Projection of m on the leading `k` right singular vectors of dHS `(b d)`, which is not centred.

    With `whiten`, coordinate j is `mean_j / std_j` instead of `mean_j`: directions along which the pairs agree get
    more weight, as in Fisher's linear discriminant.

    Raises:
        ValueError: `k` is not between 1 and the rank that dHS can have.
    """
    dhs = chosen - rejected
    _require_k(k, min(dhs.shape))
    directions = _top_directions(dhs, k)
    return _whitened(directions, dhs) if whiten else _onto(directions, dhs)


def weight_svd(chosen: Tensor, rejected: Tensor, basis: Tensor, *, k: int = 16) -> Tensor:
    """Projection of m on the `k` columns of `basis (d r)` with the largest mean |dHS U|.

    `basis` holds the left singular vectors U of the weight that writes to the site. For the residual stream, these are
    the weights of all modules that write to it in the layer. This is the S-space in which AntiPaSTO (arXiv 2601.07473)
    adapts.

    Raises:
        ValueError: `k` is not between 1 and r.
    """
    _require_k(k, basis.shape[1])
    dhs = chosen - rejected
    along = (dhs @ basis).mean(dim=0)
    strongest = along.abs().topk(k).indices
    return basis[:, strongest] @ along[strongest]


def gradient(chosen: Tensor, rejected: Tensor, descent: Tensor) -> Tensor:
    """The mean of `descent (n d)`, the negative gradients of a loss with respect to the activation of the site.

    This is gradient-to-steering mapping: to first order, the shift of the activation that lowers the loss most.
    """
    return descent.mean(dim=0)


def fisher(chosen: Tensor, rejected: Tensor, descent: Tensor, scores: Tensor, *, damping: float = 10.0) -> Tensor:
    """`(F + λI)⁻¹ · mean(descent)`: the natural gradient (Amari 1998).

    `F = scoresᵀ scores / n` estimates the Fisher information of the activation about the next token. The covariance of
    the random `scores (n d)` is this information. λ is `damping` times the mean eigenvalue of F.

    Raises:
        ValueError: `damping` is not above 0.
    """
    if damping <= 0:
        raise ValueError(f"damping must be above 0; got {damping}")
    mean = descent.mean(dim=0)
    n = scores.shape[0]
    strength = damping * scores.square().sum() / n / scores.shape[1]
    # Woodbury identity: solve the small system (n n), since there are usually fewer rows than dimensions.
    inner = scores @ scores.mT + n * strength * torch.eye(n)
    return (mean - scores.mT @ torch.linalg.solve(inner, scores @ mean)) / strength


METHODS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (mean_diff, pca_diff, pca_center, svd, weight_svd, gradient, fisher)
}


def _top_directions(rows: Tensor, k: int) -> Tensor:
    """The leading right singular vectors `(d k)` of `rows (b d)`."""
    return torch.linalg.svd(rows, full_matrices=False).Vh[:k].mT


def _onto(directions: Tensor, dhs: Tensor) -> Tensor:
    """The mean of `dhs (b d)`, projected on orthonormal `directions (d k)`. Their signs do not matter."""
    return directions @ (dhs @ directions).mean(dim=0)


def _whitened(directions: Tensor, dhs: Tensor) -> Tensor:
    """The sum of orthonormal `directions (d k)`, weighted by mean over standard deviation of `dhs` along them."""
    along = dhs @ directions
    return directions @ (along.mean(dim=0) / along.std(dim=0, correction=0).clamp_min(1e-6 * along.abs().max()))


def _require_k(k: int, most: int) -> None:
    """Raise ValueError unless `k` directions can be chosen."""
    if not 1 <= k <= most:
        raise ValueError(
            f"k must be from 1 to {most}, the largest rank for this site and the pairs that are not held out; got {k}"
        )
