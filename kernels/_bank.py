"""Banks of class rows that logits are products with: both branches folded into one, or one below the other.

    e_k = eta * linear_scale * w_k + (1 - eta) * align * proto_scale * t_k
    b_k = linear_scale * w_k,  b_{C+k} = proto_scale * t_k

Letters: w linear probe [C, D] (rows of unit norm unless it is a plain one), t unit prototypes [C, D], e folded bank
[C, D], b stacked bank [2C, D], rest 1 - eta, f factors [2, C] that make logits of the rows of either branch as they
are stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulfine_fast.kernels._rows import block_of, inverse_norm, load_tile, store_tile
from ulfine_fast.kernels._tiles import row_tile


@triton.jit
def bank_kernel(
    w_ptr,
    t_ptr,
    align_ptr,
    e_ptr,
    b_ptr,
    f_ptr,
    C,
    D,
    eta,
    rest,
    linear_scale,
    proto_scale,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    c, d = block_of(0, ROWS), tl.arange(0, BLOCK_D)
    w = load_tile(w_ptr, c, d, C, D)
    t = load_tile(t_ptr, c, d, C, D)
    w_factor = tl.zeros((ROWS,), tl.float32) + linear_scale
    if NORMALIZE:
        w_factor *= inverse_norm(tl.sum(w * w, axis=1))
    t_factor = proto_scale * inverse_norm(tl.sum(t * t, axis=1))
    tl.store(f_ptr + c, w_factor, mask=c < C)
    tl.store(f_ptr + C + c, t_factor, mask=c < C)
    w *= w_factor[:, None]
    t *= t_factor[:, None]
    if e_ptr is not None:
        align = tl.load(align_ptr).to(tl.float32)
        store_tile(e_ptr, c, d, C, D, eta * w + rest * align * t)
    if b_ptr is not None:
        store_tile(b_ptr, c, d, C, D, w)
        store_tile(b_ptr + tl.cast(C, tl.int64) * D, c, d, C, D, t)


class Banks(NamedTuple):
    """What one launch makes of both branches."""

    folded: Tensor | None  # [C, D]
    stacked: Tensor | None  # [2C, D]
    factors: Tensor  # [2, C]


def banks(
    linear: Tensor,
    prototypes: Tensor,
    align: Tensor,
    eta: float,
    linear_scale: float,
    proto_scale: float,
    normalize_linear: bool,
    *,
    fold: bool,
    stack: bool,
) -> Banks:
    """The banks that are wanted, of contiguous tensors."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=linear.device)

    classes, dim = linear.shape
    made = Banks(
        empty(classes, dim) if fold else None, empty(2 * classes, dim) if stack else None, empty(2, classes)
    )
    tile = row_tile(dim)
    bank_kernel[(triton.cdiv(classes, tile[0]),)](
        linear,
        prototypes,
        align,
        *made,
        classes,
        dim,
        float(eta),
        # A float32 eta near 1 would leave hardly a correct digit.
        1.0 - eta,
        float(linear_scale),
        float(proto_scale),
        normalize_linear,
        *tile,
    )
    return made
