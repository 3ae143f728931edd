"""The weight of the linear branch, chosen by cross-validation on the labelled images before training.

How far a probe may leave the prototypes depends on the features: with few examples in a space where class means say
most, a probe of much weight overfits; where classes are no balls around their means it is what classifies. The loss on
labelled images that were held out tells the two apart; see docs/accuracy.md. Our choice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ulfine_fast.config import Method, Schedule
from ulfine_fast.learners.dual import build_head
from ulfine_fast.losses import labelled_log_prior
from ulfine_fast.ops._rows import unit_rows
from ulfine_fast.optimizer import learning_rate, set_learning_rate
from ulfine_fast.trainer import Batches, LabelledClasses, build_optimizer, train_step

if TYPE_CHECKING:
    from ulfine_fast.features import FeatureData
    from ulfine_fast.head import DualHead

ETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
# Of labelled rows alone. 100 steps and a fourth fold choose the same in 9 of 12 splits of docs/accuracy.md and
# cost twice as much.
STEPS = 60
# Share of the old branch scales: they follow a probe that moves fast.
SCALE_DECAY = 0.9


def choose_eta(
    data: FeatureData, method: Method, schedule: Schedule, device: str | torch.device = "cpu"
) -> dict[float, float]:
    """Mean cross-entropy on held-out labelled images, in nats, for each candidate; the smallest one is the choice.

    For each of `method.eta_folds` folds and each candidate a head is fitted to the other folds: prototypes as
    `method` fits them to labelled images alone, the probe in 60 steps with the rest of `schedule`. A held-out
    image is judged by the fused logits plus the labelled prior, what the labelled loss trains; images are plain
    (their first weak view). No unlabelled and no test image takes part.

    Raises ValueError for fewer labelled images than folds.
    """
    folds = _folds(data.labels, method.eta_folds, schedule.seed)
    log_prior = method.adjust_labelled * labelled_log_prior(data.labelled_counts).to(device)
    totals = torch.zeros(len(ETAS), dtype=torch.float64, device=device)
    for fold in range(method.eta_folds):
        held_out = folds == fold
        part = _labelled_part(data, ~held_out)
        features, labels = data.labelled[0, held_out].to(device), data.labels[held_out].to(device)
        for number, eta in enumerate(ETAS):
            head = _fit(part, replace(method, eta=eta, eta_folds=0), schedule, device)
            logits = head(features) + log_prior
            totals[number] += F.cross_entropy(logits.double(), labels, reduction="sum")
    return dict(zip(ETAS, (totals / len(data.labels)).tolist(), strict=True))


def settle_eta(
    data: FeatureData, method: Method, schedule: Schedule, device: str | torch.device = "cpu"
) -> Method:
    """`method` with eta settled: the choice of `choose_eta`, or as it is without `eta_folds`."""
    if not method.eta_folds:
        return method
    losses = choose_eta(data, method, schedule, device)
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


def _labelled_part(data: FeatureData, chosen: Tensor) -> FeatureData:
    """The labelled images `chosen` [n] bool, and no unlabelled ones."""
    labels = data.labels[chosen]
    return replace(
        data,
        labelled=data.labelled[:, chosen],
        labels=labels,
        labelled_counts=torch.bincount(labels, minlength=len(data.class_names)),
    )


def _fit(data: FeatureData, method: Method, schedule: Schedule, device: str | torch.device) -> DualHead:
    method = replace(method, unlabelled_weight=0.0, orthogonality_weight=0.0)
    schedule = replace(schedule, steps=STEPS)
    head = build_head(data.prototypes, method, schedule.seed).to(device)
    if method.fitting == "posterior":
        _fit_prototypes(head, data, method)
    optimizer = build_optimizer(head, method, schedule)
    batches = Batches(data, method, schedule, head.linear.device)
    counts = data.labelled_counts.to(device)
    classes = LabelledClasses(counts, labelled_log_prior(counts))
    for step in range(STEPS):
        set_learning_rate(optimizer, learning_rate(schedule, step))
        batch = batches(step)
        scales = head.pseudo_label(
            batch.labelled, method.threshold, scale_rows=method.scale_rows
        ).branch_scale
        head.state.measure(scales, SCALE_DECAY)
        train_step(head, optimizer, batch, method, classes)
    return head


def _fit_prototypes(head: DualHead, data: FeatureData, method: Method) -> None:
    """Posterior means of the labelled images alone."""
    state = head.state
    device = state.text.device
    counts = data.labelled_counts.to(device)
    rows = unit_rows(data.labelled[0].to(device), state.text.dtype)
    sums = torch.zeros_like(state.text).index_add_(0, data.labels.to(device), rows)
    state.visual.copy_(sums / counts.clamp_min(1)[:, None])
    state.seen.copy_(counts > 0)
    none = head.pseudo_label(rows[:0], method.threshold)
    state.refit(rows[:0], none, counts, strength=method.strength, unlabelled_mass=0.0, gamma=1.0)
