"""The choice of eta on held-out labelled images."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from synthetic import small_data
from torch.nn import functional as F

from ulfine_fast import validation
from ulfine_fast.config import METHODS, Training
from ulfine_fast.learners.dual import build_head
from ulfine_fast.validation import ETAS

METHOD = METHODS["ulfine_plus"]
SCHEDULE = Training(labelled_batch=16, learning_rate=0.1)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(validation, "STEPS", 20)


def stretched(data, factor):
    """`data` with noise of `factor` along one direction, which no class mean says anything about."""
    noise = torch.randn(data.labelled.shape[:2], generator=torch.Generator().manual_seed(1))
    direction = F.one_hot(torch.tensor(3), data.labelled.shape[2])
    return replace(data, labelled=F.normalize(data.labelled + factor * noise[..., None] * direction, dim=-1))


def choose_eta(data, *options):
    return validation.choose_eta(data.labelled, data.labels, data.prototypes, *options)


def settle_eta(data, *options):
    return validation.settle_eta(data.labelled, data.labels, data.prototypes, *options)


def choice(losses):
    return min(losses, key=losses.get)


def test_a_probe_gets_more_weight_where_class_means_classify_badly():
    data = small_data()
    assert choice(choose_eta(stretched(data, 2.0), METHOD, SCHEDULE)) > choice(
        choose_eta(data, METHOD, Training(labelled_batch=16))
    )


def test_every_candidate_has_a_loss_and_the_smallest_is_taken():
    data = small_data()
    losses = choose_eta(data, METHOD, SCHEDULE)
    assert tuple(losses) == ETAS
    assert all(math.isfinite(loss) and loss > 0 for loss in losses.values())
    assert len(set(losses.values())) == len(ETAS)
    assert settle_eta(data, METHOD, SCHEDULE) == replace(METHOD, eta=choice(losses), eta_folds=0)


def test_the_same_call_gives_the_same_losses_and_another_seed_others():
    data = small_data()
    first = choose_eta(data, METHOD, SCHEDULE)
    torch.manual_seed(5)
    assert choose_eta(data, METHOD, SCHEDULE) == first
    assert choose_eta(data, METHOD, replace(SCHEDULE, seed=1)) != first


@pytest.mark.parametrize("name", ["ulfine", "lift"])
def test_a_method_without_posterior_means_is_judged_with_its_text(name):
    losses = choose_eta(small_data(), replace(METHODS[name], eta_folds=2), SCHEDULE)
    assert all(math.isfinite(loss) for loss in losses.values())


def test_folds_spread_every_class_evenly():
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 12)
    fold = validation._folds(labels, 3, seed=0)
    for k in range(3):
        sizes = torch.bincount(fold[labels == k], minlength=3)
        assert sizes.max() - sizes.min() <= 1
    assert torch.bincount(fold).tolist() == [7, 7, 7]


def test_a_class_with_one_labelled_image_leaves_every_loss_finite():
    data = small_data()
    keep = (data.labels != 5) | (torch.arange(len(data.labels)) == data.labels.tolist().index(5))
    counts = torch.bincount(data.labels[keep], minlength=6)
    data = replace(data, labelled=data.labelled[:, keep], labels=data.labels[keep], labelled_counts=counts)
    assert counts[5] == 1
    assert all(math.isfinite(loss) for loss in choose_eta(data, METHOD, SCHEDULE).values())


def test_fewer_images_than_folds():
    data = small_data()
    method = replace(METHOD, eta_folds=len(data.labels) + 1)
    with pytest.raises(ValueError, match="eta_folds must be at most the number of labelled images, .*, got"):
        choose_eta(data, method, SCHEDULE)


def test_without_folds_nothing_changes():
    method = METHODS["ulfine"]
    assert settle_eta(small_data(), method, SCHEDULE) is method


def test_a_head_needs_a_settled_eta():
    with pytest.raises(ValueError, match="eta_folds must be 0 for a head, got 3; choose eta with"):
        build_head(small_data().prototypes, METHOD)
