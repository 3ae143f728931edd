"""Long-tailed labelled/unlabelled splits of a training set, in the three protocols of the literature.

All arrays are numpy. An index is a position in the caller's `labels`; a class is an integer 0..C-1; a *rank*
orders the classes from head (0) to tail (C-1) by their labelled count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

Protocol = Literal["acr", "daso", "usb"]
Unlabelled = Literal["consistent", "uniform", "reversed"]
ClassOrder = Literal["index", "shuffled"]


@dataclass(frozen=True)
class Split:
    """Which images are labelled, unlabelled and held out.

    labelled, unlabelled, validation: int64 index arrays, grouped by class in class-index order; validation is
    empty where the protocol holds nothing out. class_order [C] int64: the class at each rank.
    labelled_counts, unlabelled_counts [C] int64, by class index: images in `labelled`, and in `unlabelled`
    without the copies of labelled ones. unlabelled_is_labelled [len(unlabelled)] bool: True where that image
    is in `labelled` too. protocol: the protocol that made it.
    """

    labelled: np.ndarray
    unlabelled: np.ndarray
    validation: np.ndarray
    class_order: np.ndarray
    labelled_counts: np.ndarray
    unlabelled_counts: np.ndarray
    unlabelled_is_labelled: np.ndarray
    protocol: Protocol


class ClassRow(NamedTuple):
    """One line of `split_table`: a class by number and name, counts of images, and "many", "medium" or "few"."""

    id: int
    name: str
    labelled: int
    unlabelled: int | None  # None: not known
    group: str


def class_counts(largest: int, imbalance: float, classes: int) -> np.ndarray:
    """Images of the class at each rank: n_k = floor(largest * imbalance ** (-k / (classes - 1))).

    largest >= 0, whole: n_0. imbalance >= 1: n_0 / n_{C-1}; 1 gives equal counts. classes >= 1 (a single class gets
    `largest`). Returns int64 [classes], non-increasing; a class may get 0 when imbalance > largest.
    Raises ValueError outside these ranges.
    """
    if largest < 0:
        raise ValueError(f"class_counts: largest must be >= 0, got {largest}")
    if largest % 1:
        raise ValueError(f"class_counts: largest must be a whole number, got {largest}")
    if not imbalance >= 1 or not np.isfinite(imbalance):
        raise ValueError(f"class_counts: imbalance must be finite and >= 1, got {imbalance}")
    if classes < 1:
        raise ValueError(f"class_counts: classes must be >= 1, got {classes}")
    exponent = -np.arange(classes, dtype=np.float64) / max(classes - 1, 1)
    exact = largest * np.power(float(imbalance), exponent)
    # a whole number can come out of power() one ulp too low, and floor() would then drop an image
    nearest = np.rint(exact)
    close = np.abs(exact - nearest) <= 1e-9 * np.maximum(exact, 1.0)
    return np.where(close, nearest, np.floor(exact)).astype(np.int64)


def make_split(
    labels: np.ndarray,
    *,
    protocol: Protocol = "acr",
    labelled_largest: int,
    unlabelled_largest: int,
    imbalance: float,
    unlabelled_imbalance: float | None = None,
    unlabelled: Unlabelled = "consistent",
    seed: int = 0,
    class_order: ClassOrder = "index",
    validation_per_class: int | None = None,
) -> Split:
    """Split a training set into a long-tailed labelled part and an unlabelled part.

    labels [N] int64, every class 0..C-1 present. The class at rank k gets n_k labelled images
    (`class_counts(labelled_largest, imbalance, C)`) and m_k unlabelled ones: "consistent" uses
    `class_counts(unlabelled_largest, unlabelled_imbalance or imbalance, C)`, "reversed" the same list
    backwards, "uniform" `unlabelled_largest` for every class.

    protocol "acr" (ACR, CCL, FineSSL, LoFT): the first n_k images of the class in dataset order are labelled
    and the first n_k + m_k are unlabelled, so the unlabelled part contains every labelled image; the seed
    does not change it. "daso": each class is shuffled by RandomState(seed), its first validation_per_class
    images are held out, the next n_k are labelled and the next m_k unlabelled; nothing overlaps. "usb":
    shuffled and disjoint, nothing held out. These are the protocols' rules, not their repositories' random
    draws: "acr" alone reproduces published splits image by image.

    class_order "index": rank = class index, as published. "shuffled" is ours: the seed permutes which class
    is head and which is tail, so that an average over seeds is not an average over one choice of tail
    classes. validation_per_class: "daso" only; default a tenth of the smallest class (500 on CIFAR-10, 50 on
    CIFAR-100).

    Raises ValueError for labels that are not one-dimensional non-negative integers with every class present,
    an unknown option, a seed outside 0..2**32 - 1, a validation set outside "daso", or a class with too few images.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"make_split: labels must be a non-empty 1-d integer array,"
            f" got {labels.dtype} of shape {labels.shape}"
        )
    if labels.min() < 0:
        raise ValueError(f"make_split: labels must be >= 0, got {labels.min()}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..2**32 - 1, got {seed}")
    _check_option("protocol", protocol, get_args(Protocol))
    _check_option("unlabelled", unlabelled, get_args(Unlabelled))
    _check_option("class_order", class_order, get_args(ClassOrder))
    available = np.bincount(labels)
    classes = len(available)
    if not available.all():
        raise ValueError(
            f"make_split: every class 0..{classes - 1} must have images,"
            f" got none of class {int(available.argmin())}"
        )
    held_out = _validation_size(protocol, validation_per_class, int(available.min()))

    order = np.arange(classes, dtype=np.int64)
    if class_order == "shuffled":
        order = np.random.RandomState(seed).permutation(classes).astype(np.int64)
    labelled_counts = np.empty(classes, dtype=np.int64)
    labelled_counts[order] = class_counts(labelled_largest, imbalance, classes)
    unlabelled_counts = np.empty(classes, dtype=np.int64)
    unlabelled_counts[order] = _unlabelled_by_rank(
        unlabelled_largest, imbalance, unlabelled_imbalance, unlabelled, classes
    )

    needed = held_out + labelled_counts + unlabelled_counts
    if (needed > available).any():
        k = int((needed - available).argmax())
        raise ValueError(
            f"class {k} needs {needed[k]} images ({labelled_counts[k]} labelled"
            f" + {unlabelled_counts[k]} unlabelled + {held_out} validation), got {available[k]}"
        )

    random = np.random.RandomState(seed)
    parts: dict[str, list[np.ndarray]] = {"labelled": [], "unlabelled": [], "validation": []}
    for k in range(classes):
        indices = np.flatnonzero(labels == k)
        if protocol != "acr":
            random.shuffle(indices)
        labelled_end = held_out + labelled_counts[k]
        unlabelled_start = 0 if protocol == "acr" else labelled_end
        parts["validation"].append(indices[:held_out])
        parts["labelled"].append(indices[held_out:labelled_end])
        parts["unlabelled"].append(indices[unlabelled_start : labelled_end + unlabelled_counts[k]])
    labelled_indices, unlabelled_indices, validation = (
        np.concatenate(part).astype(np.int64) for part in parts.values()
    )
    return Split(
        labelled=labelled_indices,
        unlabelled=unlabelled_indices,
        validation=validation,
        class_order=order,
        labelled_counts=labelled_counts,
        unlabelled_counts=unlabelled_counts,
        unlabelled_is_labelled=np.isin(unlabelled_indices, labelled_indices),
        protocol=protocol,
    )


