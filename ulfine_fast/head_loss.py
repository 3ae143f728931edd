"""The whole loss of one step as one differentiable call: pseudo-labels, both cross-entropies, orthogonality.

A composition of `pseudo_label`, `dual_cross_entropy` and `orthogonality`, with no maths of its own. It exists
because a small head costs less than three trips through the dispatcher and autograd: with 100 classes they are
a quarter of the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast import _cuda, _native
from ulfine_fast.backend import choose
from ulfine_fast.ops import _checks
from ulfine_fast.ops._handover import hand_over, keep, once
from ulfine_fast.ops._rows import working_dtype
from ulfine_fast.ops.dual_cross_entropy import dual_cross_entropy_reference, on_fused
from ulfine_fast.ops.orthogonality import orthogonality_reference
from ulfine_fast.ops.pseudo_label import (
    PseudoLabels,
    limits,
    measured_rows,
    pseudo_label_reference,
    scalar,
)


def _step_rows(
    targets: Tensor, pseudo: PseudoLabels, strong: int, unlabelled_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Target, weight and adjustment group of the labelled and, below them, the strong rows."""
    labelled, unlabelled = len(targets), len(pseudo.label)
    views = strong // unlabelled if unlabelled else 0
    consistent = pseudo.keep * pseudo.confidence.new_full((), unlabelled_weight / max(strong, 1))
    supervised = consistent.new_full((labelled,), 1.0 / max(labelled, 1))
    group = torch.zeros(labelled + strong, dtype=torch.int64, device=targets.device)
    group[labelled:] = 1
    return (
        torch.cat([targets, *[pseudo.label] * views]),
        torch.cat([supervised, *[consistent] * views]),
        group,
    )


def head_loss_reference(
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
) -> tuple[Tensor, PseudoLabels]:
    """The definition; see `head_loss`."""
    scales = eta, linear_scale, proto_scale
    pseudo = pseudo_label_reference(
        weak,
        linear,
        prototypes,
        threshold,
        align,
        weak_adjustment,
        *scales,
        temperature,
        normalize_linear,
        scale_rows,
    )
    rows = _step_rows(targets, pseudo, len(features) - len(targets), unlabelled_weight)
    none = linear.new_zeros(linear.shape[0], dtype=working_dtype(features, weak, linear, prototypes))
    shifts = torch.stack([none if s is None else s.to(none.dtype) for s in (adjustment, strong_adjustment)])
    loss = dual_cross_entropy_reference(
        features, rows[0], linear, prototypes.detach(), rows[1], shifts, rows[2], align, *scales, fused,
        normalize_linear,
    )  # fmt: skip
    if orthogonality_weight:
        loss = loss + orthogonality_weight * orthogonality_reference(prototypes)
    return loss, pseudo


torch.library.define(
    "ulfine::_head_loss",
    "(Tensor features, Tensor weak, Tensor targets, Tensor linear, Tensor prototypes, Tensor threshold, "
    "Tensor align, Tensor? weak_adjustment, Tensor? adjustment, Tensor? strong_adjustment, float eta, float linear_scale, float proto_scale, float temperature, "
    "bool normalize_linear, SymInt scale_rows, bool fused, float unlabelled_weight, "
    "float orthogonality_weight, bool need_features, bool need_linear, bool need_prototypes, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("ulfine::_head_loss")
def _(features, weak, targets, linear, prototypes, *options):
    needed = zip((features, linear, prototypes), options[-4:-1], strict=True)
    rows, classes = weak.shape[0], linear.shape[0]
    return (
        features.new_empty((), dtype=torch.float32),
        *(t.new_empty(t.shape if need else 0, dtype=torch.float32) for t, need in needed),
        weak.new_empty(rows, dtype=torch.int64),
        weak.new_empty(rows, dtype=torch.float32),
        weak.new_empty(rows, dtype=torch.bool),
        weak.new_empty(classes, dtype=torch.int64),
        weak.new_empty(classes, dtype=torch.int64),
        weak.new_empty(2, dtype=torch.float32),
    )


@torch.library.impl("ulfine::_head_loss", ("cpu", "cuda"))
def _(*arguments):
    *inputs, backend = arguments
    if backend == "triton":
        from ulfine_fast.kernels.head_loss import head_loss_triton

        return head_loss_triton(*inputs)
    return (_cuda if backend == "cuda" else _native).head_loss(*inputs)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, linear, prototypes, weak, targets, *rest):
        tensors = features, weak, targets, linear, prototypes, *rest[:5]
        *options, backend = rest[5:]
        ctx.options = *options, *ctx.needs_input_grad[:3], backend
        ctx.dtypes = features.dtype, linear.dtype, prototypes.dtype
        out = torch.ops.ulfine._head_loss.default(*tensors, *ctx.options)
        keep(ctx, out[1:4], tensors)
        if not ctx.compiled:
            # Or autograd makes a gradient of zeros for each of the six outputs below, in every step.
            ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*out[4:])
        return out[0], *out[4:]

    @staticmethod
    @once("head_loss")
    def backward(ctx, grad, *_):
        def again(tensors):
            return torch.ops.ulfine._head_loss.default(*tensors, *options)[1:4]

        options = ctx.options
        gradients = [
            gradient.to(dtype) if needed else None
            for gradient, dtype, needed in zip(
                hand_over(ctx, grad, again), ctx.dtypes, ctx.needs_input_grad[:3], strict=True
            )
        ]
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - 3)


