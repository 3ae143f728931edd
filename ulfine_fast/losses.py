"""Supervised losses for long-tailed labels.

Each is `loss(logits, targets, labelled_counts)`, a scalar in nats: the sum over the rows that have a label, divided
by all B rows.

    logits: [B, C] float32 or float64; B may be 0.
    targets: [B] int64 below C; -1 marks a row without label.
    labelled_counts: [C] int64 labelled images n_k of each class in the training set, at least one above 0.

pi_k = n_k / sum n. A class without labelled images gets no weight and no margin, and its log prior is log 1e-12,
which leaves it out of the softmax: loss and gradient stay finite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# A class without labelled images has log 1e-12 for its prior.
SMALLEST_PRIOR = 1e-12


def labelled_log_prior(labelled_counts: Tensor) -> Tensor:
    """[C] float32 log(n_k / sum n); log 1e-12 for a class without labelled images."""
    counts = labelled_counts.to(torch.float64)
    return (counts / counts.sum()).clamp_min(SMALLEST_PRIOR).log().float()


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, classes] in `dtype`, 1 at the label of each row [B] int64; the row of a negative label is 0."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)


def cross_entropy(
    logits: Tensor, targets: Tensor, labelled_counts: Tensor | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """-log softmax(z)_y; the counts are not read.

    label_smoothing: share of the target in [0, 1] that is spread evenly over all classes.
    """
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)
    return loss / max(len(targets), 1)


def focal(logits: Tensor, targets: Tensor, labelled_counts: Tensor, *, gamma: float = 2.0) -> Tensor:
    """(1 - p_y)^gamma * -log p_y with p = softmax(z) and gamma at least 1 (arXiv 1708.02002)."""
    row = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    # 1 - p_y without cancellation
    missed = -torch.expm1(-row)
    return (missed**gamma * row).sum() / max(len(targets), 1)


def ldam(
    logits: Tensor,
    targets: Tensor,
    labelled_counts: Tensor,
    *,
    scale: float = 25.0,
    largest_margin: float = 0.5,
) -> Tensor:
    """Cross-entropy after scale * m_y is taken from the logit of the target (arXiv 1906.07413).

    m_k = largest_margin * (n_k / min n)^(-1/4), a difference of cosines; scale: inverse temperature of the logits.
    """
    counts = labelled_counts.to(logits.dtype)
    rarity = torch.where(counts > 0, counts, torch.inf) ** -0.25
    margins = scale * largest_margin * rarity / rarity.max()
    return cross_entropy(logits - margins * one_hot(targets, len(counts), logits.dtype), targets)


def class_balanced(
    logits: Tensor, targets: Tensor, labelled_counts: Tensor, *, beta: float = 0.9999
) -> Tensor:
    """w_y * cross-entropy with w_k ~ (1 - beta) / (1 - beta^n_k), beta in [0, 1) (arXiv 1901.05555).

    The mean of w over the classes with labelled images is 1.
    """
    return _weighted(logits, targets, (1.0 - beta) / (1.0 - beta ** labelled_counts.double()))


def grw(logits: Tensor, targets: Tensor, labelled_counts: Tensor) -> Tensor:
    """w_y * cross-entropy with w_k ~ 1 / pi_k, generalised re-weighting of exponent 1 (arXiv 2103.16370).

    The mean of w over the classes with labelled images is 1.
    """
    return _weighted(logits, targets, 1.0 / labelled_counts.double())


def logit_adjustment(logits: Tensor, targets: Tensor, labelled_counts: Tensor, *, tau: float = 1.0) -> Tensor:
    """Cross-entropy of z + tau log pi, tau at least 0 (arXiv 2007.07314)."""
    return cross_entropy(logits + tau * labelled_log_prior(labelled_counts).to(logits.dtype), targets)


def balanced_softmax(logits: Tensor, targets: Tensor, labelled_counts: Tensor) -> Tensor:
    """Cross-entropy of z + log n (arXiv 2007.10740), which is `logit_adjustment` with tau 1."""
    return logit_adjustment(logits, targets, labelled_counts)


def lade(
    logits: Tensor,
    targets: Tensor,
    labelled_counts: Tensor,
    *,
    remine: float = 0.1,
    weight: float = 0.1,
) -> Tensor:
    """`balanced_softmax` + weight * sum_k pi_k (r_k + remine r_k^2 - a_k) (LADE, arXiv 2012.00321).

    a_k: mean of z_k over the rows of class k, 0 without one. r_k: logarithm of the mean of e^(z_k) over all rows
    with a label, a row of class y weighed by 1 / (C pi_y), as if the C classes with labelled images were equally
    frequent. The term is smallest where z_k is log p(x | k) less the logarithm of its mean over the classes.
    """
    loss = balanced_softmax(logits, targets, labelled_counts)
    if not len(targets):
        return loss
    present = labelled_counts > 0
    members = one_hot(targets, len(present), logits.dtype)  # [B, C]
    log_prior = labelled_log_prior(labelled_counts).to(logits.dtype)
    labelled = members.sum()
    # e^-1e4 is 0 and, unlike e^-inf, has a gradient where no row has a label
    importance = torch.where(targets < 0, -1e4, -present.sum().log() - log_prior[targets])
    ratio = (logits + importance[:, None]).logsumexp(0) - labelled.clamp_min(1.0).log()
    own = (members * logits).sum(0) / members.sum(0).clamp_min(1.0)
    bound = torch.where(present, log_prior.exp() * (ratio + remine * ratio**2 - own), 0.0)
    return loss + weight * bound.sum() * (labelled > 0)


def _weighted(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy with class weights [C] float64 of mean 1; an infinite one is of a class that has no images."""
    present = weights.isfinite()
    weights = torch.where(present, weights, 0.0)
    weights = (weights * present.sum() / weights.sum()).to(logits.dtype)
    loss = F.cross_entropy(logits, targets, weights, ignore_index=-1, reduction="sum")
    return loss / max(len(targets), 1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "focal": focal,
    "ldam": ldam,
    "class_balanced": class_balanced,
    "grw": grw,
    "balanced_softmax": balanced_softmax,
    "logit_adjustment": logit_adjustment,
    "lade": lade,
}
