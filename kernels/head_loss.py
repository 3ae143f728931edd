"""One step's loss in one call: pseudo-labels, both cross-entropies, orthogonality.

Calls the kernels of the three ops; its own work is to say which row has which target and weight, and to make
both banks in one launch.

Letters: L labelled rows, U weak rows, B labelled and strong rows, y targets, k labels of the weak rows,
a adjustments [2, C] of labelled and strong rows, w weights, g groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulfine_fast.kernels._bank import banks
from ulfine_fast.kernels._rows import block_of
from ulfine_fast.kernels.dual_cross_entropy import cross_entropy
from ulfine_fast.kernels.orthogonality import orthogonality_triton
from ulfine_fast.kernels.pseudo_label import labels

# Rows, and classes, that a program holds.
BLOCK = 256


@triton.jit
def step_rows_kernel(
    labelled_ptr,
    k_ptr,
    keep_ptr,
    labelled_shift_ptr,
    strong_shift_ptr,
    y_ptr,
    w_ptr,
    g_ptr,
    a_ptr,
    L,
    U,
    B,
    C,
    labelled_weight,
    strong_weight,
    BLOCK: tl.constexpr,
):
    n = block_of(0, BLOCK)
    labelled = n < L
    strong = (n >= L) & (n < B)
    image = tl.where(strong, (n - L) % tl.maximum(U, 1), 0)
    y = tl.load(labelled_ptr + n, mask=labelled, other=-1)
    k = tl.load(k_ptr + image, mask=strong, other=-1)
    keep = tl.load(keep_ptr + image, mask=strong, other=0) != 0
    tl.store(y_ptr + n, tl.where(labelled, y, k), mask=n < B)
    w = tl.where(labelled, labelled_weight, tl.where(keep, strong_weight, 0.0))
    tl.store(w_ptr + n, w, mask=n < B)
    tl.store(g_ptr + n, strong.to(tl.int64), mask=n < B)
    # The same numbers count the classes.
    shift = tl.zeros((BLOCK,), tl.float32)
    strong_shift = tl.zeros((BLOCK,), tl.float32)
    if labelled_shift_ptr is not None:
        shift = tl.load(labelled_shift_ptr + n, mask=n < C, other=0.0).to(tl.float32)
    if strong_shift_ptr is not None:
        strong_shift = tl.load(strong_shift_ptr + n, mask=n < C, other=0.0).to(tl.float32)
    tl.store(a_ptr + n, shift, mask=n < C)
    tl.store(a_ptr + C + n, strong_shift, mask=n < C)


def head_loss_triton(
    features: Tensor,
    weak: Tensor,
    targets: Tensor,
    linear: Tensor,
    prototypes: Tensor,
    threshold: Tensor,
    align: Tensor,
    weak_adjustment: Tensor | None,
    adjustment: Tensor | None,
    strong_adjustment: Tensor | None,
    eta: float,
    linear_scale: float,
    proto_scale: float,
    temperature: float,
    normalize_linear: bool,
    scale_rows: int,
    fused: bool,
    unlabelled_weight: float,
    orthogonality_weight: float,
    need_features: bool,
    need_linear: bool,
    need_prototypes: bool,
) -> tuple[Tensor, ...]:
    """Loss, gradients of features and both banks ([0] where not needed), and the fields of `PseudoLabels`."""
    w, t = linear.contiguous(), prototypes.contiguous()
    y = targets.contiguous()
    shift, strong_shift = (None if s is None else s.contiguous() for s in (adjustment, strong_adjustment))
    rows, labelled, classes = len(features), len(y), len(w)
    strong = rows - labelled
    device = w.device
    step_targets = torch.empty(rows, dtype=torch.int64, device=device)
    weights = torch.empty(rows, dtype=torch.float32, device=device)
    group = torch.empty(rows, dtype=torch.int64, device=device)
    shifts = torch.empty((2, classes), dtype=torch.float32, device=device)
    d_t = torch.empty(0, dtype=torch.float32, device=device)
    scales = eta, linear_scale, proto_scale, normalize_linear
    with torch.cuda.device_of(w):
        folded, stacked, factors = banks(w, t, align, *scales, fold=True, stack=not fused)
        pseudo = labels(weak, w, t, folded, factors, threshold, weak_adjustment, temperature, scale_rows)
        label, _, keep, *_ = pseudo
        step_rows_kernel[(triton.cdiv(max(rows, classes), BLOCK),)](
            y,
            label,
            keep,
            shift,
            strong_shift,
            step_targets,
            weights,
            group,
            shifts,
            labelled,
            len(weak),
            rows,
            classes,
            1.0 / max(labelled, 1),
            unlabelled_weight / max(strong, 1),
            BLOCK,
        )
        loss, d_x, d_w = cross_entropy(
            features, step_targets, w, folded if fused else stacked, weights, shifts, group,
            eta * linear_scale if fused else linear_scale, normalize_linear, need_features, need_linear,
        )  # fmt: skip
        if orthogonality_weight:
            value, d_t = orthogonality_triton(t, orthogonality_weight, need_prototypes)
            loss.add_(value, alpha=orthogonality_weight)
    return loss, d_x, d_w, d_t, *pseudo
