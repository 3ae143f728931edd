"""Metrics against hand-computed cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from ulfine_fast.metrics import classification_metrics, group_means, mean_and_std, pseudo_label_metrics

# Six classes from 200 to 5 labelled images. By count: 2 many, 2 medium, 2 few; by rank the same.
COUNTS = np.array([200, 101, 100, 20, 19, 5])


def tensors(*rows):
    return tuple(map(torch.tensor, rows))


def test_every_accuracy_of_a_hand_computed_case():
    # class:           0  0  0  0  1  1  2  2  3  4  4  5
    truth = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 4, 5])
    label = torch.tensor([0, 0, 0, 1, 1, 1, 2, 0, 3, 0, 4, 0])
    confidence = torch.full((12,), 0.9)
    got = classification_metrics(label, confidence, truth, COUNTS)
    per_class = [0.75, 1.0, 0.5, 1.0, 0.5, 0.0]
    assert got["per_class"] == per_class
    assert got["overall"] == pytest.approx(8 / 12)
    assert got["macro"] == pytest.approx(sum(per_class) / 6)
    assert got["worst"] == 0.0
    assert got["by_rank"] == pytest.approx({"many": 0.875, "medium": 0.75, "few": 0.25})
    assert got["by_count"] == pytest.approx({"many": 0.875, "medium": 0.75, "few": 0.25})
    floored = [0.75, 1.0, 0.5, 1.0, 0.5, 1e-5]
    assert got["harmonic_mean"] == pytest.approx(6 / sum(1 / x for x in floored))
    assert got["geometric_mean"] == pytest.approx(np.prod(floored) ** (1 / 6))
    assert got["calibration_error"] == pytest.approx(0.9 - 8 / 12, abs=1e-6)
    # F1 by class: precision 3/6, 2/3, 1, 1, 1, 0
    f1 = [
        2 * p * r / (p + r) if p + r else 0 for p, r in zip([0.5, 2 / 3, 1, 1, 1, 0], per_class, strict=True)
    ]
    assert got["macro_f1"] == pytest.approx(np.mean(f1))


def test_figures_are_those_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    # class 3 has no image, class 5 is never predicted, class 4 has neither
    truth = torch.tensor([0, 1, 2, 5])[torch.randint(4, (200,), generator=generator)]
    label = torch.randint(4, (200,), generator=generator)
    got = classification_metrics(label, torch.ones(200), truth, COUNTS)
    assert got["overall"] == pytest.approx(float(multiclass_accuracy(label, truth, 6, average="micro")))
    assert got["macro_f1"] == pytest.approx(float(multiclass_f1_score(label, truth, 6, average="macro")))
    confusion = multiclass_confusion_matrix(label, truth, 6).double()
    share = confusion.diagonal() / confusion.sum(1)
    assert got["per_class"] == [*share[:3].tolist(), None, None, 0.0]


def test_memory_is_linear_in_the_classes():
    """A confusion matrix of so many classes would be 320 GB."""
    label, truth = tensors([0, 199_999, 7], [0, 199_999, 8])
    got = classification_metrics(label, torch.ones(3), truth, np.ones(200_000, dtype=np.int64))
    assert got["macro"] == pytest.approx(2 / 3)
    assert got["macro_f1"] == pytest.approx(2 / 4)


def test_calibration_error_of_two_bins():
    label, truth = tensors([0, 0, 0, 0], [0, 0, 0, 1])
    confidence = torch.tensor([0.95, 0.95, 0.65, 0.65])
    got = classification_metrics(label, confidence, truth, np.array([3, 1]))
    assert got["calibration_error"] == pytest.approx(0.5 * 0.05 + 0.5 * 0.15, abs=1e-6)


def test_confidence_one_is_in_the_last_bin():
    label, truth = tensors([0, 0, 0, 0], [0, 1, 0, 0])
    confidence = torch.tensor([1.0, 1.0, 0.95, 0.95])
    got = classification_metrics(label, confidence, truth, np.array([3, 1]))
    assert got["calibration_error"] == pytest.approx(0.975 - 0.75, abs=1e-6)


@pytest.mark.parametrize(
    ("label", "confidence", "truth", "message"),
    [
        ([0, 6], [0.5, 0.5], [0, 0], r"label must be in 0\.\.5, got 6"),
        ([0, 0], [0.5, 0.5], [0, -1], r"truth must be in 0\.\.5, got -1"),
        ([0, 0], [0.5, 1.5], [0, 0], r"confidence must be in 0\.\.1, got 1.5"),
        ([0, 0], [np.nan, 0.5], [0, 0], r"confidence must be in 0\.\.1, got nan"),
    ],
)
def test_values_must_be_in_their_range(label, confidence, truth, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(*tensors(label, confidence, truth), COUNTS)


def test_a_class_without_test_images_has_no_accuracy_and_does_not_count():
    label, truth = tensors([0, 2, 2], [0, 2, 0])
    got = classification_metrics(label, torch.ones(3), truth, np.array([10, 5, 1]))
    assert got["per_class"] == [0.5, None, 1.0]
    assert got["macro"] == pytest.approx(0.75)
    assert got["worst"] == 0.5
    assert got["by_rank"] == {"many": 0.5, "medium": None, "few": 1.0}
    assert got["by_count"] == {"many": None, "medium": None, "few": pytest.approx(0.75)}


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"three vectors \[N\], N >= 1, got \[2\], \[2\], \[3\]"):
        classification_metrics(torch.zeros(2).long(), torch.zeros(2), torch.zeros(3).long(), COUNTS)
    with pytest.raises(ValueError, match="N >= 1"):
        classification_metrics(torch.zeros(0).long(), torch.zeros(0), torch.zeros(0).long(), COUNTS)


def test_group_means_leave_unknown_classes_out():
    groups = np.array(["many", "few", "few", "medium"])
    got = group_means(np.array([0.2, np.nan, 0.6, np.nan]), groups)
    assert got == {"many": 0.2, "medium": None, "few": 0.6}


def test_pseudo_labels_of_a_hand_computed_case():
    few = torch.tensor([False, False, True])
    label, truth = tensors([0, 0, 1, 2, 2, 2, -1, 0], [0, 1, 1, 2, 0, 2, 2, -1])
    keep = torch.tensor([True, True, True, True, True, False, False, True])
    got = pseudo_label_metrics(label, keep, truth, few)
    # seven rows with a known truth, five kept, three of them right
    assert got == pytest.approx(
        {
            "acceptance": 5 / 7,
            "precision": 3 / 5,
            "recall": 3 / 7,
            "precision_few": 1 / 2,
            "recall_few": 1 / 3,
        }
    )


def test_pseudo_labels_when_nothing_is_kept_or_known():
    few = torch.tensor([False, True])
    label, truth = tensors([0, 1], [0, 0])
    got = pseudo_label_metrics(label, torch.zeros(2, dtype=torch.bool), truth, few)
    assert got["acceptance"] == 0.0
    assert got["precision"] is None
    assert got["precision_few"] is None
    assert got["recall_few"] is None
    unknown = pseudo_label_metrics(label, torch.ones(2, dtype=torch.bool), torch.full((2,), -1), few)
    assert set(unknown.values()) == {None}


def test_mean_and_sample_deviation():
    assert mean_and_std([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0}
    assert mean_and_std([1.0, None, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5)}
    assert mean_and_std([0.5]) == {"mean": 0.5, "std": None}
    assert mean_and_std([None]) == {"mean": None, "std": None}
