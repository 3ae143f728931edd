"""Bridge to the CUDA kernels: products by cuBLAS through torch, the passes over rows by our launchers.

The launchers know nothing of torch: they take addresses on the device, sizes and a stream, as the structs of
csrc/cuda/kernels.h name them. Products write into `out=`: autocast leaves those in float32. Nothing here waits
for the device or depends on values there, so a CUDA graph can capture every call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from ulfine_fast import _native

# The launchers. A test may put the same ones here, built for an emulator.
kernels = _native._C


def emulated() -> bool:
    """Whether the launchers run in an emulator, which takes CPU tensors."""
    return getattr(kernels, "emulated", False)


def _on_device_of_first(function: Callable) -> Callable:
    @wraps(function)
    def run(first: Tensor, *rest: object) -> object:
        if emulated():
            return function(first, *rest)
        with torch.cuda.device(first.device):
            return function(first, *rest)

    return run


def _launch(name: str, *fields: object) -> None:
    """Run a launcher on the current stream; tensors become addresses, None becomes null."""
    stream = 0 if emulated() else torch.cuda.current_stream().cuda_stream
    getattr(kernels, name)(_plain(fields), stream)


def _plain(field: object) -> object:
    if field is None:
        return 0
    if isinstance(field, tuple):
        return tuple(map(_plain, field))
    return field.data_ptr() if isinstance(field, Tensor) else field


def _f32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _operand_dtype(normalize_linear: bool, *features: Tensor) -> torch.dtype:
    """float16 for half features where torch allows TF32, which has the same 11 significant bits, else float32.

    A probe that is not normalized has no bound, and might not fit.
    """
    fits = torch.backends.cuda.matmul.allow_tf32 and normalize_linear
    half = all(t.dtype in (torch.float16, torch.bfloat16) for t in features)
    return torch.float16 if fits and half else torch.float32


def _operand(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The struct `Operand`."""
    return (None, tensor) if tensor is not None and tensor.dtype == torch.float16 else (tensor, None)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


class _UnitRows(NamedTuple):
    x: Tensor  # [U + B, D] unit rows of the weak views and the features
    x_inverse: Tensor  # [U + B] their inverse norms
    bank: Tensor | None  # [2C, D] unit rows of the linear probe, if there is one, and of the prototypes
    bank_inverse: Tensor  # [2C] their inverse norms
    fold: Tensor | None  # [C, D] the bank whose logits are the fused ones
    fold_unit: Tensor | None  # [] what a fold in float16 is divided by, a power of two
    text: Tensor | None  # [C, D] unit rows of the prototypes in float32


