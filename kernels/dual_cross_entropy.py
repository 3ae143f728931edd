"""Cross-entropy of labelled and strong rows over both branches, with its gradients in the same call.

Three products, which are the vendor's, and a pass over the rows of logits between them, where the gradient
overwrites the logits. Both branches are one bank, folded or stacked, so each product is made once. Storing the
logits beats computing them again: D multiplications cost more than one number read and written.

Letters: x features [B, D], u their directions, r inverse norms (both 0 for rows without part), g gradient for u,
y targets, w weights, a adjustment [G, C], k its row, z logits [B, banks * C], m largest logit of
a row, s sum of exp(z - m).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulfine_fast.kernels._bank import banks
from ulfine_fast.kernels._rows import (
    block_of,
    inverse_norm,
    load_tile,
    ordered_sum,
    product,
    store_tile,
    through_direction,
    unit_rows_backward,
)
from ulfine_fast.kernels._tiles import ROW_PASS, row_tile


@triton.jit
def load_used(y_ptr, w_ptr, b, B, C):
    # Which rows take part, and with which class and weight; the weight of the others may be NaN.
    y = tl.load(y_ptr + b, mask=b < B, other=-1)
    w = tl.load(w_ptr + b, mask=b < B, other=0.0).to(tl.float32)
    used = (y >= 0) & (y < C) & (w != 0.0)
    return used, tl.where(used, y, 0), w


@triton.jit
def used_unit_rows_kernel(
    x_ptr, y_ptr, w_ptr, u_ptr, r_ptr, B, C, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    b, d = block_of(0, ROWS), tl.arange(0, BLOCK_D)
    used, _, _ = load_used(y_ptr, w_ptr, b, B, C)
    # A row without part is zero in every product, even if it is not finite.
    x = tl.where(used[:, None], load_tile(x_ptr, b, d, B, D), 0.0)
    inverse = inverse_norm(tl.sum(x * x, axis=1))
    tl.store(r_ptr + b, inverse, mask=b < B)
    store_tile(u_ptr, b, d, B, D, x * inverse[:, None])


@triton.jit
def used_unit_rows_backward_kernel(
    g_ptr, u_ptr, r_ptr, dx_ptr, B, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    b, d = block_of(0, ROWS), tl.arange(0, BLOCK_D)
    g = load_tile(g_ptr, b, d, B, D)
    u = load_tile(u_ptr, b, d, B, D)
    inverse = tl.load(r_ptr + b, mask=b < B, other=0.0)
    store_tile(dx_ptr, b, d, B, D, through_direction(g, u, inverse))


@triton.jit
def shifted_logits(z_ptr, a_ptr, b, c, k, known, B, C, banks):
    inside = (b[:, None] < B) & (c[None, :] < C)
    z = tl.load(z_ptr + b[:, None] * (banks * C) + c[None, :], mask=inside, other=0.0)
    if a_ptr is not None:
        mask = inside & known[:, None]
        z += tl.load(a_ptr + k[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def cross_entropy_kernel(
    z_ptr,
    y_ptr,
    w_ptr,
    a_ptr,
    group_ptr,
    loss_ptr,
    B,
    C,
    G,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = block_of(0, ROWS)
    branch = tl.program_id(1).to(tl.int64)
    banks = tl.num_programs(1)
    z_ptr += branch * C
    used, y, w = load_used(y_ptr, w_ptr, b, B, C)
    k = tl.zeros((ROWS,), tl.int64)
    if group_ptr is not None:
        k = tl.load(group_ptr + b, mask=b < B, other=-1)
    known = (k >= 0) & (k < G)

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    target = tl.zeros((ROWS,), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        z = shifted_logits(z_ptr, a_ptr, b, c, k, known, B, C, banks)
        target += tl.sum(tl.where(c[None, :] == y[:, None], z, 0.0), axis=1)
        top = tl.maximum(m, tl.max(z, axis=1))
        # Minus infinity on both sides has no difference.
        anchor = tl.where(top == float("-inf"), 0.0, top)
        s = s * tl.exp(m - anchor) + tl.sum(tl.exp(z - anchor[:, None]), axis=1)
        m = top
    # The other order would lose every digit when the target's share is near 1.
    loss = tl.where(used, w * (tl.log(s) + (m - target)), 0.0)
    tl.store(loss_ptr + branch * B + b, loss, mask=b < B)

    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        z = shifted_logits(z_ptr, a_ptr, b, c, k, known, B, C, banks)
        share = tl.exp(z - m[:, None]) / s[:, None]
        dz = w[:, None] * (share - (c[None, :] == y[:, None]).to(tl.float32))
        inside = (b[:, None] < B) & (c[None, :] < C)
        dz = tl.where(used[:, None], dz, 0.0)
        tl.store(z_ptr + b[:, None] * (banks * C) + c[None, :], dz, mask=inside)


@triton.jit
def loss_kernel(row_ptr, loss_ptr, N, BLOCK: tl.constexpr):
    tl.store(loss_ptr, ordered_sum(row_ptr, N, BLOCK).to(tl.float32))


def dual_cross_entropy_triton(
    features: Tensor,
    targets: Tensor,
    linear: Tensor,
    prototypes: Tensor,
    weights: Tensor,
    adjustment: Tensor | None,
    group: Tensor | None,
    align: Tensor,
    eta: float,
    linear_scale: float,
    proto_scale: float,
    fused: bool,
    normalize_linear: bool,
    need_features: bool,
    need_linear: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients [B, D] and [C, D], all float32; [0] where not needed."""
    w, t = linear.contiguous(), prototypes.contiguous()
    with torch.cuda.device_of(w):
        made = banks(
            w, t, align, eta, linear_scale, proto_scale, normalize_linear, fold=fused, stack=not fused
        )
        on_linear = eta * linear_scale if fused else linear_scale
        return cross_entropy(
            features, targets, w, made.folded if fused else made.stacked, weights, adjustment, group, on_linear, normalize_linear,
            need_features, need_linear,
        )  # fmt: skip


