"""Bridge to the compiled extension: with `_cuda` the only file that handles raw pointers and scratch memory.

The extension knows nothing of torch: it takes addresses, sizes and a thread count. Every function here
receives tensors that the public op has checked, widens them to contiguous float32, allocates the outputs and
calls it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

try:
    from ulfine_fast import _C

    error = ""
except ImportError as cause:
    _C = None
    error = f"the compiled extension is missing ({cause}); reinstall with a C++ compiler"

_local = threading.local()


def isa() -> str:
    """Instruction set that the CPU kernels use on this machine: baseline, avx2 or avx512."""
    return "none" if _C is None else _C.isa()


def has_cuda() -> bool:
    """Whether the extension was built with nvcc."""
    return _C is not None and _C.has_cuda


def _scratch(floats: int) -> int:
    """Address of at least `floats` float32 of working memory of this thread.

    It is kept between calls: fresh pages cost more than the arithmetic on them.
    """
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < floats:
        _local.buffer = buffer = torch.empty(floats, dtype=torch.float32)
    return buffer.data_ptr()


def release_scratch() -> None:
    """Free the working memory that this thread keeps between calls."""
    _local.buffer = None


def _f32(tensor: Tensor) -> Tensor:
    # The test costs a tenth of two calls that would change nothing.
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


def _empty(size: int | tuple[int, ...]) -> Tensor:
    return torch.empty(size, dtype=torch.float32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def proto_logits(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    x, p = _f32(features), _f32(prototypes)
    (b, d), c = x.shape, p.shape[0]
    logits = _empty((b, c))
    threads = torch.get_num_threads()
    scratch = _scratch(_C.proto_logits_scratch(b, c, d, threads))
    _C.proto_logits(x.data_ptr(), p.data_ptr(), logits.data_ptr(), scratch, b, c, d, scale, threads)
    return logits.to(features.dtype)


def proto_logits_backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scale: float,
    need_features: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    g, x, p = _f32(grad), _f32(features), _f32(prototypes)
    (b, d), c = x.shape, p.shape[0]
    d_x = _empty(x.shape if need_features else 0)
    d_p = _empty(p.shape if need_prototypes else 0)
    threads = torch.get_num_threads()
    _C.proto_logits_backward(
        g.data_ptr(),
        x.data_ptr(),
        p.data_ptr(),
        d_x.data_ptr() if need_features else 0,
        d_p.data_ptr() if need_prototypes else 0,
        _scratch(_C.proto_logits_backward_scratch(b, c, d, threads)),
        b,
        c,
        d,
        scale,
        threads,
    )
    return d_x.to(features.dtype), d_p.to(prototypes.dtype)


def pseudo_label(
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
    x, w, t, limit = _f32(features), _f32(linear), _f32(prototypes), _f32(threshold)
    shift = None if adjustment is None else _f32(adjustment)
    (b, d), c = x.shape, w.shape[0]
    label = torch.empty(b, dtype=torch.int64)
    confidence = _empty(b)
    keep = torch.empty(b, dtype=torch.bool)
    histogram = torch.empty(c, dtype=torch.int64)
    kept_histogram = torch.empty(c, dtype=torch.int64)
    branch_scale = _empty(2)
    threads = torch.get_num_threads()
    _C.pseudo_label(
        x.data_ptr(),
        w.data_ptr(),
        t.data_ptr(),
        limit.data_ptr(),
        limit.numel(),
        _address(shift),
        label.data_ptr(),
        confidence.data_ptr(),
        keep.data_ptr(),
        histogram.data_ptr(),
        kept_histogram.data_ptr(),
        branch_scale.data_ptr(),
        _scratch(_C.pseudo_label_scratch(b, c, d, scale_rows, threads)),
        b,
        c,
        d,
        eta,
        float(align),
        linear_scale,
        proto_scale,
        temperature,
        normalize_linear,
        scale_rows,
        threads,
    )
    return label, confidence, keep, histogram, kept_histogram, branch_scale


def dual_cross_entropy(
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
    x, w, t, weight = _f32(features), _f32(linear), _f32(prototypes), _f32(weights)
    (b, d), c = x.shape, w.shape[0]
    target = targets.contiguous()
    shift = None if adjustment is None else _f32(adjustment)
    row_group = None if group is None else group.contiguous()
    loss = _empty(())
    d_x = _empty(x.shape if need_features else 0)
    d_w = _empty(w.shape if need_linear else 0)
    groups = 0 if shift is None else shift.shape[0]
    threads = torch.get_num_threads()
    _C.dual_cross_entropy(
        x.data_ptr(),
        target.data_ptr(),
        w.data_ptr(),
        t.data_ptr(),
        weight.data_ptr(),
        _address(shift),
        groups,
        _address(row_group),
        loss.data_ptr(),
        d_x.data_ptr() if need_features else 0,
        d_w.data_ptr() if need_linear else 0,
        _scratch(_C.dual_cross_entropy_scratch(b, c, d, groups, fused, need_features, need_linear, threads)),
        b,
        c,
        d,
        eta,
        float(align),
        linear_scale,
        proto_scale,
        fused,
        normalize_linear,
        threads,
    )
    return loss, d_x, d_w


def proto_fit_(
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
    x, target, mass = _f32(features), targets.contiguous(), _f32(histogram)
    (b, d), c = x.shape, textual.shape[0]
    threads = torch.get_num_threads()
    _C.proto_fit(
        x.data_ptr(),
        target.data_ptr(),
        mass.data_ptr(),
        textual.data_ptr(),
        visual.data_ptr(),
        seen.data_ptr(),
        distribution.data_ptr(),
        _scratch(_C.proto_fit_scratch(b, c, d, threads)),
        b,
        c,
        d,
        mu,
        beta,
        gamma,
        threads,
    )


def orthogonality(prototypes: Tensor) -> tuple[Tensor, Tensor]:
    p = _f32(prototypes)
    c, d = p.shape
    value = _empty(())
    gradient = _empty((c, d))
    threads = torch.get_num_threads()
    _C.orthogonality(
        p.data_ptr(),
        value.data_ptr(),
        gradient.data_ptr(),
        1.0,
        _scratch(_C.orthogonality_scratch(c, d, threads)),
        c,
        d,
        threads,
    )
    return value, gradient


def head_loss(
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
    x, u, w, t = _f32(features), _f32(weak), _f32(linear), _f32(prototypes)
    limit, target = _f32(threshold), targets.contiguous()
    weak_shift, shift, strong_shift = (
        None if s is None else _f32(s) for s in (weak_adjustment, adjustment, strong_adjustment)
    )
    (b, d), c, unlabelled = x.shape, w.shape[0], u.shape[0]
    loss = _empty(())
    d_x = _empty(x.shape if need_features else 0)
    d_w = _empty(w.shape if need_linear else 0)
    d_t = _empty(t.shape if orthogonality_weight else 0)
    label = torch.empty(unlabelled, dtype=torch.int64)
    confidence = _empty(unlabelled)
    keep = torch.empty(unlabelled, dtype=torch.bool)
    histogram = torch.empty(c, dtype=torch.int64)
    kept_histogram = torch.empty(c, dtype=torch.int64)
    branch_scale = _empty(2)
    _C.head_loss(
        _scratch,
        x.data_ptr(),
        u.data_ptr(),
        target.data_ptr(),
        w.data_ptr(),
        t.data_ptr(),
        limit.data_ptr(),
        limit.numel(),
        _address(weak_shift),
        _address(shift),
        _address(strong_shift),
        loss.data_ptr(),
        d_x.data_ptr() if need_features else 0,
        d_w.data_ptr() if need_linear else 0,
        d_t.data_ptr() if orthogonality_weight else 0,
        label.data_ptr(),
        confidence.data_ptr(),
        keep.data_ptr(),
        histogram.data_ptr(),
        kept_histogram.data_ptr(),
        branch_scale.data_ptr(),
        b,
        len(target),
        unlabelled,
        c,
        d,
        float(align),
        eta,
        linear_scale,
        proto_scale,
        temperature,
        normalize_linear,
        scale_rows,
        fused,
        unlabelled_weight,
        orthogonality_weight,
        torch.get_num_threads(),
    )
    if not need_prototypes:
        d_t = _empty(0)
    return loss, d_x, d_w, d_t, label, confidence, keep, histogram, kept_histogram, branch_scale
