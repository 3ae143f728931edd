"""Mean squared off-diagonal cosine of the rows and its gradient, from the C x C or the D x D Gram matrix.

With unit rows u the value is (sum_ij <u_i, u_j>^2 - sum_i |u_i|^4) / (C (C - 1)) and its gradient in u_i
is 4 (sum_j <u_i, u_j> u_j - radial part) / (C (C - 1)); both Gram matrices give the same sums.

Letters: p prototypes [C, D], u unit prototypes, g Gram matrix [N, N], q its squares per program, f sums |u|^4
per program. Sums are in float64: what is off the diagonal may be far smaller than what is on it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulfine_fast.kernels._rows import (
    block_of,
    inverse_norm,
    load_tile,
    ordered_sum,
    product,
    store_tile,
    unit_rows_backward,
)
from ulfine_fast.kernels._tiles import ROW_PASS, row_tile


@triton.jit
def unit_kernel(p_ptr, u_ptr, f_ptr, C, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    c, d = block_of(0, ROWS), tl.arange(0, BLOCK_D)
    p = load_tile(p_ptr, c, d, C, D)
    u = p * inverse_norm(tl.sum(p * p, axis=1))[:, None]
    store_tile(u_ptr, c, d, C, D, u)
    squared = tl.sum(u.to(tl.float64) * u.to(tl.float64), axis=1)
    tl.store(f_ptr + tl.program_id(0), tl.sum(squared * squared, axis=0))


@triton.jit
def squares_kernel(g_ptr, q_ptr, N, OF_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    n = block_of(0, ROWS)
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, N, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N).to(tl.int64)
        g = load_tile(g_ptr, n, k, N, N)
        if OF_ROWS:
            # A row's product with itself is radial: dropping it here keeps it out of a sum it would dominate.
            g = tl.where(n[:, None] == k[None, :], 0.0, g)
            store_tile(g_ptr, n, k, N, N, g)
        total += tl.sum(g.to(tl.float64) * g.to(tl.float64), axis=1)
    tl.store(q_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def value_kernel(
    q_ptr, f_ptr, value_ptr, squares, fourths, pairs, OF_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    total = ordered_sum(q_ptr, squares, BLOCK)
    if not OF_ROWS:
        total -= ordered_sum(f_ptr, fourths, BLOCK)
    # Rounding may leave the range of a mean of squared cosines; NaN passes.
    mean = total / pairs
    mean = tl.where(mean < 0.0, 0.0, tl.where(mean > 1.0, 1.0, mean))
    tl.store(value_ptr, mean.to(tl.float32))


def orthogonality_triton(
    prototypes: Tensor, weight: float = 1.0, need_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Value, and `weight` times its gradient [C, D] ([0] where not needed), both float32."""
    p = prototypes.contiguous()
    classes, dim = p.shape
    of_rows, side = classes <= dim, min(classes, dim)
    pairs = max(classes * (classes - 1), 1)
    unit_tile, gram_tile = row_tile(dim), row_tile(side, ROW_PASS)
    fourths, squares = triton.cdiv(classes, unit_tile[0]), triton.cdiv(side, gram_tile[0])
    value = torch.empty((), dtype=torch.float32, device=p.device)
    unit = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    fourth = torch.empty(fourths, dtype=torch.float64, device=p.device)
    square = torch.empty(squares, dtype=torch.float64, device=p.device)
    gradient = torch.empty(0, dtype=torch.float32, device=p.device)
    with torch.cuda.device_of(p):
        unit_kernel[(fourths,)](p, unit, fourth, classes, dim, *unit_tile)
        gram = product(unit, unit.T) if of_rows else product(unit.T, unit)
        squares_kernel[(squares,)](gram, square, side, of_rows, *gram_tile)
        value_kernel[(1,)](square, fourth, value, squares, fourths, pairs, of_rows, ROW_PASS)
        if need_gradient and classes == 1:
            # There is no pair, whatever the row holds.
            gradient = torch.zeros_like(unit)
        elif need_gradient:
            towards = product(gram, unit) if of_rows else product(unit, gram)
            gradient = unit_rows_backward(towards, p, 4.0 * weight / pairs)
    return value, gradient
