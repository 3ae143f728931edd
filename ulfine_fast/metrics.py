"""Accuracy under a long tail: per class, by groups of classes, means over classes, calibration.

Every accuracy is a fraction in [0, 1]. None stands for what has no value, for example a group without classes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.splits import groups_by_count, groups_by_rank

GROUPS = ("many", "medium", "few")
CALIBRATION_BINS = 15
# A class without one correct image would make the harmonic and geometric mean 0 whatever the others do.
SMALLEST_ACCURACY = 1e-5


def classification_metrics(
    label: Tensor, confidence: Tensor, truth: Tensor, labelled_counts: np.ndarray
) -> dict[str, Any]:
    """Every figure of a classifier over C classes.

    Args:
        label: [N] int64 predictions in 0..C-1. confidence: [N] float of the predictions, in [0, 1].
        truth: [N] int64 in 0..C-1. labelled_counts: [C] labelled training images of each class.

    Returns:
        overall: correct / N. macro: mean of the per-class accuracies. macro_f1: mean F1 of the classes that have
        test images or predictions. per_class: list [C], None for a class without test images. worst,
        harmonic_mean, geometric_mean: over the classes that have some, accuracies floored at 1e-5 in the two
        means. by_rank, by_count: mean per-class accuracy of "many", "medium" and "few" classes, by thirds of the
        labelled rank and by labelled count (> 100, 20..100, < 20). calibration_error: expected calibration error
        in 15 equal bins of the confidence.

    Raises:
        ValueError: no rows, lengths that differ, a class or a confidence outside its range.
    """
    if not label.shape == confidence.shape == truth.shape or label.ndim != 1 or not len(label):
        shapes = ", ".join(str(list(t.shape)) for t in (label, confidence, truth))
        raise ValueError(f"classification_metrics: expected three vectors [N], N >= 1, got {shapes}")
    label, confidence, truth = label.cpu(), confidence.cpu(), truth.cpu()
    classes = len(labelled_counts)
    ranges = {"label": (label, classes - 1), "truth": (truth, classes - 1), "confidence": (confidence, 1)}
    for name, (values, high) in ranges.items():
        # negated, so that NaN is outside
        wrong = values[~((values >= 0) & (values <= high))]
        if len(wrong):
            raise ValueError(f"classification_metrics: {name} must be in 0..{high}, got {wrong[0].item()}")
    # a confusion matrix would take 4 GB for 22,000 classes
    images, predicted, correct = (
        torch.bincount(rows, minlength=classes).double() for rows in (truth, label, truth[label == truth])
    )
    per_class = (correct / images).numpy()  # NaN without test images
    f1 = 2.0 * correct / (images + predicted)  # NaN without any of both
    known = per_class[~np.isnan(per_class)]
    floored = np.maximum(known, SMALLEST_ACCURACY)
    return {
        "overall": float((label == truth).double().mean()),
        "macro": float(known.mean()),
        "macro_f1": float(f1.nanmean()),
        "worst": float(known.min()),
        "harmonic_mean": float(len(floored) / (1.0 / floored).sum()),
        "geometric_mean": float(np.exp(np.log(floored).mean())),
        "calibration_error": _calibration_error(confidence.double().numpy(), (label == truth).numpy()),
        "by_rank": group_means(per_class, groups_by_rank(labelled_counts)),
        "by_count": group_means(per_class, groups_by_count(labelled_counts)),
        "per_class": [_value(x) for x in per_class],
    }


def _calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """sum_b n_b / N |accuracy_b - confidence_b|."""
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    return float(np.abs(np.bincount(bins, weights=correct - confidence)).sum() / len(bins))


def group_means(per_class: np.ndarray, groups: np.ndarray) -> dict[str, float | None]:
    """Mean of `per_class` [C] over the classes of each group; NaN entries are left out, an empty group is None."""
    means = {}
    for group in GROUPS:
        values = per_class[(groups == group) & ~np.isnan(per_class)]
        means[group] = float(values.mean()) if len(values) else None
    return means


def pseudo_label_metrics(label: Tensor, keep: Tensor, truth: Tensor, few: Tensor) -> dict[str, float | None]:
    """Quality of pseudo-labels, for reports.

    Args:
        label: [N] int64, negative is none. keep: [N] bool. truth: [N] int64, negative is unknown: such rows
            are left out. few: [C] bool, the classes of the tail.

    Returns:
        acceptance: kept / all. precision: correct / kept. recall: kept and correct / all. precision_few:
        the precision of the kept rows labelled as a few class; recall_few: the recall of the rows that are
        of a few class. None where there is nothing to divide by.
    """
    known = truth >= 0
    label, keep, truth = label[known], keep[known], truth[known]
    hit = keep & (label == truth)
    says_few = keep & few[label.clamp_min(0)]
    is_few = few[truth]

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return part.sum() / whole.sum()

    everything = torch.ones_like(keep)
    values = {
        "acceptance": share(keep, everything),
        "precision": share(hit, keep),
        "recall": share(hit, everything),
        "precision_few": share(hit & says_few, says_few),
        "recall_few": share(hit & is_few, is_few),
    }
    # one transfer from the device for all of them
    return dict(zip(values, map(_value, torch.stack(list(values.values())).tolist()), strict=True))


def mean_and_std(values: list[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation (n - 1) over runs; None values are left out; std of one run is None."""
    known = [x for x in values if x is not None]
    mean = sum(known) / len(known) if known else None
    std = math.sqrt(sum((x - mean) ** 2 for x in known) / (len(known) - 1)) if len(known) > 1 else None
    return {"mean": mean, "std": std}


def _value(number: float) -> float | None:
    return None if math.isnan(number) else float(number)
