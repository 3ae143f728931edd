"""Class means of the labelled rows, running visual prototypes, and the step of the text towards them.

A program looks for the rows of its class among the targets, so sums need no atomics and have a fixed order.
Only classes that are present in the batch are touched.

Letters: x features [B, D], y targets, h histogram [C], t textual and v visual prototypes [C, D], seen [C],
p distribution [C], l its largest share. A rate comes with what it leaves of 1, of which a float32 rate near 1 leaves
hardly a correct digit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulfine_fast.kernels._rows import ZERO_NORM_SQUARED, inverse_norm, ordered_sum
from ulfine_fast.kernels._tiles import ROW_PASS, row_tile

# Norm of the blended prototype below which the old one stays.
SMALLEST_BLEND = tl.constexpr(1e-6)


@triton.jit
def distribution_kernel(h_ptr, p_ptr, l_ptr, C, gamma, gamma_rest, BLOCK: tl.constexpr):
    # One program: every share needs the sum of all counts.
    total = ordered_sum(h_ptr, C, BLOCK).to(tl.float32)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    invalid = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        h = tl.load(h_ptr + c, mask=c < C, other=0).to(tl.float32)
        p = tl.load(p_ptr + c, mask=c < C, other=0.0)
        if total > 0.0:
            p = gamma * p + gamma_rest * (h / total)
            tl.store(p_ptr + c, p, mask=c < C)
        largest = tl.maximum(largest, p)
        invalid += (p != p).to(tl.int32)
    # A maximum may or may not pass NaN on; here it does.
    found = tl.where(tl.sum(invalid, axis=0) > 0, float("nan"), tl.max(largest, axis=0))
    tl.store(l_ptr, found)


@triton.jit
def fit_kernel(
    x_ptr,
    y_ptr,
    t_ptr,
    v_ptr,
    seen_ptr,
    p_ptr,
    l_ptr,
    B,
    D,
    mu,
    beta,
    beta_rest,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    count = 0
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, B, ROWS):
        b = start + tl.arange(0, ROWS).to(tl.int64)
        mine = tl.load(y_ptr + b, mask=b < B, other=-1) == k
        found = tl.sum(mine.to(tl.int32), axis=0)
        if found > 0:
            x = tl.load(x_ptr + b[:, None] * D + d[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
            x = x.to(tl.float32)
            mean += tl.sum(x * inverse_norm(tl.sum(x * x, axis=1))[:, None], axis=0)
            count += found
    if count > 0:
        mean = mean / count
        seen = tl.load(seen_ptr + k)
        v = tl.load(v_ptr + k * D + d, mask=inside, other=0.0)
        v = tl.where(seen, beta * v + beta_rest * mean, mean)
        tl.store(v_ptr + k * D + d, v, mask=inside)
        # Every warp reads the mark that one of them sets.
        tl.debug_barrier()
        tl.store(seen_ptr + k, True)

        largest = tl.load(l_ptr)
        alpha = tl.where(largest > 0.0, mu * (tl.load(p_ptr + k) / largest), 0.0)
        t = tl.load(t_ptr + k * D + d, mask=inside, other=0.0)
        v_squared = tl.sum(v * v, axis=0)
        t_unit = t * inverse_norm(tl.sum(t * t, axis=0))
        blend = (1.0 - alpha) * t_unit + alpha * (v * inverse_norm(v_squared))
        norm = tl.sqrt(tl.sum(blend * blend, axis=0))
        # Whatever is not finite has made the norm NaN, which compares false.
        if (v_squared > ZERO_NORM_SQUARED) & (norm >= SMALLEST_BLEND):
            tl.store(t_ptr + k * D + d, blend / norm, mask=inside)


def proto_fit_triton_(
    features: Tensor,
    targets: Tensor,
    histogram: Tensor,
    textual: Tensor,
    visual: Tensor,
    seen: Tensor,
    distribution: Tensor,
    mu: float,
    beta: float,
    gamma: float,
) -> None:
    """Write the new state into `textual`, `visual`, `seen` and `distribution`, which are contiguous float32."""
    x, y, mass = features.contiguous(), targets.contiguous(), histogram.contiguous()
    (rows, dim), classes = x.shape, textual.shape[0]
    largest = torch.empty((), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        distribution_kernel[(1,)](mass, distribution, largest, classes, float(gamma), 1.0 - gamma, ROW_PASS)
        fit_kernel[(classes,)](
            x,
            y,
            textual,
            visual,
            seen,
            distribution,
            largest,
            rows,
            dim,
            float(mu),
            float(beta),
            1.0 - beta,
            *row_tile(dim),
        )