def _unit_rows(
    features: Tensor,
    linear: Tensor | None,
    prototypes: Tensor,
    *,
    weak: Tensor | None = None,
    normalize_linear: bool = True,
    bank: bool = True,
    text: bool = False,
    dtype: torch.dtype = torch.float32,
    fold: tuple[Tensor, float, float, float] | None = None,
    histograms: tuple[Tensor | None, Tensor | None] = (None, None),
) -> _UnitRows:
    """What every product starts from, its operands as `dtype`.

    `fold` is (align, eta, linear_scale, proto_scale), or None for no fold.
    """
    (b, d), c = features.shape, len(prototypes)
    u = 0 if weak is None else len(weak)
    rows = c if linear is None else 2 * c
    unit = _UnitRows(
        _empty(features, u + b, d, dtype=dtype),
        _empty(features, u + b),
        _empty(features, rows, d, dtype=dtype) if bank else None,
        _empty(features, rows),
        None if fold is None else _empty(features, c, d, dtype=dtype),
        None if fold is None or dtype == torch.float32 else _empty(features),
        _empty(features, c, d) if text else None,
    )
    align, *factors = (None, 0.0, 0.0, 0.0) if fold is None else fold
    _launch(
        "unit_rows", weak, features, linear, prototypes, _operand(unit.x), unit.x_inverse,
        _operand(unit.bank), unit.bank_inverse, _operand(unit.fold), unit.fold_unit, unit.text, align,
        *histograms, u, b, c, d, *factors, normalize_linear,
    )  # fmt: skip
    return unit


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[M, N] float32 of two operands of one dtype."""
    out = _empty(a, a.shape[0], b.shape[1])
    if a.dtype == torch.float16 and not emulated():
        return torch.mm(a, b, torch.float32, out=out)
    # torch has no float32 product of half operands for the processor; theirs are exact in float32.
    return torch.mm(a.float(), b.float(), out=out)


def _through_norms(
    gradient: Tensor | None,
    rows: Tensor,
    inverse: Tensor,
    factor: float = 1.0,
    *,
    used: Tensor | None = None,
    unit: Tensor | None = None,
    normalized: bool = True,
) -> tuple:
    """A part of `_finish`: the gradient in unit rows becomes the one in the rows; None is nothing to do."""
    return gradient, rows, inverse, used, len(rows), unit, factor, normalized


_NOTHING = None, None, None, None, 0, None, 0.0, False


def _finish(
    dim: int,
    *,
    features: tuple = _NOTHING,
    linear: tuple = _NOTHING,
    prototypes: tuple = _NOTHING,
    row_loss: Tensor | None = None,
    spread: Tensor | None = None,
    squares: Tensor | None = None,
    classes: int = 0,
    orthogonality_weight: float = 0.0,
    loss: Tensor | None = None,
    branch_scale: Tensor | None = None,
    value: Tensor | None = None,
) -> None:
    """Gradients through the norms, in place, and the sums that make `loss`, `branch_scale` and `value`."""
    b, scale_rows, count = (0 if t is None else len(t) for t in (row_loss, spread, squares))
    sums = row_loss, b, spread, scale_rows, squares, count, classes
    sums += orthogonality_weight, loss, branch_scale, value
    _launch("finish", features, linear, prototypes, sums, dim)


@_on_device_of_first
def proto_logits(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    x, p = _f32(features), _f32(prototypes)
    unit = _unit_rows(x, None, p)
    logits = _empty(x, len(x), len(p))
    # With beta = 0 what the logits held before is not read.
    torch.addmm(logits, unit.x, unit.bank.t(), beta=0, alpha=scale, out=logits)
    return logits.to(features.dtype)


@_on_device_of_first
def proto_logits_backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scale: float,
    need_features: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    g, x, p = _f32(grad), _f32(features), _f32(prototypes)
    unit = _unit_rows(x, None, p)
    d_x = _product(g, unit.bank) if need_features else None
    d_p = _product(g.t(), unit.x) if need_prototypes else None
    _finish(
        x.shape[1],
        features=_through_norms(d_x, x, unit.x_inverse, scale),
        prototypes=_through_norms(d_p, p, unit.bank_inverse, scale),
    )
    return _or_empty(d_x, x).to(features.dtype), _or_empty(d_p, x).to(prototypes.dtype)


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return _empty(like, 0) if gradient is None else gradient


def _label_outputs(weak: Tensor, classes: int) -> tuple[Tensor, ...]:
    """Label, confidence, keep, histogram, kept histogram and branch scales, not yet written."""
    rows = len(weak)
    return (
        _empty(weak, rows, dtype=torch.int64),
        _empty(weak, rows),
        _empty(weak, rows, dtype=torch.bool),
        _empty(weak, classes, dtype=torch.int64),
        _empty(weak, classes, dtype=torch.int64),
        _empty(weak, 2),
    )


@_on_device_of_first
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
    x, w, t, limit, factor, shift = map(_f32, (features, linear, prototypes, threshold, align, adjustment))
    rows, classes = len(x), len(w)
    out = _label_outputs(x, classes)
    dtype = _operand_dtype(normalize_linear, features)
    unit = _unit_rows(
        x, w, t, normalize_linear=normalize_linear, bank=scale_rows > 0, dtype=dtype,
        fold=(factor, eta, linear_scale, proto_scale), histograms=out[3:5],
    )  # fmt: skip
    fused = _product(unit.x, unit.fold.t())
    cosines = _product(unit.x[:scale_rows], unit.bank.t()) if scale_rows else None
    spread = _empty(x, scale_rows, 2)
    _launch(
        "pseudo_label", fused, unit.fold_unit, cosines, limit, len(limit), shift, factor, *out[:5], spread,
        rows, classes, scale_rows, eta, linear_scale, proto_scale, temperature,
    )  # fmt: skip
    _finish(x.shape[1], spread=spread, branch_scale=out[5])
    return out


@_on_device_of_first
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
    x, w, t, weight, shift = map(_f32, (features, linear, prototypes, weights, adjustment))
    (rows, dim), classes = x.shape, len(w)
    groups = 0 if shift is None else len(shift)
    factors = _f32(align), eta, linear_scale, proto_scale
    unit = _unit_rows(
        x, w, t, normalize_linear=normalize_linear, bank=not fused, fold=factors if fused else None
    )
    bank = unit.fold if fused else unit.bank
    z = _product(unit.x, bank.t())
    loss, row_loss, used = _empty(x), _empty(x, rows), _empty(x, rows, dtype=torch.bool)
    _launch(
        "dual_cross_entropy",
        (z, None, None, (unit.x, None), row_loss, used, rows, classes, dim, linear_scale, proto_scale,
         float(need_features or need_linear), fused),
        targets.contiguous(), weight, shift, groups, None if group is None else group.contiguous(),
    )  # fmt: skip
    d_x = _product(z, bank) if need_features else None
    d_w = _product(z[:, :classes].t(), unit.x) if need_linear else None
    _finish(
        dim,
        features=_through_norms(d_x, x, unit.x_inverse, used=used),
        linear=_through_norms(
            d_w, w, unit.bank_inverse, eta * linear_scale if fused else 1.0, normalized=normalize_linear
        ),
        row_loss=row_loss,
        loss=loss,
    )
    return loss, _or_empty(d_x, x), _or_empty(d_w, x)


@_on_device_of_first
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
    state = textual, visual, seen, distribution
    _launch("proto_fit", *_fit(features, targets, histogram.contiguous(), state, mu, beta, gamma))


def _fit(
    features: Tensor,
    targets: Tensor,
    histogram: Tensor,
    state: tuple[Tensor, ...],
    mu: float,
    beta: float,
    gamma: float,
) -> tuple:
    """The struct `ProtoFit`; the state is textual, visual, seen and distribution."""
    x, c = _f32(features), len(histogram)
    b, d = x.shape
    counts, mass = (histogram, None) if histogram.dtype == torch.int64 else (None, histogram)
    working = _empty(x, b), _empty(x)
    return x, targets.contiguous(), counts, mass, *state, *working, b, c, d, mu, beta, gamma


@_on_device_of_first
def state_update_(
    features: Tensor,
    targets: Tensor,
    weak: Tensor,
    label: Tensor,
    keep: Tensor,
    copies: Tensor | None,
    histogram: Tensor,
    kept_histogram: Tensor,
    branch_scale: Tensor,
    labelled_counts: Tensor,
    text: Tensor,
    finite: Tensor,
    textual: Tensor,
    visual: Tensor,
    seen: Tensor,
    distribution: Tensor,
    kept_distribution: Tensor,
    kept_sum: Tensor,
    kept_count: Tensor,
    running_scale: Tensor,
    measured: Tensor,
    mu: float,
    beta: float,
    gamma: float,
    scale_decay: float,
    strength: float,
    unlabelled_mass: float,
    posterior: bool,
    normalize: bool,
) -> None:
    x, (views, classes) = _f32(weak), (len(weak), len(text))
    counted = None if copies is None else _empty(x, classes, dtype=torch.int64)
    counts = histogram.contiguous() if counted is None else counted
    sums = working = (None,) * 4
    if posterior:
        sums = labelled_counts.contiguous(), text, kept_sum, kept_count
        working = _empty(x, views), _empty(x, classes), _empty(x), _empty(x)
    _launch(
        "state_update",
        _fit(features, targets, counts, (textual, visual, seen, distribution), mu, beta, gamma),
        (x, *sums, *working, strength, unlabelled_mass), finite, label.contiguous(), keep.contiguous(),
        None if copies is None else copies.contiguous(), counted, kept_histogram.contiguous(),
        _f32(branch_scale), kept_distribution, running_scale, measured, views, scale_decay, normalize,
    )  # fmt: skip


def _gram(unit: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix of unit rows, from the cheaper side, and the parts of the sum of its squares."""
    c, d = unit.shape
    of_rows = c <= d
    gram = _product(unit, unit.t()) if of_rows else _product(unit.t(), unit)
    squares = _empty(unit, c if of_rows else d + c, dtype=torch.float64)
    _launch("orthogonality", gram, unit, squares, c, d)
    return gram, squares


