"""Pseudo-labels of weak views from the two fused branches, in one pass over the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ulfine_fast import _cuda, _native
from ulfine_fast.backend import choose
from ulfine_fast.ops import _checks
from ulfine_fast.ops._rows import unit_rows, without_autocast, working_dtype


class PseudoLabels(NamedTuple):
    """What `pseudo_label` says of B weak rows over C classes; float64 instead of float32 if features or a bank is."""

    label: Tensor  # [B] int64 in 0..C-1; -1 where the confidence is not finite
    confidence: Tensor  # [B] float32 in [1/C, 1]; 0 where it would not be finite
    keep: Tensor  # [B] bool
    histogram: Tensor  # [C] int64, rows per label, kept or not
    kept_histogram: Tensor  # [C] int64, kept rows per label
    branch_scale: Tensor  # [2] float32, mean over rows of the standard deviation over classes of zl and zt


def dual_logits_reference(
    features: Tensor,
    linear: Tensor,
    prototypes: Tensor,
    linear_scale: float,
    proto_scale: float,
    normalize_linear: bool,
) -> tuple[Tensor, Tensor]:
    """Logits of both branches (zl, zt), each [B, C] in the working dtype."""
    dtype = working_dtype(features, linear, prototypes)
    x = unit_rows(features, dtype)
    w = unit_rows(linear, dtype) if normalize_linear else linear.to(dtype)
    return linear_scale * (x @ w.T), proto_scale * (x @ unit_rows(prototypes, dtype).T)


def fuse_logits_reference(zl: Tensor, zt: Tensor, eta: float, align: Tensor) -> Tensor:
    """eta * zl + (1 - eta) * align * zt."""
    return eta * zl + (1.0 - eta) * align.to(zt.dtype) * zt


@without_autocast
def pseudo_label_reference(
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
) -> PseudoLabels:
    """The definition; see `pseudo_label`. `threshold` is [1] or [C], `align` a scalar tensor."""
    with torch.no_grad():
        zl, zt = dual_logits_reference(
            features, linear, prototypes, linear_scale, proto_scale, normalize_linear
        )
        classes = zl.shape[1]
        z = fuse_logits_reference(zl, zt, eta, align)
        z = (z if adjustment is None else z + adjustment.to(z.dtype)) / temperature
        top, label = z.max(-1)
        confidence = (top - z.logsumexp(-1)).exp()
        # max() prefers NaN, so one logit that is not finite makes the confidence NaN.
        finite = confidence.isfinite()
        label = torch.where(finite, label, -1)
        confidence = torch.where(finite, confidence, 0.0)
        limit = threshold.to(confidence.dtype)
        limit = limit[label.clamp_min(0)] if limit.numel() > 1 else limit
        keep = finite & (confidence >= limit)
        classes_of = torch.arange(classes, device=label.device)
        one_hot = label[:, None] == classes_of
        rows = min(scale_rows, zl.shape[0])
        logits = torch.stack([zl[:rows], zt[:rows]])
        spread = (logits - logits.mean(-1, keepdim=True)).square().mean(-1).sqrt()  # [2, rows]
        counted = spread.isfinite().all(0)
        total = torch.where(counted, spread, 0.0).sum(-1)
        branch_scale = total / counted.sum().clamp_min(1)
        return PseudoLabels(
            label, confidence, keep, one_hot.sum(0), (one_hot & keep[:, None]).sum(0), branch_scale
        )


torch.library.define(
    "ulfine::_pseudo_label",
    "(Tensor features, Tensor linear, Tensor prototypes, Tensor threshold, Tensor align, "
    "Tensor? adjustment, float eta, float linear_scale, float proto_scale, float temperature, bool normalize_linear, SymInt scale_rows, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("ulfine::_pseudo_label")
def _(
    features,
    linear,
    prototypes,
    threshold,
    align,
    adjustment,
    eta,
    linear_scale,
    proto_scale,
    temperature,
    normalize_linear,
    scale_rows,
    backend,
):
    rows, classes = features.shape[0], linear.shape[0]
    return (
        features.new_empty(rows, dtype=torch.int64),
        features.new_empty(rows, dtype=torch.float32),
        features.new_empty(rows, dtype=torch.bool),
        features.new_empty(classes, dtype=torch.int64),
        features.new_empty(classes, dtype=torch.int64),
        features.new_empty(2, dtype=torch.float32),
    )


@torch.library.impl("ulfine::_pseudo_label", ("cpu", "cuda"))
def _(*arguments):
    *inputs, backend = arguments
    if backend == "triton":
        from ulfine_fast.kernels.pseudo_label import pseudo_label_triton

        return pseudo_label_triton(*inputs)
    return (_cuda if backend == "cuda" else _native).pseudo_label(*inputs)


def pseudo_label(
    features: Tensor,
    linear: Tensor,
    prototypes: Tensor,
    threshold: float | Tensor = 0.7,
    *,
    adjustment: Tensor | None = None,
    align: float | Tensor = 1.0,
    eta: float = 0.5,
    linear_scale: float = 25.0,
    proto_scale: float = 25.0,
    temperature: float = 1.0,
    normalize_linear: bool = True,
    scale_rows: int | None = None,
    backend: str | None = None,
) -> PseudoLabels:
    """Label, confidence and keep mask of weak views, with the counts and scales that estimators need.

        zl_ik = linear_scale * <x_i, w_k>     linear branch,        x, w, t: rows divided by their norm
        zt_ik = proto_scale  * <x_i, t_k>     prototype branch
        z     = eta * zl + (1 - eta) * align * zt
        label = argmax_k (z + adjustment)  (lowest index on ties),
        confidence = max softmax((z + adjustment) / temperature),  keep = confidence >= threshold

    Source: dual logit fusion of ULFine (arXiv 2505.05062); alignment by one global ratio of scales and the
    adjustment, by which a classifier for balanced classes reads data of another prior, are our choices.

    Never differentiates. The cpp back end holds logits of a chunk of rows at a time, the triton back end none.

    Args:
        features: [B, D] float; weak views, any norm up to 1e18, B may be 0.
        linear: [C, D] float; rows of the linear probe.
        prototypes: [C, D] float; textual prototypes, any norm up to 1e18.
        threshold: confidence from which a row is kept, in [0, 1]; a number, or [C] for one per class.
        adjustment: [C] float added to the fused logits, such as the log of the estimated class prior of the
            unlabelled data, without gradient; None is 0.
        align: factor on the prototype branch, finite; a number or a scalar tensor (see `branch_scale`).
        eta: weight of the linear branch in [0, 1].
        linear_scale, proto_scale: inverse temperatures of the branches, above 0.
        temperature: divides the fused logits before the softmax, above 0; the label does not depend on it.
        normalize_linear: True for a cosine probe; False uses the rows of `linear` as they are.
        scale_rows: rows that `branch_scale` is measured on, from the first; None is all, 0 gives zeros. A
            few dozen of a shuffled batch give the same running mean for a fraction of the work.
        backend: None (the selected one), "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        PseudoLabels. A row whose confidence is not finite (a NaN, an infinite feature, an adjustment that excludes all
        classes) gets label -1, confidence 0, keep False, and is in no histogram. A row whose logits in a branch
        are not finite is in no scale: that is of the branches alone, before fusion and adjustment.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or range. RuntimeError: the named back end cannot
        run.
    """
    op = "pseudo_label"
    _checks.matrix(op, "features", features)
    _checks.bank(op, "linear", linear, features.shape[1])
    classes = linear.shape[0]
    _checks.matrix(op, "prototypes", prototypes, classes, features.shape[1])
    dtype = working_dtype(features, linear, prototypes)
    threshold = limits(op, threshold, classes, features, dtype)
    align = scalar(op, "align", align, features, dtype)
    if adjustment is not None:
        _checks.vector(op, "adjustment", adjustment, classes, _checks.FLOATS)
    _checks.same_device(
        op,
        features,
        linear=linear,
        prototypes=prototypes,
        threshold=threshold,
        align=align,
        adjustment=adjustment,
    )
    _checks.branches(op, eta, linear_scale=linear_scale, proto_scale=proto_scale, temperature=temperature)
    _checks.flag(op, normalize_linear=normalize_linear)
    arguments = (
        features,
        linear,
        prototypes,
        threshold,
        align,
        adjustment,
        float(eta),
        float(linear_scale),
        float(proto_scale),
        float(temperature),
        normalize_linear,
        measured_rows(op, scale_rows, features.shape[0]),
    )
    chosen = choose(op, features, classes, dtype, backend)
    if chosen == "reference":
        return pseudo_label_reference(*arguments)
    return PseudoLabels(
        *torch.ops.ulfine._pseudo_label.default(
            *(a.detach() if isinstance(a, Tensor) else a for a in arguments), chosen
        )
    )


def scalar(op: str, name: str, value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as a scalar tensor beside `like`: device scalars stay on the device, so nothing waits."""
    if not isinstance(value, Tensor):
        _checks.number(op, name, value)
        largest = torch.finfo(dtype).max
        if not abs(value) <= largest:
            raise ValueError(f"{op}: {name} must be finite in {str(dtype)[6:]}, got {value:g}")
        return torch.full((), float(value), dtype=dtype, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{op}: {name} must be a number or a scalar tensor, got {list(value.shape)}")
    _checks.of_dtype(op, name, value, _checks.FLOATS)
    return value.reshape(())


def limits(op: str, threshold: float | Tensor, classes: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`threshold` as a tensor [1] or [C] beside `like`."""
    if isinstance(threshold, Tensor):
        if threshold.ndim:
            _checks.vector(op, "threshold", threshold, classes, _checks.FLOATS)
        _checks.of_dtype(op, "threshold", threshold, _checks.FLOATS)
        return threshold.reshape(-1)
    _checks.between(op, "threshold", threshold, 0.0, 1.0)
    return torch.full((1,), float(threshold), dtype=dtype, device=like.device)


def measured_rows(op: str, scale_rows: int | None, rows: int) -> int:
    """How many of `rows` rows the branch scales are measured on."""
    if scale_rows is None:
        return rows
    _checks.whole(op, "scale_rows", scale_rows)
    return min(int(scale_rows), rows)
