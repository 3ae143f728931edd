"""What a user would write without this library: the whole head step in PyTorch, twice.

`naive` is the method term by term as its formulas stand: two products per view, a C x C Gram matrix, every row
computed, every prototype updated.
`smart` is the same function after the algebra that this library rests on, written by someone who knows it:
branches folded into one matrix where that is exact, the smaller Gram matrix, branch scales from a sample of
rows and, in eager mode, rejected rows dropped. Both are measured eager and compiled; both compute what the
library's step computes, and the benchmarks check that they agree before timing anything.
"""

from __future__ import annotations

import torch
from shapes import (
    ALIGN,
    BETA,
    ETA,
    GAMMA,
    MU,
    ORTHOGONALITY_WEIGHT,
    SCALE,
    SCALE_ROWS,
    StepInputs,
)
from torch import Tensor
from torch.nn import functional as F

from ulfine_fast.head_loss import head_loss
from ulfine_fast.ops import proto_fit_


def fused_loss(rows, weak, targets, linear, textual, adjustment, threshold: float, loss_on: str):
    """Loss, pseudo-label histogram and branch scales of the step through this library."""
    loss, pseudo = head_loss(
        rows,
        weak,
        targets,
        linear,
        textual,
        threshold,
        adjustment=adjustment,
        align=ALIGN,
        eta=ETA,
        linear_scale=SCALE,
        proto_scale=SCALE,
        scale_rows=SCALE_ROWS,
        loss_on=loss_on,
        orthogonality_weight=ORTHOGONALITY_WEIGHT,
    )
    return loss, pseudo.histogram, pseudo.branch_scale


def fused_update(rows, targets, histogram, textual, visual, seen, distribution) -> None:
    """Estimators of the step through this library, in place."""
    proto_fit_(
        rows[: len(targets)],
        targets,
        histogram,
        textual,
        visual,
        seen,
        distribution,
        mu=MU,
        beta=BETA,
        gamma=GAMMA,
    )


def naive_loss(rows, weak, targets, linear, textual, adjustment, threshold: float, loss_on: str):
    """Loss, pseudo-label histogram and branch scales of the step, term by term."""
    w, t = F.normalize(linear, dim=-1), F.normalize(textual, dim=-1)
    fixed = t.detach()

    def branches(features):
        x = F.normalize(features, dim=-1)
        return SCALE * F.linear(x, w), SCALE * F.linear(x, fixed)

    def fuse(zl, zt):
        return ETA * zl + (1 - ETA) * ALIGN * zt

    with torch.no_grad():
        zl, zt = branches(weak)
        confidence, label = fuse(zl, zt).softmax(-1).max(-1)
        mask = (confidence >= threshold).to(zl.dtype)
        histogram = torch.zeros_like(adjustment).index_add_(0, label, torch.ones_like(confidence))
        scales = torch.stack([z[:SCALE_ROWS].std(-1, correction=0).mean() for z in (zl, zt)])

    def cross_entropy(z, of, shift, reduction):
        z = [fuse(*z)] if loss_on == "fused" else z
        return sum(F.cross_entropy(b + shift, of, reduction=reduction) for b in z)

    labelled = len(targets)
    supervised = cross_entropy(branches(rows[:labelled]), targets, adjustment, "mean")
    consistency = (cross_entropy(branches(rows[labelled:]), label, 0.0, "none") * mask).mean()
    classes = t.shape[0]
    gram = t @ t.T
    off_diagonal = gram.square().sum() - gram.diagonal().square().sum()
    loss = supervised + consistency + ORTHOGONALITY_WEIGHT * off_diagonal / (classes * (classes - 1))
    return loss, histogram, scales