def first_per_class(labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The first counts[k] images of every class k, in the order of `labels`.

    labels [N] int in 0..C-1. counts [C] int >= 0; a class with fewer images gives all of them. Returns an int64
    index array, grouped by class in class-index order. Source: the labelled part of ACR, CCL and FineSSL.
    """
    labels, counts = np.asarray(labels), np.asarray(counts)
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=len(counts))
    place_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[place_in_class < np.repeat(counts, sizes)].astype(np.int64)


def groups_by_count(counts: np.ndarray) -> np.ndarray:
    """Group of each class by its labelled count: many > 100, medium 20..100, few < 20.

    counts [C] int, by class index. Returns an array [C] of "many", "medium" or "few".
    Source: the ImageNet-LT convention.
    """
    counts = np.asarray(counts)
    return np.select([counts > 100, counts >= 20], ["many", "medium"], default="few")


def groups_by_rank(counts: np.ndarray) -> np.ndarray:
    """Group of each class by thirds of the labelled rank: floor(C/3) many, floor(C/3) few, the rest medium.

    counts [C] int, by class index; equal counts rank by class index. Ten classes give 3 many, 4 medium, 3
    few. Returns an array [C] of "many", "medium" or "few".
    """
    counts = np.asarray(counts)
    third = len(counts) // 3
    by_rank = np.full(len(counts), "medium")
    by_rank[:third] = "many"
    by_rank[len(counts) - third :] = "few"
    groups = np.empty_like(by_rank)
    groups[np.argsort(-counts, kind="stable")] = by_rank
    return groups


def split_table(split: Split, labels: np.ndarray, class_names: tuple[str, ...] | list[str]) -> list[ClassRow]:
    """One row for each class, head first: number, name, labelled images, unlabelled images, group by rank.

    labels [N]: the array the split was made from. The unlabelled column counts every image of
    `split.unlabelled`, copies of labelled ones included. Raises ValueError when the number of class names is
    not C.
    """
    classes = len(split.class_order)
    if len(class_names) != classes:
        raise ValueError(f"split_table: expected {classes} class names, got {len(class_names)}")
    labels = np.asarray(labels)
    labelled = np.bincount(labels[split.labelled], minlength=classes)
    unlabelled = np.bincount(labels[split.unlabelled], minlength=classes)
    groups = groups_by_rank(labelled)
    return [
        ClassRow(int(k), class_names[k], int(labelled[k]), int(unlabelled[k]), str(groups[k]))
        for k in split.class_order
    ]


def _check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"make_split: {name} must be one of {', '.join(known)}, got {value!r}")


def _validation_size(protocol: Protocol, requested: int | None, smallest_class: int) -> int:
    if protocol == "daso":
        size = smallest_class // 10 if requested is None else requested
        if size < 0:
            raise ValueError(f"make_split: validation_per_class must be >= 0, got {size}")
        return size
    if requested:
        raise ValueError(
            f"make_split: validation_per_class needs protocol daso, got {requested} with protocol {protocol}"
        )
    return 0


def _unlabelled_by_rank(
    largest: int, imbalance: float, own_imbalance: float | None, mode: Unlabelled, classes: int
) -> np.ndarray:
    if mode == "uniform":
        if own_imbalance not in (None, 1):
            raise ValueError(
                f"make_split: unlabelled_imbalance must be 1 or None with unlabelled uniform,"
                f" got {own_imbalance}"
            )
        return class_counts(largest, 1.0, classes)
    counts = class_counts(largest, imbalance if own_imbalance is None else own_imbalance, classes)
    return counts[::-1] if mode == "reversed" else counts
