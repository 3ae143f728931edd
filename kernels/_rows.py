"""What happens to whole rows: loading them, their direction, the gradient through it, an ordered sum.

Letters: x rows [N, D], y = x / |x| their directions, g gradient for y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulfine_fast.kernels._tiles import row_tile

# Squared norm at or below which a row has no direction.
ZERO_NORM_SQUARED = tl.constexpr(1e-12)


@triton.jit
def block_of(axis: tl.constexpr, SIZE: tl.constexpr):
    # 64-bit numbers of rows: times the length of a row they pass 2^31.
    return tl.program_id(axis).to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def load_tile(x_ptr, n, d, N, D):
    inside = (n[:, None] < N) & (d[None, :] < D)
    return tl.load(x_ptr + n[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(x_ptr, n, d, N, D, x):
    tl.store(x_ptr + n[:, None] * D + d[None, :], x, mask=(n[:, None] < N) & (d[None, :] < D))


@triton.jit
def inverse_norm(squared):
    # NaN for a row with a NaN.
    empty = squared <= ZERO_NORM_SQUARED
    return tl.where(empty, 0.0, 1.0 / tl.sqrt(tl.where(empty, 1.0, squared)))


@triton.jit
def through_direction(g, y, inverse):
    radial = tl.sum(g * y, axis=1)
    dx = (g - radial[:, None] * y) * inverse[:, None]
    # A row without direction gets no gradient, whatever came back to it; an infinite one, whose inverse norm is 0
    # as well and whose y is NaN, gets NaN.
    empty = (inverse == 0.0) & (tl.sum(y, axis=1) == 0.0)
    return tl.where(empty[:, None], 0.0, dx)


@triton.jit
def unit_rows_kernel(x_ptr, y_ptr, N, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    n, d = block_of(0, ROWS), tl.arange(0, BLOCK_D)
    x = load_tile(x_ptr, n, d, N, D)
    store_tile(y_ptr, n, d, N, D, x * inverse_norm(tl.sum(x * x, axis=1))[:, None])


@triton.jit
def unit_rows_backward_kernel(g_ptr, x_ptr, dx_ptr, N, D, factor, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    n, d = block_of(0, ROWS), tl.arange(0, BLOCK_D)
    g = load_tile(g_ptr, n, d, N, D)
    x = load_tile(x_ptr, n, d, N, D)
    inverse = inverse_norm(tl.sum(x * x, axis=1))
    dx = factor * through_direction(g, x * inverse[:, None], inverse)
    store_tile(dx_ptr, n, d, N, D, dx)


@triton.jit
def ordered_sum(x_ptr, N, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + n, mask=n < N, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


def unit_rows(rows: Tensor) -> Tensor:
    """[N, D] float32: contiguous `rows` divided by their norm, zero where they have no direction."""
    count, dim = rows.shape
    unit = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    if count:
        tile = row_tile(dim)
        unit_rows_kernel[(triton.cdiv(count, tile[0]),)](rows, unit, count, dim, *tile)
    return unit


def unit_rows_backward(grad: Tensor, rows: Tensor, factor: float) -> Tensor:
    """[N, D] float32: `factor` times the gradient for contiguous `rows`, of that for their directions."""
    count, dim = rows.shape
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    if count:
        tile = row_tile(dim)
        unit_rows_backward_kernel[(triton.cdiv(count, tile[0]),)](
            grad, rows, out, count, dim, float(factor), *tile
        )
    return out


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in float32, IEEE or TF32 as torch's own switch says."""
    # Plain products are the vendor's: nothing is fused to them. Autocast does not reach one with `out`.
    out = torch.empty((left.shape[0], right.shape[1]), dtype=torch.float32, device=left.device)
    return torch.mm(left, right, out=out)