def head_loss(
    features: Tensor,
    weak: Tensor,
    targets: Tensor,
    linear: Tensor,
    prototypes: Tensor,
    threshold: float | Tensor = 0.7,
    *,
    weak_adjustment: Tensor | None = None,
    adjustment: Tensor | None = None,
    strong_adjustment: Tensor | None = None,
    align: float | Tensor = 1.0,
    eta: float = 0.5,
    linear_scale: float = 25.0,
    proto_scale: float = 25.0,
    temperature: float = 1.0,
    normalize_linear: bool = True,
    scale_rows: int | None = None,
    loss_on: str = "branches",
    unlabelled_weight: float = 1.0,
    orthogonality_weight: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, PseudoLabels]:
    """Loss of one step and the pseudo-labels it used.

        loss = 1/B_l  sum over labelled rows  CE(row, target)
             + unlabelled_weight / (V B_u)  sum over kept strong rows  CE(row, pseudo-label of its weak view)
             + orthogonality_weight * orthogonality(prototypes)

    CE is the cross-entropy of each branch or of their fusion, see `dual_cross_entropy`. Source: ULFine (arXiv
    2505.05062); that the terms have one weight each is our choice.

    Differentiable in `features`, in `linear` and, through orthogonality alone, in `prototypes`. Strong rows
    whose weak view was rejected take no part; the cpp back end does not compute them. A second derivative raises
    RuntimeError on a kernel.

    Args:
        features: [B_l + V B_u, D] float; labelled rows, then V >= 0 strong views of all unlabelled images.
        weak: [B_u, D] float; weak views of the unlabelled images, in the order of each strong view.
        targets: [B_l] int64 below C; a negative one is left out (the sum is divided by B_l all the same).
        linear, prototypes: [C, D] float banks of the two branches.
        weak_adjustment: [C] float added to the logits of weak rows, see `pseudo_label`; None is 0.
        adjustment: [C] float added to the logits of labelled rows, see `dual_cross_entropy`; None is 0.
        strong_adjustment: [C] float added to the logits of strong rows; None is 0.
        unlabelled_weight, orthogonality_weight: weights of the terms, at least 0.
        threshold, align, eta, linear_scale, proto_scale, temperature, normalize_linear, scale_rows: see
            `pseudo_label`. loss_on: see `dual_cross_entropy`.
        backend: None (the selected one), "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        Scalar loss in nats, float32 (float64 if features or a bank is), and the PseudoLabels of `weak`.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device, label or range. RuntimeError: the named back end
        cannot run.
    """
    op = "head_loss"
    _checks.matrix(op, "features", features)
    _checks.bank(op, "linear", linear, features.shape[1])
    classes, dim = linear.shape
    _checks.matrix(op, "prototypes", prototypes, classes, dim)
    _checks.matrix(op, "weak", weak, columns=dim)
    _checks.tensor(op, "targets", targets)
    _checks.labels(op, "targets", targets, targets.numel(), classes)
    strong, unlabelled = len(features) - len(targets), len(weak)
    if strong < 0 or strong % max(unlabelled, 1) or (strong and not unlabelled):
        raise ValueError(
            f"{op}: features must be [{len(targets)} labelled + V * {unlabelled} strong, {dim}], "
            f"got {list(features.shape)}"
        )
    dtype = working_dtype(features, weak, linear, prototypes)
    threshold = limits(op, threshold, classes, features, dtype)
    shifts = {
        "weak_adjustment": weak_adjustment, "adjustment": adjustment, "strong_adjustment": strong_adjustment
    }  # fmt: skip
    for name, shift in shifts.items():
        if shift is not None:
            _checks.vector(op, name, shift, classes, _checks.FLOATS)
    align = scalar(op, "align", align, features, dtype).detach()
    _checks.same_device(
        op, features, weak=weak, targets=targets, linear=linear, prototypes=prototypes, threshold=threshold,
        align=align, **shifts,
    )  # fmt: skip
    _checks.branches(op, eta, linear_scale=linear_scale, proto_scale=proto_scale, temperature=temperature)
    _checks.not_negative(op, unlabelled_weight=unlabelled_weight, orthogonality_weight=orthogonality_weight)
    _checks.flag(op, normalize_linear=normalize_linear)
    options = (
        threshold, align, *(None if shift is None else shift.detach() for shift in shifts.values()), float(eta), float(linear_scale), float(proto_scale), float(temperature),
        normalize_linear, measured_rows(op, scale_rows, unlabelled), on_fused(op, loss_on), float(unlabelled_weight), float(orthogonality_weight),
    )  # fmt: skip
    weak = weak.detach()
    if not orthogonality_weight:
        prototypes = prototypes.detach()
    chosen = choose("head_loss", features, classes, dtype, backend)
    if chosen == "reference":
        return head_loss_reference(features, weak, targets, linear, prototypes, *options)
    if not torch.is_grad_enabled():
        # Or the op would compute gradients that nobody asks for.
        features, linear, prototypes = features.detach(), linear.detach(), prototypes.detach()
    loss, *pseudo = _HeadLoss.apply(features, linear, prototypes, weak, targets, *options, chosen)
    return loss, PseudoLabels(*pseudo)
