"""What a fine-tuned student says of images: predictions of each branch, over one view or several of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ulfine_fast.learners import Learner
from ulfine_fast.metrics import classification_metrics

CHUNK = 8192


class Predictions(NamedTuple):
    """Predictions over N rows, on the CPU."""

    label: Tensor  # [N] int64
    confidence: Tensor  # [N] float32, softmax probability of the label


def most_likely(logits: Tensor) -> Predictions:
    """The class of the highest logit in each row of [N, C], and its softmax probability, at most 1."""
    top, label = logits.max(-1)
    return Predictions(label.cpu(), (top - logits.logsumexp(-1)).exp().clamp_max(1.0).cpu())


def fused_logits(learner: Learner, features: Tensor) -> Tensor:
    """[n, C] mean over K views of an image of the logits of the learner's prediction (LIFT's test-time ensembling).

    features: [n, K, D]. A head that is one linear map M of the unit feature is applied once, to the mean of the unit
    features: mean_k M x_k = M mean_k x_k.
    """
    folded = learner.folded()
    if folded is None:
        return _mean_over_views(next(iter(learner.branches().values())), features)
    return F.normalize(features.float(), dim=-1).mean(1) @ folded.T


@torch.no_grad()
def predict(learner: Learner, features: Tensor) -> dict[str, Predictions]:
    """Predictions over images of every branch of `learner`, the fused one first. features: [n, K, D], K views."""
    device = next(learner.parameters()).device
    branches: dict[str, Callable[[Tensor], Tensor]] = {
        name: lambda rows, branch=branch: _mean_over_views(branch, rows)
        for name, branch in learner.branches().items()
    }
    branches[next(iter(branches))] = lambda rows: fused_logits(learner, rows)
    found: dict[str, list[Predictions]] = {name: [] for name in branches}
    # a branch has logits of every view
    for rows in features.split(max(CHUNK // features.shape[1], 1)):
        for name, logits_of in branches.items():
            found[name].append(most_likely(logits_of(rows.to(device))))
    return {
        name: Predictions(*(torch.cat(column) for column in zip(*parts, strict=True)))
        for name, parts in found.items()
    }


def metrics(
    predictions: dict[str, Predictions], labels: Tensor, labelled_counts: np.ndarray
) -> dict[str, dict[str, Any]]:
    """`classification_metrics` of every branch."""
    counts = np.asarray(labelled_counts)
    return {name: classification_metrics(*found, labels, counts) for name, found in predictions.items()}


def _mean_over_views(branch: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    images, views = features.shape[:2]
    return branch(features.flatten(0, 1)).view(images, views, -1).mean(1)
