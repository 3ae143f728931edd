"""The weight of the linear branch, chosen by cross-validation on the labelled images before training.

How far a probe may leave the prototypes depends on the features: with few examples in a space where class means say
most, a probe of much weight overfits; where classes are no balls around their means it is what classifies. The loss on
labelled images that were held out tells the two apart; see docs/accuracy.md. Our choice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ulfine_fast.batches import FeatureViews
from ulfine_fast.config import Method, Training
from ulfine_fast.distributed import World
from ulfine_fast.engine import Engine, Student
from ulfine_fast.head import DualHead
from ulfine_fast.learners import Config, build_learner
from ulfine_fast.losses import labelled_log_prior
from ulfine_fast.ops._rows import unit_rows

ETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
# Of labelled rows alone. 100 steps and a fourth fold choose the same in 9 of 12 splits of docs/accuracy.md and
# cost twice as much.
STEPS = 60
# Share of the old branch scales: they follow a probe that moves fast.
SCALE_DECAY = 0.9

AnyMethod = TypeVar("AnyMethod", bound=Method | Config)


def choose_eta(
    features: Tensor, labels: Tensor, prototypes: Tensor, method: Method, training: Training
) -> dict[float, float]:
    """Mean cross-entropy on held-out labelled images, in nats, for each candidate; the smallest one is the choice.

    For each of `method.eta_folds` folds and each candidate a head is fitted to the other folds: prototypes as
    `method` fits them to labelled images alone, the probe in 60 steps with the rest of `training`. A held-out
    image is judged by the fused logits plus the labelled prior, what the labelled loss trains; images are plain
    (their first view). No unlabelled and no test image takes part.

    features: [K, n, D] views of the labelled images; labels: [n] int64; prototypes: [C, D], where the work is done.

    Raises ValueError for fewer labelled images than folds.
    """
    device, classes = prototypes.device, len(prototypes)
    features, labels = features.to(device), labels.to(device)
    folds = _folds(labels.cpu(), method.eta_folds, training.seed).to(device)
    log_prior = method.adjust_labelled * labelled_log_prior(torch.bincount(labels, minlength=classes))
    totals = torch.zeros(len(ETAS), dtype=torch.float64, device=device)
    for fold in range(method.eta_folds):
        held_out = folds == fold
        rest = features[:, ~held_out], labels[~held_out]
        for number, eta in enumerate(ETAS):
            head = _fit(*rest, prototypes, replace(method, eta=eta, eta_folds=0), training)
            logits = head(features[0, held_out]) + log_prior
            totals[number] += F.cross_entropy(logits.double(), labels[held_out], reduction="sum")
    return dict(zip(ETAS, (totals / len(labels)).tolist(), strict=True))


def settle_eta(
    features: Tensor, labels: Tensor, prototypes: Tensor, method: AnyMethod, training: Training
) -> AnyMethod:
    """`method` with eta settled: the choice of `choose_eta`, or as it is without `eta_folds`."""
    if not getattr(method, "eta_folds", 0):
        return method
    losses = choose_eta(features, labels, prototypes, method, training)
    return replace(method, eta=min(losses, key=losses.get), eta_folds=0)


def _folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """[n] fold of each image; every class is spread over the folds as evenly as it goes."""
    if len(labels) < folds:
        raise ValueError(
            f"eta_folds must be at most the number of labelled images, {len(labels)}, got {folds}"
        )
    order = torch.from_numpy(np.random.default_rng((seed, 3)).permutation(len(labels)))
    # shuffled, then by class: neighbours of one class fall into different folds
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty(len(labels), dtype=torch.int64)
    fold[order] = torch.arange(len(labels)) % folds
    return fold


def _fit(
    features: Tensor, labels: Tensor, prototypes: Tensor, method: Method, training: Training
) -> DualHead:
    config = replace(method, unlabelled_weight=0.0, orthogonality_weight=0.0)
    training = replace(training, steps=STEPS, parts=1, look_ahead=False, shard=False, ema=0.0)
    counts = torch.bincount(labels, minlength=len(prototypes))
    learner = build_learner(config, prototypes, counts, seed=training.seed)
    head = learner.head
    if config.fitting == "posterior":
        _fit_prototypes(head, features[0], labels, counts, config.strength)
    # the views are features, which no encoder has to make
    views = FeatureViews(features, labels, training, prototypes.device)
    engine = Engine(Student(nn.Identity(), learner), views, training, World())
    for step in range(STEPS):
        rows = engine.batch(step).labelled
        scales = head.pseudo_label(rows, config.threshold, scale_rows=config.scale_rows).branch_scale
        head.state.measure(scales, SCALE_DECAY)
        engine.step(step)
    return head


def _fit_prototypes(
    head: DualHead, features: Tensor, labels: Tensor, counts: Tensor, strength: float
) -> None:
    """Posterior means of the labelled images alone."""
    state = head.state
    rows = unit_rows(features, state.text.dtype)
    sums = torch.zeros_like(state.text).index_add_(0, labels, rows)
    state.visual.copy_(sums / counts.clamp_min(1)[:, None])
    state.seen.copy_(counts > 0)
    none = head.pseudo_label(rows[:0], 1.0)
    state.refit(rows[:0], none, counts, strength=strength, unlabelled_mass=0.0, gamma=1.0)
