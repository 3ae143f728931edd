"""logits = scale * unit(features) unit(prototypes)': one product in tiles, the norms from the same loads.

Letters: x features [B, D], p prototypes [C, D], z logits [B, C].
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
    product,
    store_tile,
    unit_rows,
    unit_rows_backward,
)
from ulfine_fast.kernels._tiles import product_tile


@triton.jit
def proto_logits_kernel(
    x_ptr,
    p_ptr,
    z_ptr,
    B,
    C,
    D,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, c = block_of(0, BLOCK_B), block_of(1, BLOCK_C)
    z = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    x_squared = tl.zeros((BLOCK_B,), tl.float32)
    p_squared = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = load_tile(x_ptr, b, d, B, D)
        p = load_tile(p_ptr, c, d, C, D)
        z += tl.dot(x, tl.trans(p), input_precision=PRECISION)
        x_squared += tl.sum(x * x, axis=1)
        p_squared += tl.sum(p * p, axis=1)
    z = scale * ((z * inverse_norm(x_squared)[:, None]) * inverse_norm(p_squared)[None, :])
    store_tile(z_ptr, b, c, B, C, z)


def proto_logits_triton(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    """[B, C] in the dtype of `features`, of [B, D] and [C, D] on one device."""
    x, p = features.contiguous(), prototypes.contiguous()
    (rows, dim), classes = x.shape, p.shape[0]
    # Rounded by torch at the end: to bfloat16 the interpreter of Triton truncates.
    logits = torch.empty((rows, classes), dtype=torch.float32, device=x.device)
    if rows == 0:
        return logits.to(features.dtype)
    tile = product_tile()
    grid = (triton.cdiv(rows, tile["BLOCK_B"]), triton.cdiv(classes, tile["BLOCK_C"]))
    with torch.cuda.device_of(x):
        proto_logits_kernel[grid](x, p, logits, rows, classes, dim, float(scale), **tile)
    return logits.to(features.dtype)


def proto_logits_backward_triton(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scale: float,
    need_features: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients [B, D] and [C, D] in the dtypes of `features` and `prototypes`; [0] where not needed."""
    g, x, p = grad.float(), features.contiguous(), prototypes.contiguous()
    d_x, d_p = (torch.empty(0, dtype=t.dtype, device=t.device) for t in (x, p))
    with torch.cuda.device_of(x):
        if need_features:
            d_x = unit_rows_backward(product(g, unit_rows(p)), x, scale).to(x.dtype)
        if need_prototypes:
            d_p = unit_rows_backward(product(g.T, unit_rows(x)), p, scale).to(p.dtype)
    return d_x, d_p
