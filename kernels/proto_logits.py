"""logits = scale * unit(features) unit(prototypes)': one product in tiles, the norms from the same loads.

Letters: x features [B, D], p prototypes [C, D], z logits [B, C].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_B, BLOCK_C, BLOCK_D = 32, 32, 32


@triton.jit
def proto_logits_kernel(
    x_ptr,
    p_ptr,
    z_ptr,
    B,
    C,
    D,
    scale,
    zero_norm_squared,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # 64-bit row numbers: B * D and B * C pass 2^31 elements.
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    z = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    x_squared = tl.zeros((BLOCK_B,), tl.float32)
    p_squared = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d[None, :] < D
        x = tl.load(x_ptr + b[:, None] * D + d[None, :], mask=(b[:, None] < B) & inside, other=0.0)
        p = tl.load(p_ptr + c[:, None] * D + d[None, :], mask=(c[:, None] < C) & inside, other=0.0)
        x = x.to(tl.float32)
        p = p.to(tl.float32)
        z += tl.dot(x, tl.trans(p), input_precision=PRECISION)
        x_squared += tl.sum(x * x, axis=1)
        p_squared += tl.sum(p * p, axis=1)
    # A row without direction gives logits of 0.
    x_empty = x_squared <= zero_norm_squared
    p_empty = p_squared <= zero_norm_squared
    x_inverse = tl.where(x_empty, 0.0, 1.0 / tl.sqrt(tl.where(x_empty, 1.0, x_squared)))
    p_inverse = tl.where(p_empty, 0.0, 1.0 / tl.sqrt(tl.where(p_empty, 1.0, p_squared)))
    z = scale * ((z * x_inverse[:, None]) * p_inverse[None, :])
    tl.store(
        z_ptr + b[:, None] * C + c[None, :],
        z,
        mask=(b[:, None] < B) & (c[None, :] < C),
    )


def proto_logits_triton(
    features: Tensor, prototypes: Tensor, scale: float, zero_norm_squared: float
) -> Tensor:
    """[B, C] in the dtype of `features`, of contiguous or strided [B, D] and [C, D] on one device.

    A row whose squared norm is at most `zero_norm_squared` gives logits of 0.
    """
    x, p = features.contiguous(), prototypes.contiguous()
    (rows, dim), classes = x.shape, p.shape[0]
    logits = x.new_empty(rows, classes, dtype=torch.float32)
    if rows == 0:
        return logits.to(features.dtype)
    grid = (triton.cdiv(rows, BLOCK_B), triton.cdiv(classes, BLOCK_C))
    # torch's own switch decides whether float32 products may round their operands to TF32.
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    with torch.cuda.device_of(x):
        proto_logits_kernel[grid](
            x,
            p,
            logits,
            rows,
            classes,
            dim,
            float(scale),
            zero_norm_squared,
            PRECISION=precision,
            BLOCK_B=BLOCK_B,
            BLOCK_C=BLOCK_C,
            BLOCK_D=BLOCK_D,
        )
    return logits.to(features.dtype)
