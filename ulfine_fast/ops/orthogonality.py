"""Orthogonality of the textual prototypes: mean squared cosine of two different classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast import _cuda, _native
from ulfine_fast.backend import choose
from ulfine_fast.ops import _checks
from ulfine_fast.ops._handover import hand_over, keep, once
from ulfine_fast.ops._rows import unit_rows, without_autocast, working_dtype


@without_autocast
def orthogonality_reference(prototypes: Tensor) -> Tensor:
    """The definition; see `orthogonality`."""
    classes, dim = prototypes.shape
    dtype = working_dtype(prototypes)
    if classes == 1:
        # The sum over nothing, whatever the row holds, in its graph.
        return prototypes[:, :0].to(dtype).sum()
    unit = unit_rows(prototypes, dtype)
    if classes <= dim:
        diagonal = torch.eye(classes, dtype=torch.bool, device=unit.device)
        total = (unit @ unit.T).masked_fill(diagonal, 0.0).square().sum()
    else:
        # The same sum from the D x D side, C / D times cheaper.
        total = (unit.T @ unit).square().sum() - unit.square().sum(-1).square().sum()
    mean = total / (classes * (classes - 1))
    # Rounding may leave the range of a mean of squared cosines; its gradient stays.
    return mean + (mean.clamp(0.0, 1.0) - mean).detach()


torch.library.define("ulfine::_orthogonality", "(Tensor prototypes, str backend) -> (Tensor, Tensor)")


@torch.library.register_fake("ulfine::_orthogonality")
def _(prototypes, backend):
    return tuple(prototypes.new_empty(size, dtype=torch.float32) for size in ((), prototypes.shape))


@torch.library.impl("ulfine::_orthogonality", ("cpu", "cuda"))
def _(prototypes, backend):
    if backend == "triton":
        from ulfine_fast.kernels.orthogonality import orthogonality_triton

        return orthogonality_triton(prototypes)
    return (_cuda if backend == "cuda" else _native).orthogonality(prototypes)


class _Orthogonality(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prototypes, backend):
        value, gradient = torch.ops.ulfine._orthogonality.default(prototypes, backend)
        keep(ctx, [gradient], [prototypes])
        ctx.dtype, ctx.backend = prototypes.dtype, backend
        return value

    @staticmethod
    @once("orthogonality")
    def backward(ctx, grad):
        def again(tensors):
            return torch.ops.ulfine._orthogonality.default(*tensors, ctx.backend)[1:]

        (gradient,) = hand_over(ctx, grad, again)
        return gradient.to(ctx.dtype), None


def orthogonality(prototypes: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean squared off-diagonal cosine of the rows of `prototypes`, differentiable.

        value = ( ||P P'||_F^2 - sum_k |p_k|^4 ) / (C (C - 1)),   p_k = prototypes_k / |prototypes_k|

    0 for C = 1. For C > D it cannot reach 0: the floor is (C - D) / (D (C - 1)). Source: ULFine (arXiv 2505.05062)
    asks for orthogonal textual prototypes; the normalisation by C (C - 1) is our choice, it makes the weight of the
    term independent of the number of classes.

    Args:
        prototypes: [C, D] float, C >= 1; rows need not have unit norm. A zero row has cosine 0 with all.
        backend: None (the selected one), "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        Scalar in [0, 1], float32 (float64 for float64 input). Work and memory are those of a C x C or of a
        D x D product, whichever is smaller; the kernel sums in float64. A second
        derivative raises RuntimeError on a kernel.

    Raises:
        ValueError, TypeError: wrong shape or dtype. RuntimeError: the named back end cannot run.
    """
    _checks.bank("orthogonality", "prototypes", prototypes)
    chosen = choose("orthogonality", prototypes, len(prototypes), working_dtype(prototypes), backend)
    if chosen == "reference":
        return orthogonality_reference(prototypes)
    return _Orthogonality.apply(prototypes, chosen)