def _gram_gradient(gram: Tensor, unit: Tensor) -> Tensor:
    return _product(gram, unit) if len(gram) == len(unit) else _product(unit, gram)


def _of_pairs(gradient: Tensor | None, rows: Tensor, inverse: Tensor, weight: float) -> tuple:
    """A part of `_finish`: Gram matrix times unit rows becomes the gradient of weight * value in the rows."""
    classes = len(rows)
    if classes == 1:
        # There is no pair, whatever the row holds.
        if gradient is not None:
            gradient.zero_()
        return _NOTHING
    return _through_norms(gradient, rows, inverse, 4.0 * weight / (classes * (classes - 1)))


@_on_device_of_first
def orthogonality(prototypes: Tensor) -> tuple[Tensor, Tensor]:
    p = _f32(prototypes)
    c, d = p.shape
    rows = _unit_rows(p[:0], None, p)
    gram, squares = _gram(rows.bank)
    value, gradient = _empty(p), _gram_gradient(gram, rows.bank)
    _finish(
        d,
        prototypes=_of_pairs(gradient, p, rows.bank_inverse, 1.0),
        squares=squares,
        classes=c,
        value=value,
    )
    return value, gradient


@_on_device_of_first
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
    x, u, w, t, limit, factor = map(_f32, (features, weak, linear, prototypes, threshold, align))
    shifts = [_f32(shift) for shift in (weak_adjustment, adjustment, strong_adjustment)]
    (rows, dim), views, labelled, classes = x.shape, len(u), len(targets), len(w)
    out = _label_outputs(u, classes)
    dtype = _operand_dtype(normalize_linear, features, weak)
    half = dtype == torch.float16
    unit = _unit_rows(
        x, w, t, weak=u, normalize_linear=normalize_linear, dtype=dtype,
        bank=not fused or scale_rows > 0 or (orthogonality_weight > 0 and not half),
        text=orthogonality_weight > 0 and half,
        fold=(factor, eta, linear_scale, proto_scale) if fused else None, histograms=out[3:5],
    )  # fmt: skip
    bank = unit.fold if fused else unit.bank
    z = _product(unit.x, bank.t())
    cosines = z
    if fused:
        cosines = _product(unit.x[:scale_rows], unit.bank.t()) if scale_rows else None
    z_rows, x_rows = z[views:], unit.x[views:]
    loss, row_loss, used = _empty(x), _empty(x, rows), _empty(x, rows, dtype=torch.bool)
    spread = _empty(x, scale_rows, 2)
    weights = 1.0 / max(labelled, 1), unlabelled_weight / max(rows - labelled, 1)
    # What float16 holds of a gradient is divided by this: the largest is 2^15, and small ones are normal numbers.
    unit_of_dz = max(weights) * (1.0 if fused else max(linear_scale, proto_scale)) / 2**15 if half else 1.0
    dz = _empty(x, *z_rows.shape, dtype=dtype) if half else z_rows
    _launch(
        "head_loss",
        (z if fused else None, unit.fold_unit, cosines, limit, len(limit), shifts[0], factor, *out[:5], spread,
         views, classes, scale_rows, eta, linear_scale, proto_scale, temperature),
        (z_rows, unit.fold_unit, dz if half else None, _operand(x_rows), row_loss, used, rows, classes, dim,
         linear_scale, proto_scale, (need_features or need_linear) / unit_of_dz, fused),
        targets.contiguous(), *shifts[1:], labelled, *weights,
    )  # fmt: skip
    d_x = _product(dz, bank) if need_features else None
    d_w = _product(dz[:, :classes].t(), x_rows) if need_linear else None
    d_t = squares = None
    if orthogonality_weight:
        text = unit.text if half else unit.bank[classes:]
        gram, squares = _gram(text)
        d_t = _gram_gradient(gram, text) if need_prototypes else None
    _finish(
        dim,
        features=_through_norms(d_x, x, unit.x_inverse[views:], unit_of_dz, used=used, unit=unit.fold_unit),
        linear=_through_norms(
            d_w,
            w,
            unit.bank_inverse,
            unit_of_dz * (eta * linear_scale if fused else 1.0),
            normalized=normalize_linear,
        ),
        prototypes=_of_pairs(d_t, t, unit.bank_inverse[classes:], orthogonality_weight),
        row_loss=row_loss,
        spread=spread,
        squares=squares,
        classes=classes,
        orthogonality_weight=orthogonality_weight,
        loss=loss,
        branch_scale=out[5],
    )
    return loss, *(_or_empty(gradient, x) for gradient in (d_x, d_w, d_t)), *out
