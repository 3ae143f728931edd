"""Cross-entropy of the linear and the prototype branch, labelled and strong rows in one call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ulfine_fast import _cuda, _native
from ulfine_fast.backend import choose
from ulfine_fast.ops import _checks
from ulfine_fast.ops._handover import hand_over, keep, once
from ulfine_fast.ops._rows import without_autocast, working_dtype
from ulfine_fast.ops.pseudo_label import dual_logits_reference, fuse_logits_reference, scalar

LOSS_ON = ("branches", "fused")


@without_autocast
def dual_cross_entropy_reference(
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
) -> Tensor:
    """The definition; see `dual_cross_entropy`. `adjustment` is [G, C]; without `group` row 0 holds for all."""
    classes = linear.shape[0]
    used = (targets >= 0) & (targets < classes) & (weights != 0)
    # An unused row takes no part even if it is not finite: NaN * 0 would be NaN.
    features = torch.where(used[:, None], features, 0.0)
    zl, zt = dual_logits_reference(features, linear, prototypes, linear_scale, proto_scale, normalize_linear)
    shift = zl.new_zeros(())
    if adjustment is not None:
        rows = torch.zeros_like(targets) if group is None else group
        # Nor does its adjustment, whose infinity would meet a weight of 0.
        known = used & (rows >= 0) & (rows < adjustment.shape[0])
        shift = torch.where(known[:, None], adjustment.to(zl.dtype)[torch.where(known, rows, 0)], 0.0)
    branches = (fuse_logits_reference(zl, zt, eta, align),) if fused else (zl, zt)
    target = torch.where(used, targets, 0)
    loss = zl.new_zeros(())
    for z in branches:
        row = F.cross_entropy(z + shift, target, reduction="none")
        loss = loss + (torch.where(used, weights.to(z.dtype), 0.0) * row).sum()
    return loss


torch.library.define(
    "ulfine::_dual_cross_entropy",
    "(Tensor features, Tensor targets, Tensor linear, Tensor prototypes, Tensor weights, Tensor? adjustment, "
    "Tensor? group, Tensor align, float eta, float linear_scale, float proto_scale, bool fused, "
    "bool normalize_linear, bool need_features, bool need_linear, str backend) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("ulfine::_dual_cross_entropy")
def _(
    features,
    targets,
    linear,
    prototypes,
    weights,
    adjustment,
    group,
    align,
    eta,
    linear_scale,
    proto_scale,
    fused,
    normalize_linear,
    need_features,
    need_linear,
    backend,
):
    return (
        features.new_empty((), dtype=torch.float32),
        features.new_empty(features.shape if need_features else 0, dtype=torch.float32),
        features.new_empty(linear.shape if need_linear else 0, dtype=torch.float32),
    )


@torch.library.impl("ulfine::_dual_cross_entropy", ("cpu", "cuda"))
def _(*arguments):
    *inputs, backend = arguments
    if backend == "triton":
        from ulfine_fast.kernels.dual_cross_entropy import dual_cross_entropy_triton

        return dual_cross_entropy_triton(*inputs)
    return (_cuda if backend == "cuda" else _native).dual_cross_entropy(*inputs)


class _DualCrossEntropy(torch.autograd.Function):
    """The op returns the gradients with the loss: recomputing the logits would double the work."""

    @staticmethod
    def forward(ctx, features, linear, targets, prototypes, weights, adjustment, group, align, *rest):
        tensors = features, targets, linear, prototypes, weights, adjustment, group, align
        *options, backend = rest
        ctx.options = *options, *ctx.needs_input_grad[:2], backend
        ctx.dtypes = features.dtype, linear.dtype
        loss, *gradients = torch.ops.ulfine._dual_cross_entropy.default(*tensors, *ctx.options)
        keep(ctx, gradients, tensors)
        return loss

    @staticmethod
    @once("dual_cross_entropy")
    def backward(ctx, grad):
        def again(tensors):
            return torch.ops.ulfine._dual_cross_entropy.default(*tensors, *options)[1:]

        options = ctx.options
        gradients = [
            gradient.to(dtype) if needed else None
            for gradient, dtype, needed in zip(
                hand_over(ctx, grad, again), ctx.dtypes, ctx.needs_input_grad[:2], strict=True
            )
        ]
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - 2)


def dual_cross_entropy(
    features: Tensor,
    targets: Tensor,
    linear: Tensor,
    prototypes: Tensor,
    weights: Tensor | None = None,
    *,
    adjustment: Tensor | None = None,
    group: Tensor | None = None,
    align: float | Tensor = 1.0,
    eta: float = 0.5,
    linear_scale: float = 25.0,
    proto_scale: float = 25.0,
    loss_on: str = "branches",
    normalize_linear: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of the cross-entropies of B rows, differentiable in `features` and `linear`.

        zl_ik = linear_scale * <x_i, w_k>     linear branch,        x, w, t: rows divided by their norm
        zt_ik = proto_scale  * <x_i, t_k>     prototype branch
        branches: loss = sum_i weight_i * [ CE(zl_i + a_g(i), y_i) + CE(zt_i + a_g(i), y_i) ]
        fused:    loss = sum_i weight_i *   CE(eta * zl_i + (1 - eta) * align * zt_i + a_g(i), y_i)

    a_g is the logit adjustment of the row's group, tau * log prior (Menon et al., arXiv 2007.07314): 0 for rows
    without one. Prototypes are fitted, not learned: no gradient flows into them (our choice, as is the default
    of one cross-entropy per branch). Source: the two branches of ULFine (arXiv 2505.05062).

    Rows of weight 0 and rows with a negative target take no part, so pass strong views with
    `weights = keep / B_u`. The kernels compute the gradients along with the loss: a second derivative raises
    RuntimeError there. The cpp back end holds logits of a chunk of rows at a time, and none of rows without part.

    Args:
        features: [B, D] float, any norm up to 1e18, B may be 0 (the loss is then 0).
        targets: [B] int64 below C; a negative one marks a row without label, which is left out.
        linear: [C, D] float; rows of the linear probe.
        prototypes: [C, D] float that does not require grad; textual prototypes, any norm up to 1e18.
        weights: [B] float, the factor of each row; None is 1 / B.
        adjustment: [C] or [G, C] float, added to the logits of a row's group, for example the logarithm of
            the labelled class prior; None is 0. It receives no gradient.
        group: [B] int64, row of `adjustment` for each row, below G; negative is none; None is 0 for all.
        align: factor on the prototype branch in the fused logits; a number or a scalar tensor.
        eta: weight of the linear branch in the fused logits, in [0, 1].
        linear_scale, proto_scale: inverse temperatures of the branches, above 0.
        loss_on: "branches" for one cross-entropy per branch, "fused" for one on the fused logits.
        normalize_linear: True for a cosine probe; False uses the rows of `linear` as they are.
        backend: None (the selected one), "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        Scalar loss in nats, float32 (float64 if features or a bank is). NaN if a row that counts is not finite, or if
        its adjustment is minus infinity for all classes.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device, label or range. RuntimeError: the named back end
        cannot run.
    """
    op = "dual_cross_entropy"
    _checks.matrix(op, "features", features)
    rows = features.shape[0]
    _checks.bank(op, "linear", linear, features.shape[1])
    classes = linear.shape[0]
    _checks.matrix(op, "prototypes", prototypes, classes, features.shape[1])
    if prototypes.requires_grad:
        raise ValueError(f"{op}: prototypes are fitted, not learned; pass prototypes.detach()")
    _checks.labels(op, "targets", targets, rows, classes)
    dtype = working_dtype(features, linear, prototypes)
    if weights is None:
        weights = torch.full((rows,), 1.0 / max(rows, 1), dtype=dtype, device=features.device)
    _checks.vector(op, "weights", weights, rows, _checks.FLOATS)
    if adjustment is not None:
        _checks.tensor(op, "adjustment", adjustment)
        adjustment = adjustment[None] if adjustment.ndim == 1 else adjustment
        _checks.matrix(op, "adjustment", adjustment, columns=classes)
        if adjustment.shape[0] == 0:
            raise ValueError(f"{op}: adjustment must have at least one group, got [0, {classes}]")
    if group is not None:
        if adjustment is None:
            raise ValueError(f"{op}: group selects rows of adjustment, which is None")
        _checks.labels(op, "group", group, rows, adjustment.shape[0])
    align = scalar(op, "align", align, features, dtype)
    _checks.same_device(
        op,
        features,
        targets=targets,
        linear=linear,
        prototypes=prototypes,
        weights=weights,
        adjustment=adjustment,
        group=group,
        align=align,
    )
    _checks.branches(op, eta, linear_scale=linear_scale, proto_scale=proto_scale)
    _checks.flag(op, normalize_linear=normalize_linear)
    weights = weights.detach()
    options = (
        weights,
        None if adjustment is None else adjustment.detach(),
        group,
        align.detach(),
        float(eta),
        float(linear_scale),
        float(proto_scale),
        on_fused(op, loss_on),
        normalize_linear,
    )
    chosen = choose(op, features, classes, dtype, backend)
    if chosen == "reference":
        return dual_cross_entropy_reference(features, targets, linear, prototypes, *options)
    if not torch.is_grad_enabled():
        # Or the op would compute gradients that nobody asks for.
        features, linear = features.detach(), linear.detach()
    return _DualCrossEntropy.apply(features, linear, targets, prototypes, *options, chosen)


def on_fused(op: str, loss_on: str) -> bool:
    """Whether `loss_on` asks for the fused logits."""
    if loss_on not in LOSS_ON:
        raise ValueError(f"{op}: loss_on must be {' or '.join(LOSS_ON)}, got {loss_on!r}")
    return loss_on == "fused"
