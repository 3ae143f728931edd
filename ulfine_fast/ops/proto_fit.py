"""Prototype adaptive fitting: textual prototypes absorb visual class means as far as the classes are predicted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ulfine_fast import _cuda, _native
from ulfine_fast.backend import choose
from ulfine_fast.ops import _checks
from ulfine_fast.ops._rows import ZERO_NORM_SQUARED, add_by_class_, unit_rows, without_autocast, working_dtype

# Norm of the blended prototype below which text and vision point against each other: the old one stays.
SMALLEST_BLEND = 1e-6


class FittedPrototypes(NamedTuple):
    """State of the fitting over C classes of D dimensions."""

    textual: Tensor  # [C, D] prototypes of the textual branch; unit rows where they were touched
    visual: Tensor  # [C, D] running class means of unit labelled features
    seen: Tensor  # [C] bool, whether the class had a labelled feature yet
    distribution: Tensor  # [C] running distribution of the pseudo-labels, P_u; zeros before the first


@without_autocast
def proto_fit_reference(
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
) -> FittedPrototypes:
    """The definition; see `proto_fit`."""
    with torch.no_grad():
        dtype = working_dtype(features, textual, visual, distribution)
        classes = textual.shape[0]
        mass = histogram.to(dtype)
        total = mass.sum()
        share = gamma * distribution + (1.0 - gamma) * mass / torch.where(total > 0, total, 1.0)
        share = torch.where(total > 0, share, distribution.to(dtype))

        used = (targets >= 0) & (targets < classes)
        # An ignored row takes no part even if it is not finite: NaN * 0 would be NaN.
        x = torch.where(used[:, None], unit_rows(features, dtype), 0.0)
        rows = torch.where(used, targets, 0)
        count = add_by_class_(torch.zeros(classes, dtype=dtype, device=x.device), rows, used.to(dtype))
        present = count > 0
        sums = add_by_class_(torch.zeros_like(textual, dtype=dtype), rows, x)
        mean = sums / count.clamp_min(1.0)[:, None]
        running = torch.where(seen[:, None], beta * visual + (1.0 - beta) * mean, mean)
        running = torch.where(present[:, None], running, visual.to(dtype))

        largest = share.max()
        alpha = torch.where(largest > 0, mu * share / torch.where(largest > 0, largest, 1.0), 0.0)[:, None]
        blend = (1.0 - alpha) * unit_rows(textual, dtype) + alpha * unit_rows(running, dtype)
        norm = blend.norm(dim=-1, keepdim=True)
        has_mean = running.square().sum(-1, keepdim=True) > ZERO_NORM_SQUARED
        touched = present[:, None] & has_mean & (norm >= SMALLEST_BLEND) & norm.isfinite()
        fitted = torch.where(touched, blend / norm.clamp_min(SMALLEST_BLEND), textual.to(dtype))
        return FittedPrototypes(
            fitted.to(textual.dtype),
            running.to(visual.dtype),
            seen | present,
            share.to(distribution.dtype),
        )


torch.library.define(
    "ulfine::_proto_fit_",
    "(Tensor features, Tensor targets, Tensor histogram, Tensor(a!) textual, Tensor(b!) visual, "
    "Tensor(c!) seen, Tensor(d!) distribution, float mu, float beta, float gamma, str backend) -> ()",
)


@torch.library.register_fake("ulfine::_proto_fit_")
def _(features, targets, histogram, textual, visual, seen, distribution, mu, beta, gamma, backend):
    return None


@torch.library.impl("ulfine::_proto_fit_", ("cpu", "cuda"))
def _(*arguments):
    *inputs, backend = arguments
    _, _, _, *state, _, _, _ = inputs
    if backend == "triton":
        from ulfine_fast.kernels.proto_fit import proto_fit_triton_

        proto_fit_triton_(*inputs)
    else:
        (_cuda if backend == "cuda" else _native).proto_fit_(*inputs)
    # The kernel writes behind autograd's back: a graph that saved a state tensor must notice.
    torch.autograd.graph.increment_version(state)


def proto_fit(
    features: Tensor,
    targets: Tensor,
    histogram: Tensor,
    textual: Tensor,
    visual: Tensor,
    seen: Tensor,
    distribution: Tensor,
    *,
    mu: float = 0.05,
    beta: float = 0.9,
    gamma: float = 0.99,
    backend: str | None = None,
) -> FittedPrototypes:
    """New state after one labelled batch; no argument is changed. See `proto_fit_` for the update in place.

        distribution' = gamma * distribution + (1 - gamma) * histogram / sum(histogram)
        for every class k among the targets:
            v_k       = mean of the unit features of class k in the batch
            visual'_k = beta * visual_k + (1 - beta) * v_k        (v_k the first time the class is seen)
            alpha_k   = mu * distribution'_k / max(distribution')
            textual'_k = unit( (1 - alpha_k) * unit(textual_k) + alpha_k * unit(visual'_k) )

    Source: ULFine (arXiv 2505.05062) for c_t <- (1 - alpha) c_t + alpha c_v and alpha_k = mu P_k / max P; which
    classes are touched, the start values and the estimate of P are our choices.

    Args:
        features: [B, D] float; labelled features, any norm up to 1e18, B may be 0.
        targets: [B] int64 below C; a row with a negative one is left out.
        histogram: [C] int64 or float32, at least 0: pseudo-labels of this step per class, as
            `pseudo_label` counts them. All zeros leaves `distribution` as it is.
        textual: [C, D] float32 or float64.
        visual: [C, D] like `textual`; start with zeros.
        seen: [C] bool; start with False.
        distribution: [C] like `textual`; start with zeros, so that a class that was never predicted keeps
            its text (alpha is 0).
        mu: largest step towards the visual prototype, in [0, 1].
        beta: share of the old visual prototype in the running mean, in [0, 1].
        gamma: share of the old distribution in the running one, in [0, 1].
        backend: None (the selected one), "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        FittedPrototypes. Classes that no target names keep their textual and visual prototypes bit by bit;
        so does a textual prototype whose blend has a norm below 1e-6 or is not finite. A feature that is not
        finite makes the visual prototype of its class so, and no other.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device, label or range. RuntimeError: the named back end
        cannot run.
    """
    state = [textual, visual, seen, distribution]
    options = _check(features, targets, histogram, *state, mu, beta, gamma)
    chosen = choose("proto_fit", features, len(textual), working_dtype(features, textual), backend)
    if chosen == "reference":
        return proto_fit_reference(features, targets, histogram, *state, *options)
    state = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in state]
    torch.ops.ulfine._proto_fit_.default(features.detach(), targets, histogram, *state, *options, chosen)
    return FittedPrototypes(*state)


def proto_fit_(
    features: Tensor,
    targets: Tensor,
    histogram: Tensor,
    textual: Tensor,
    visual: Tensor,
    seen: Tensor,
    distribution: Tensor,
    *,
    mu: float = 0.05,
    beta: float = 0.9,
    gamma: float = 0.99,
    backend: str | None = None,
) -> None:
    """`proto_fit` that writes the new state into `textual`, `visual`, `seen` and `distribution`.

    They must be contiguous; nothing else is changed. Arguments and errors are those of `proto_fit`.
    """
    state = [textual, visual, seen, distribution]
    options = _check(features, targets, histogram, *state, mu, beta, gamma)
    for name, tensor in zip(FittedPrototypes._fields, state, strict=True):
        if not tensor.is_contiguous():
            raise ValueError(f"proto_fit_: {name} must be contiguous to be written in place")
    with torch.no_grad():
        chosen = choose("proto_fit", features, len(textual), working_dtype(features, textual), backend)
        if chosen == "reference":
            new = proto_fit_reference(features, targets, histogram, *state, *options)
            for tensor, value in zip(state, new, strict=True):
                tensor.copy_(value)
            return
        torch.ops.ulfine._proto_fit_.default(features, targets, histogram, *state, *options, chosen)


def _check(features, targets, histogram, textual, visual, seen, distribution, mu, beta, gamma):
    op = "proto_fit"
    _checks.matrix(op, "features", features)
    _checks.bank(op, "textual", textual, features.shape[1])
    classes, dim = textual.shape
    _checks.labels(op, "targets", targets, features.shape[0], classes)
    _checks.vector(op, "histogram", histogram, classes, (torch.int64, torch.float32))
    _checks.of_dtype(op, "textual", textual, (torch.float32, torch.float64))
    _checks.matrix(op, "visual", visual, classes, dim)
    _checks.vector(op, "seen", seen, classes, (torch.bool,))
    _checks.vector(op, "distribution", distribution, classes, (textual.dtype,))
    _checks.of_dtype(op, "visual", visual, (textual.dtype,))
    _checks.same_device(
        op,
        features,
        targets=targets,
        histogram=histogram,
        textual=textual,
        visual=visual,
        seen=seen,
        distribution=distribution,
    )
    for name, value in (("mu", mu), ("beta", beta), ("gamma", gamma)):
        _checks.between(op, name, value, 0.0, 1.0)
    return float(mu), float(beta), float(gamma)