def smart_loss(rows, weak, targets, linear, textual, adjustment, threshold: float, loss_on: str, drop: bool):
    """The same after the exact identities; `drop` leaves rejected strong rows out (not compilable)."""
    w, t = F.normalize(linear, dim=-1), F.normalize(textual, dim=-1)
    fixed = t.detach()
    fold = ETA * SCALE * w + (1 - ETA) * ALIGN * SCALE * fixed
    classes, dim = t.shape

    with torch.no_grad():
        x = F.normalize(weak, dim=-1)
        z = F.linear(x, fold)
        top, label = z.max(-1)
        confidence = (top - z.logsumexp(-1)).exp()
        keep = confidence >= threshold
        histogram = torch.zeros_like(adjustment).index_add_(0, label, torch.ones_like(confidence))
        sample = x[:SCALE_ROWS]
        scales = torch.stack(
            [(SCALE * F.linear(sample, bank)).std(-1, correction=0).mean() for bank in (w, fixed)]
        )

    labelled, unlabelled = len(targets), len(weak)
    if drop:
        kept = keep.nonzero().squeeze(-1)
        rows = torch.cat([rows[:labelled], rows[labelled:][kept]])
        of = torch.cat([targets, label[kept]])
        weights = 1.0 / unlabelled
    else:
        of = torch.cat([targets, label])
        weights = keep / unlabelled
    x = F.normalize(rows, dim=-1)
    banks = (fold,) if loss_on == "fused" else (SCALE * w, SCALE * fixed)
    loss = rows.new_zeros(())
    for bank in banks:
        z = F.linear(x, bank)
        loss = loss + F.cross_entropy(z[:labelled] + adjustment, of[:labelled])
        consistency = F.cross_entropy(z[labelled:], of[labelled:], reduction="none")
        loss = loss + (consistency * weights).sum()
    gram = t @ t.T if classes <= dim else t.T @ t
    off_diagonal = gram.square().sum() - classes
    loss = loss + ORTHOGONALITY_WEIGHT * off_diagonal / (classes * (classes - 1))
    return loss, histogram, scales


@torch.no_grad()
def update(rows, targets, histogram, textual, visual, seen, distribution) -> None:
    """Estimators of the step, in place, over all classes."""
    distribution.mul_(GAMMA).add_(histogram / histogram.sum(), alpha=1 - GAMMA)
    x = F.normalize(rows[: len(targets)], dim=-1)
    sums = torch.zeros_like(visual).index_add_(0, targets, x)
    counts = torch.zeros_like(distribution).index_add_(0, targets, torch.ones_like(x[:, 0]))[:, None]
    present = counts > 0
    means = sums / counts.clamp_min(1)
    running = torch.where(seen[:, None], BETA * visual + (1 - BETA) * means, means)
    visual.copy_(torch.where(present, running, visual))
    seen.logical_or_(present.squeeze(-1))
    alpha = (MU * distribution / distribution.max())[:, None]
    blend = (1 - alpha) * F.normalize(textual, dim=-1) + alpha * F.normalize(visual, dim=-1)
    textual.copy_(torch.where(present, F.normalize(blend, dim=-1), textual))


@torch.no_grad()
def sparse_update(rows, targets, histogram, textual, visual, seen, distribution) -> None:
    """`update` that touches the classes of the batch alone (their number is data-dependent: not compilable)."""
    distribution.mul_(GAMMA).add_(histogram / histogram.sum(), alpha=1 - GAMMA)
    present, inverse, counts = targets.unique(return_inverse=True, return_counts=True)
    x = F.normalize(rows[: len(targets)], dim=-1)
    means = x.new_zeros(len(present), x.shape[1]).index_add_(0, inverse, x) / counts[:, None]
    old = visual[present]
    new = torch.where(seen[present, None], BETA * old + (1 - BETA) * means, means)
    visual.index_copy_(0, present, new)
    seen[present] = True
    alpha = (MU * distribution[present] / distribution.max())[:, None]
    blend = (1 - alpha) * F.normalize(textual[present], dim=-1) + alpha * F.normalize(new, dim=-1)
    textual.index_copy_(0, present, F.normalize(blend, dim=-1))


def step(loss_fn, update_fn):
    """A whole step out of one family's loss and update, each eager or compiled.

    Gradients are in `.grad`, the state is updated in place.
    """

    def run(s: StepInputs, loss_on: str) -> Tensor:
        loss, histogram, _ = loss_fn(
            s.rows, s.weak, s.targets, s.linear, s.textual, s.adjustment, s.threshold, loss_on
        )
        loss.backward()
        update_fn(s.rows.detach(), s.targets, histogram, s.textual, s.visual, s.seen, s.distribution)
        return loss

    return run


def smart_without_drop(*arguments):
    """`smart_loss` with static shapes, for torch.compile."""
    return smart_loss(*arguments, drop=False)


def smart_with_drop(*arguments):
    """`smart_loss` with rejected rows dropped, for eager mode."""
    return smart_loss(*arguments, drop=True)


def steps() -> dict[str, object]:
    """Every provider of the head step by name, the library's first."""
    return {
        "fused": step(fused_loss, fused_update),
        "naive eager": step(naive_loss, update),
        "naive compiled": step(
            torch.compile(naive_loss, fullgraph=True), torch.compile(update, fullgraph=True)
        ),
        "smart eager": step(smart_with_drop, sparse_update),
        "smart compiled": step(
            torch.compile(smart_without_drop, fullgraph=True), torch.compile(update, fullgraph=True)
        ),
    }
