"""Classifiers without gradient steps: what frozen features give before anything is trained."""

from __future__ import annotations

import torch
from engine import Recipe, train, unit
from torch import Tensor
from torch.nn import functional as F

from ulfine_fast.config import Training
from ulfine_fast.features import FeatureData


def class_sums(data: FeatureData) -> tuple[Tensor, Tensor]:
    """Sums of the labelled features of each class [C, D], and their numbers [C, 1]."""
    x = data.labelled[0]
    sums = torch.zeros_like(data.prototypes).index_add_(0, data.labels, x)
    return sums, data.labelled_counts.float()[:, None]


def tip_adapter(data: FeatureData, *, alpha: float, beta: float, scale: float = 25.0) -> Tensor:
    """Zero-shot logits plus a cache of the labelled features, each class with the same weight.

    Source: Tip-Adapter (arXiv 2111.03930) without training; the weights by class are ours, for long tails.
    """
    affinity = torch.exp(-beta * (1.0 - data.test @ data.labelled[0].T))
    votes = F.one_hot(data.labels, len(data.class_names)).float() / data.labelled_counts[data.labels, None]
    return scale * data.test @ unit(data.prototypes).T + alpha * affinity @ votes


def discriminant(data: FeatureData, *, shrinkage: float, alpha: float, scale: float = 25.0) -> Tensor:
    """Gaussian discriminant analysis with one covariance for all classes, plus zero-shot logits.

    Source: Wang et al. (arXiv 2402.04087). The covariance is that within classes plus `shrinkage` times its
    mean diagonal; every class has the same prior.
    """
    sums, counts = class_sums(data)
    means = sums / counts
    off = data.labelled[0] - means[data.labels]
    covariance = off.T @ off / len(off)
    covariance += shrinkage * covariance.diagonal().mean() * torch.eye(len(covariance))
    weights = torch.linalg.solve(covariance, means.T).T
    logits = data.test @ weights.T - 0.5 * (weights * means).sum(-1)
    return logits + alpha * scale * data.test @ unit(data.prototypes).T


def debiased(data: FeatureData, recipe: Recipe, schedule: Training, *, scale: float) -> Tensor:
    """Logits of a trained head plus zero-shot logits freed of their own class prior.

    Source: generalised logit adjustment (arXiv 2310.08106). The prior of the zero-shot classifier is the one that
    makes its mean prediction uniform over the labelled examples, each class weighing the same.
    """
    rows = 1.0 / data.labelled_counts.float()[data.labels, None]
    rows = rows / rows.sum()
    text = unit(data.prototypes)
    z = scale * data.labelled[0] @ text.T
    log_prior = torch.zeros(len(text))
    for _ in range(100):
        mean = ((z - log_prior).softmax(-1) * rows).sum(0)
        log_prior += (mean * len(text)).log()
    return train(data, recipe, schedule).logits + scale * data.test @ text.T - log_prior
