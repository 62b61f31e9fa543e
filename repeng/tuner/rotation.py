"""Cayley rotations of all sites of a model: one batched solve forward, no solve in the backward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _skew(triangles: Tensor, r: int) -> Tensor:
    """Skew matrices `(… r r)` in float32 from their upper triangles `(… r(r−1)/2)`."""
    rows, cols = torch.triu_indices(r, r, 1, device=triangles.device)
    upper = triangles.new_zeros((*triangles.shape[:-1], r, r), dtype=torch.float32)
    upper[..., rows, cols] = triangles.float()
    return upper - upper.mT


def rotation(triangle: Tensor, coefficient: Tensor, r: int) -> Tensor:
    """Cayley rotations `R(c) = (I − cA/2)⁻¹ (I + cA/2)`, `(… n r r)` in float32 for coefficients `(n,)`.

    A is the skew matrix with the upper triangle `triangle (… r(r−1)/2)`. R(−c) = R(c)ᵀ; the derivative at c = 0 is A.
    A plane of A with eigenvalues ±iω turns by 2 arctan(cω/2), which is less than 180°.
    """
    half = coefficient[:, None, None] * _skew(triangle, r)[..., None, :, :] / 2
    eye = torch.eye(r, device=triangle.device)
    return torch.linalg.solve(eye - half, eye + half)


class Rotations(torch.autograd.Function):
    """`rotation` of many triangles at once: one solve per distinct |c|, since R(−c) = R(c)ᵀ.

    With `R = M (I + cA/2)` and `M = (I − cA/2)⁻¹ = (I + R)/2`, the differential is `dR = c/4 (I + R) dA (I + R)`.
    The backward pass is therefore two matrix products. The rotations are stored as attributes of the context, not as
    saved tensors: activation checkpointing may run this backward pass once per layer, and the first run would free
    saved tensors.
    """

    @staticmethod
    def forward(ctx: Any, coefficient: Tensor, magnitude: Tensor, which: Tensor, r: int, *triangles: Tensor) -> Any:
        """Rotations `(n r r)`, one tensor for each of `triangles`.

        Args:
            coefficient: distinct coefficients, `(n,)`.
            magnitude: distinct |c|, `(a,)`.
            which: index into `magnitude` for each coefficient, `(n,)`.
            r: the rank.
            triangles: upper triangles `(r(r−1)/2)`, all on one device.
        """
        turn = rotation(torch.stack(triangles), magnitude, r)[:, which]
        turn = torch.where((coefficient < 0)[:, None, None], turn.mT, turn)
        ctx.coefficient, ctx.turn, ctx.r = coefficient, turn, r
        ctx.set_materialize_grads(False)
        return turn.unbind(0)

    # The annotation of `once_differentiable` does not allow `ctx` as a keyword argument.
    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> Any:
        reached = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
        result: list[Tensor | None] = [None] * len(gradients)
        if reached:
            near = torch.eye(ctx.r, device=ctx.turn.device) + ctx.turn[list(reached)]
            outer = near.mT @ torch.stack([gradient.float() for gradient in reached.values()]) @ near.mT
            of_skew = (ctx.coefficient[:, None, None] / 4 * outer).sum(dim=1)
            rows, cols = torch.triu_indices(ctx.r, ctx.r, 1, device=ctx.turn.device)
            of_triangle = (of_skew - of_skew.mT)[:, rows, cols]
            for i, gradient in zip(reached, of_triangle, strict=True):
                result[i] = gradient
        return None, None, None, None, *result


def can_be_batched(triangles: Sequence[Tensor], r: int) -> bool:
    """Whether the triangles are unsharded and share one device and one dtype."""
    whole = all(type(t.data) is Tensor and t.numel() == r * (r - 1) // 2 for t in triangles)
    return whole and len({(t.device, t.dtype) for t in triangles}) == 1
