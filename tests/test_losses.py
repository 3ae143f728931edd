"""Supervised long-tailed losses against their formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ulfine_fast.losses import LOSSES, cross_entropy, focal, lade, ldam, logit_adjustment

COUNTS = torch.tensor([50, 12, 5, 1])


def batch(counts=COUNTS, rows=9, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(rows, len(counts), generator=random, dtype=torch.float64)
    targets = torch.multinomial((counts > 0).double(), rows, replacement=True, generator=random)
    return logits.to(dtype), targets


def row_losses(z, y):
    return np.array([np.log(np.exp(row - row[k]).sum()) for row, k in zip(z, y, strict=True)])


def mean_one(weights):
    return weights / weights.mean()


def ldam_logits(z, y, n):
    z = z.copy()
    for row, k in zip(z, y, strict=True):
        row[k] -= 25.0 * 0.5 * (n[k] / n.min()) ** -0.25
    return z


def lade_by_loops(z, y, n):
    prior = n / n.sum()
    bound = 0.0
    for k in range(len(n)):
        mean = np.mean([math.exp(row[k]) / (len(n) * prior[label]) for row, label in zip(z, y, strict=True)])
        own = [row[k] for row, label in zip(z, y, strict=True) if label == k]
        bound += prior[k] * (math.log(mean) + 0.1 * math.log(mean) ** 2 - (np.mean(own) if own else 0.0))
    return row_losses(z + np.log(prior), y).mean() + 0.1 * bound


FORMULAS = {
    "cross_entropy": lambda z, y, n: row_losses(z, y).mean(),
    "focal": lambda z, y, n: ((1 - np.exp(-row_losses(z, y))) ** 2 * row_losses(z, y)).mean(),
    "ldam": lambda z, y, n: row_losses(ldam_logits(z, y, n), y).mean(),
    "class_balanced": lambda z, y, n: (mean_one((1 - 0.9999) / (1 - 0.9999**n))[y] * row_losses(z, y)).mean(),
    "grw": lambda z, y, n: (mean_one(n.sum() / n)[y] * row_losses(z, y)).mean(),
    "balanced_softmax": lambda z, y, n: row_losses(z + np.log(n), y).mean(),
    "logit_adjustment": lambda z, y, n: row_losses(z + np.log(n / n.sum()), y).mean(),
    "lade": lade_by_loops,
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_its_formula(name):
    logits, targets = batch()
    expected = FORMULAS[name](logits.double().numpy(), targets.numpy(), COUNTS.double().numpy())
    loss = LOSSES[name](logits, targets, COUNTS)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("counts", [COUNTS, torch.tensor([7, 0, 3]), torch.tensor([4])])
def test_the_gradient_is_that_of_the_loss(name, counts):
    logits, targets = batch(counts, dtype=torch.float64)
    targets[2] = -1
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, targets, counts), logits.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_a_class_without_images_is_safe_and_changes_no_other(name):
    counts = torch.tensor([0, 8, 3, 0])
    logits, targets = batch(counts)
    logits.requires_grad_()
    loss = LOSSES[name](logits, targets, counts)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and gradient.isfinite().all()
    adjusted = ("logit_adjustment", "balanced_softmax", "lade")
    if name in adjusted:
        few = LOSSES[name](logits[:, 1:3], targets - 1, counts[1:3])
        torch.testing.assert_close(loss, few)
        assert gradient[:, [0, 3]].abs().max() < 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_rows_without_label_add_nothing_but_are_counted(name):
    logits, targets = batch()
    kept = targets.clone()
    kept[::2] = -1
    some = LOSSES[name](logits, kept, COUNTS)
    known = LOSSES[name](logits[1::2], targets[1::2], COUNTS)
    if name == "lade":
        # the bound is a mean over labelled rows, not over all
        plain = logit_adjustment(logits, kept, COUNTS)
        known = known - logit_adjustment(logits[1::2], targets[1::2], COUNTS) + plain
        torch.testing.assert_close(some, known)
    else:
        torch.testing.assert_close(some, known * len(targets[1::2]) / len(targets))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [0, 3])
def test_no_labelled_row_is_no_loss(name, rows):
    logits = torch.randn(rows, 4, requires_grad=True)
    loss = LOSSES[name](logits, torch.full((rows,), -1), COUNTS)
    assert loss == 0
    loss.backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_one_class_leaves_nothing_to_learn(name):
    logits = torch.tensor([[2.0], [-1.0]], requires_grad=True)
    loss = LOSSES[name](logits, torch.tensor([0, 0]), torch.tensor([4]))
    if name != "lade":
        assert loss == 0
    assert loss.isfinite()


def test_balanced_softmax_is_logit_adjustment_with_tau_1():
    logits, targets = batch()
    assert LOSSES["balanced_softmax"](logits, targets, COUNTS) == logit_adjustment(
        logits, targets, COUNTS, tau=1.0
    )
    assert logit_adjustment(logits, targets, COUNTS, tau=0.0) == cross_entropy(logits, targets)


def test_the_smallest_class_has_the_largest_margin():
    logits = torch.zeros(1, 4)
    losses = [float(ldam(logits, torch.tensor([k]), COUNTS)) for k in range(4)]
    assert losses == sorted(losses)
    assert losses[3] == pytest.approx(math.log(3 * math.exp(12.5) + 1), rel=1e-6)


def test_focal_forgets_what_is_learned():
    logits = torch.tensor([[40.0, 0.0]], requires_grad=True)
    loss = focal(logits, torch.tensor([0]), torch.tensor([1, 1]))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_the_bound_of_lade_is_tight_at_the_density_ratio():
    """With z the log density ratio the mean of e^z is 1, so a shift of one class can only raise the loss."""
    density = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], dtype=torch.float64)
    counts = torch.tensor([30, 10])
    points, labels = [], []
    for k in range(2):
        for x in range(3):
            rows = round(float(counts[k] * density[k, x]))
            points += [x] * rows
            labels += [k] * rows
    ratio = (density / density.mean(0)).log().T
    logits, targets = ratio[points], torch.tensor(labels)
    bound = lambda z: lade(z, targets, counts, weight=1.0) - logit_adjustment(z, targets, counts)  # noqa: E731
    best = bound(logits)
    for shift in (-0.2, 0.2):
        assert bound(logits + torch.tensor([shift, 0.0])) > best
