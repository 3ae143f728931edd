"""Pseudo-labels of weak rows: a product with the folded bank whose logits never leave the registers.

A program keeps (largest logit, its class, sum of exponentials) of its rows over a range of classes; a second
kernel merges the ranges in their order. Ranges depend on the number of classes alone, so a row's result does
not depend on the rest of its batch.

Letters: x features [B, D], e folded bank [C, D], a adjustment [C], z logits, m largest logit, k its class,
s sum of exp((z - m) / temperature), S ranges of classes, f factors of the branches [2, C], q sum of squared
deviations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulfine_fast.kernels._bank import banks
from ulfine_fast.kernels._rows import block_of, inverse_norm, load_tile
from ulfine_fast.kernels._tiles import product_tile

# Tiles of classes in a range, and from how many classes on. Few rows need many ranges to fill the device.
TILES_OF_RANGE = ((4096, 8), (0, 2))
# Rows that a program holds to merge ranges: many programs for the labels, one for the mean over all rows.
LABEL_ROWS, SCALE_ROWS = 128, 1024


@triton.jit
def logits_tile(x_ptr, e_ptr, b, c, B, C, D, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):
    z = tl.zeros((b.shape[0], c.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = load_tile(x_ptr, b, d, B, D)
        e = load_tile(e_ptr, c, d, C, D)
        z += tl.dot(x, tl.trans(e), input_precision=PRECISION)
    return z


@triton.jit
def inverse_norms(x_ptr, b, B, D, BLOCK_D: tl.constexpr):
    squared = tl.zeros((b.shape[0],), tl.float32)
    for start in range(0, D, BLOCK_D):
        x = load_tile(x_ptr, b, start + tl.arange(0, BLOCK_D), B, D)
        squared += tl.sum(x * x, axis=1)
    return inverse_norm(squared)


@triton.jit
def merge(m, k, s, other_m, other_k, other_s, inverse_temperature):
    # Strictly larger: of equal logits the earlier class stays. Minus infinity on both sides has no difference.
    k = tl.where(other_m > m, other_k, k)
    top = tl.maximum(m, other_m)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    s = s * tl.exp((m - anchor) * inverse_temperature)
    s += other_s * tl.exp((other_m - anchor) * inverse_temperature)
    return top, k, s


@triton.jit
def predict_kernel(
    x_ptr,
    e_ptr,
    a_ptr,
    m_ptr,
    k_ptr,
    s_ptr,
    B,
    C,
    D,
    inverse_temperature,
    RANGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = block_of(0, BLOCK_B)
    inverse = inverse_norms(x_ptr, b, B, D, BLOCK_D)
    m = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    k = tl.zeros((BLOCK_B,), tl.int64)
    s = tl.zeros((BLOCK_B,), tl.float32)
    first = tl.program_id(1) * RANGE
    for start in range(first, tl.minimum(first + RANGE, C), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        z = logits_tile(x_ptr, e_ptr, b, c, B, C, D, PRECISION, BLOCK_D) * inverse[:, None]
        if a_ptr is not None:
            z += tl.load(a_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        z = tl.where(c[None, :] < C, z, float("-inf"))
        top = tl.max(z, axis=1)
        lowest = tl.min(tl.where(z == top[:, None], c[None, :], C), axis=1)
        anchor = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp((z - anchor[:, None]) * inverse_temperature), axis=1)
        m, k, s = merge(m, k, s, top, lowest, total, inverse_temperature)
    at = tl.program_id(1).to(tl.int64) * B + b
    tl.store(m_ptr + at, m, mask=b < B)
    tl.store(k_ptr + at, k, mask=b < B)
    tl.store(s_ptr + at, s, mask=b < B)


@triton.jit
def label_kernel(
    m_ptr,
    k_ptr,
    s_ptr,
    threshold_ptr,
    label_ptr,
    confidence_ptr,
    keep_ptr,
    histogram_ptr,
    kept_ptr,
    B,
    S,
    inverse_temperature,
    PER_CLASS: tl.constexpr,
    ROWS: tl.constexpr,
):
    b = block_of(0, ROWS)
    inside = b < B
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    k = tl.zeros((ROWS,), tl.int64)
    s = tl.zeros((ROWS,), tl.float32)
    for split in range(S):
        at = tl.cast(split, tl.int64) * B + b
        other_m = tl.load(m_ptr + at, mask=inside, other=float("-inf"))
        other_k = tl.load(k_ptr + at, mask=inside, other=0)
        other_s = tl.load(s_ptr + at, mask=inside, other=0.0)
        m, k, s = merge(m, k, s, other_m, other_k, other_s, inverse_temperature)
    # A logit that is NaN or infinite makes the sum NaN; minus infinity everywhere leaves it 0.
    finite = inside & (s > 0.0)
    confidence = tl.where(finite, 1.0 / s, 0.0)
    k = tl.where(finite, k, 0)
    limit = tl.load(threshold_ptr + (k if PER_CLASS else k * 0), mask=inside, other=0.0).to(tl.float32)
    keep = finite & (confidence >= limit)
    tl.store(label_ptr + b, tl.where(finite, k, -1), mask=inside)
    tl.store(confidence_ptr + b, confidence, mask=inside)
    tl.store(keep_ptr + b, keep, mask=inside)
    one = tl.full((ROWS,), 1, tl.int64)
    tl.atomic_add(histogram_ptr + k, one, mask=finite, sem="relaxed")
    tl.atomic_add(kept_ptr + k, one, mask=keep, sem="relaxed")


@triton.jit
def merge_deviations(n, mean, q, other_n, other_mean, other_q):
    # Chan, Golub and LeVeque 1983: no sum of squares of what is far from its mean.
    count = n + other_n
    difference = other_mean - mean
    mean += difference * (other_n / count)
    q += other_q + difference * difference * (n * other_n / count)
    return count, mean, q


@triton.jit
def deviation_of_range(
    x_ptr, p_ptr, f_ptr, b, B, C, D, PRECISION: tl.constexpr, RANGE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    inverse = inverse_norms(x_ptr, b, B, D, BLOCK_D)
    n = 0.0
    mean = tl.zeros((b.shape[0],), tl.float32)
    q = tl.zeros((b.shape[0],), tl.float32)
    first = tl.program_id(1) * RANGE
    for start in range(first, tl.minimum(first + RANGE, C), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        inside = c[None, :] < C
        z = logits_tile(x_ptr, p_ptr, b, c, B, C, D, PRECISION, BLOCK_D) * inverse[:, None]
        z *= tl.load(f_ptr + c, mask=c < C, other=0.0)[None, :]
        classes = tl.minimum(C - start, BLOCK_C).to(tl.float32)
        tile_mean = tl.sum(tl.where(inside, z, 0.0), axis=1) / classes
        off = tl.where(inside, z - tile_mean[:, None], 0.0)
        n, mean, q = merge_deviations(n, mean, q, classes, tile_mean, tl.sum(off * off, axis=1))
    return mean, q


@triton.jit
def deviation_kernel(
    x_ptr,
    w_ptr,
    t_ptr,
    f_ptr,
    mean_ptr,
    q_ptr,
    B,
    C,
    D,
    RANGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = block_of(0, BLOCK_B)
    branch = tl.program_id(2).to(tl.int64)
    if branch == 0:
        mean, q = deviation_of_range(x_ptr, w_ptr, f_ptr, b, B, C, D, PRECISION, RANGE, BLOCK_C, BLOCK_D)
    else:
        mean, q = deviation_of_range(x_ptr, t_ptr, f_ptr + C, b, B, C, D, PRECISION, RANGE, BLOCK_C, BLOCK_D)
    at = (branch * tl.num_programs(1) + tl.program_id(1)) * B + b
    tl.store(mean_ptr + at, mean, mask=b < B)
    tl.store(q_ptr + at, q, mask=b < B)


@triton.jit
def deviations(mean_ptr, q_ptr, b, B, C, S, RANGE: tl.constexpr, ROWS: tl.constexpr):
    n = 0.0
    mean = tl.zeros((ROWS,), tl.float32)
    q = tl.zeros((ROWS,), tl.float32)
    for split in range(S):
        at = tl.cast(split, tl.int64) * B + b
        other_mean = tl.load(mean_ptr + at, mask=b < B, other=0.0)
        other_q = tl.load(q_ptr + at, mask=b < B, other=0.0)
        classes = tl.minimum(C - split * RANGE, RANGE).to(tl.float32)
        n, mean, q = merge_deviations(n, mean, q, classes, other_mean, other_q)
    return tl.sqrt(q / C)


@triton.jit
def branch_scale_kernel(mean_ptr, q_ptr, scale_ptr, B, C, S, RANGE: tl.constexpr, ROWS: tl.constexpr):
    # One program: the order of the rows is fixed.
    linear = tl.zeros((ROWS,), tl.float64)
    proto = tl.zeros((ROWS,), tl.float64)
    counted = tl.zeros((ROWS,), tl.float64)
    second = tl.cast(S, tl.int64) * B
    for start in range(0, B, ROWS):
        b = start + tl.arange(0, ROWS).to(tl.int64)
        zl = deviations(mean_ptr, q_ptr, b, B, C, S, RANGE, ROWS)
        zt = deviations(mean_ptr + second, q_ptr + second, b, B, C, S, RANGE, ROWS)
        finite = (b < B) & (zl < float("inf")) & (zt < float("inf"))
        linear += tl.where(finite, zl, 0.0).to(tl.float64)
        proto += tl.where(finite, zt, 0.0).to(tl.float64)
        counted += finite.to(tl.float64)
    rows = tl.maximum(tl.sum(counted, axis=0), 1.0)
    tl.store(scale_ptr, (tl.sum(linear, axis=0) / rows).to(tl.float32))
    tl.store(scale_ptr + 1, (tl.sum(proto, axis=0) / rows).to(tl.float32))


def pseudo_label_triton(
    features: Tensor,
    linear: Tensor,
    prototypes: Tensor,
    threshold: Tensor,
    align: Tensor,
    adjustment: Tensor | None,
    eta: float,
    linear_scale: float,
    proto_scale: float,
    temperature: float,
    normalize_linear: bool,
    scale_rows: int,
) -> tuple[Tensor, ...]:
    """The fields of `PseudoLabels`, of tensors on one device."""
    w, t = linear.contiguous(), prototypes.contiguous()
    with torch.cuda.device_of(w):
        scales = eta, linear_scale, proto_scale
        folded, _, factors = banks(w, t, align, *scales, normalize_linear, fold=True, stack=False)
        return labels(features, w, t, folded, factors, threshold, adjustment, temperature, scale_rows)


def labels(
    features: Tensor,
    linear: Tensor,
    prototypes: Tensor,
    folded: Tensor,
    factors: Tensor,
    threshold: Tensor,
    adjustment: Tensor | None,
    temperature: float,
    scale_rows: int,
) -> tuple[Tensor, ...]:
    """The fields of `PseudoLabels` from a folded bank, of contiguous banks on the current device."""
    x, limit = features.contiguous(), threshold.contiguous()
    shift = None if adjustment is None else adjustment.contiguous()
    (rows, dim), classes = x.shape, linear.shape[0]
    device = x.device
    label = torch.empty(rows, dtype=torch.int64, device=device)
    confidence = torch.empty(rows, dtype=torch.float32, device=device)
    keep = torch.empty(rows, dtype=torch.bool, device=device)
    histogram = torch.zeros(classes, dtype=torch.int64, device=device)
    kept_histogram = torch.zeros(classes, dtype=torch.int64, device=device)
    branch_scale = torch.zeros(2, dtype=torch.float32, device=device)

    tile = product_tile()
    span = tile["BLOCK_C"] * next(tiles for least, tiles in TILES_OF_RANGE if classes >= least)
    ranges = triton.cdiv(classes, span)
    if rows:
        largest, total = (torch.empty((ranges, rows), dtype=torch.float32, device=device) for _ in range(2))
        winner = torch.empty((ranges, rows), dtype=torch.int64, device=device)
        grid = (triton.cdiv(rows, tile["BLOCK_B"]), ranges)
        inverse_temperature = 1.0 / temperature
        predict_kernel[grid](
            x, folded, shift, largest, winner, total, rows, classes, dim, inverse_temperature, span, **tile
        )
        label_kernel[(triton.cdiv(rows, LABEL_ROWS),)](
            largest,
            winner,
            total,
            limit,
            label,
            confidence,
            keep,
            histogram,
            kept_histogram,
            rows,
            ranges,
            inverse_temperature,
            limit.numel() > 1,
            LABEL_ROWS,
        )
    measured = min(scale_rows, rows)
    if measured:
        mean, squares = (
            torch.empty((2, ranges, measured), dtype=torch.float32, device=device) for _ in range(2)
        )
        grid = (triton.cdiv(measured, tile["BLOCK_B"]), ranges, 2)
        deviation_kernel[grid](
            x, linear, prototypes, factors, mean, squares, measured, classes, dim, span, **tile
        )
        branch_scale_kernel[(1,)](mean, squares, branch_scale, measured, classes, ranges, span, SCALE_ROWS)
    return label, confidence, keep, histogram, kept_histogram, branch_scale