def cross_entropy(
    features: Tensor,
    targets: Tensor,
    linear: Tensor,
    bank_rows: Tensor,
    weights: Tensor,
    adjustment: Tensor | None,
    group: Tensor | None,
    on_linear: float,
    normalize_linear: bool,
    need_features: bool,
    need_linear: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients from a bank [C, D] or [2C, D], in whose first rows the linear probe has `on_linear`."""
    x, y, weight = features.contiguous(), targets.contiguous(), weights.contiguous()
    shift, row_group = (None if tensor is None else tensor.contiguous() for tensor in (adjustment, group))
    (rows, dim), classes = x.shape, linear.shape[0]
    banks = len(bank_rows) // classes
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    row_loss = torch.empty((banks, rows), dtype=torch.float32, device=x.device)
    unit = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    row_tiles = row_tile(dim)
    row_grid = (triton.cdiv(rows, row_tiles[0]),)
    if rows:
        used_unit_rows_kernel[row_grid](x, y, weight, unit, inverse, rows, classes, dim, *row_tiles)
    z = product(unit, bank_rows.T)
    if rows:
        tile = row_tile(classes, ROW_PASS)
        cross_entropy_kernel[(triton.cdiv(rows, tile[0]), banks)](
            z,
            y,
            weight,
            shift,
            row_group,
            row_loss,
            rows,
            classes,
            0 if shift is None else len(shift),
            *tile,
        )
    loss_kernel[(1,)](row_loss, loss, row_loss.numel(), ROW_PASS)
    d_x, d_w = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2))
    if need_features:
        d_x = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        if rows:
            used_unit_rows_backward_kernel[row_grid](
                product(z, bank_rows), unit, inverse, d_x, rows, dim, *row_tiles
            )
    if need_linear:
        d_w = product(z[:, :classes].T, unit)
        d_w = unit_rows_backward(d_w, linear, on_linear) if normalize_linear else d_w.mul_(on_linear)
    return loss, d_x, d_w
