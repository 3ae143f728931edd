"""ImageNet-127: downsampled ImageNet under 127 superclasses, long-tailed by nature, in the protocol of ACR and CCL.

The data set comes as pickles. They are read by an unpickler that can build arrays and plain containers only, so
that a file from anywhere runs no code.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ulfine_fast.image_data import NUMBERED, ImageData, absent_classes, repeated_names
from ulfine_fast.image_tables import read_class_names
from ulfine_fast.images import ImageArray, JoinedImages
from ulfine_fast.splits import first_per_class

TRAIN_BATCHES = tuple(f"train_data_batch_{number}" for number in range(1, 11))
TEST_BATCH = "val_data"

_SUPERCLASSES = 127
# What a pickled array or number needs; numpy renamed its core, and Python 3 wrote bytes for Python 2 as text.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
}


def imagenet127_data(
    folder: Path,
    *,
    labelled_share: float = 0.1,
    superclasses: Path | None = None,
    class_names: Path | None = None,
) -> ImageData:
    """ImageNet-127 from the pickles train_data_batch_1..10 and val_data of downsampled ImageNet.

    folder: where the files are, with images of any one size, 32 or 64 pixels as published. Of the n_k training
    images of a class the first round(labelled_share n_k), half to even, are labelled; labelled_share in (0, 1]: 0.1
    in ACR and CCL, 0.01 in LoFT. All training images are unlabelled. The test images are `val_data`, as imbalanced
    as the rest. Classes are ordered by falling number of labelled images, ties by their old order (ours).

    superclasses: a text file whose line i names the superclass of ImageNet class i in the pickles' order, which
    also names the classes. None: the pickles' labels are superclasses already, and class_names, a file with a line
    for each of them, names them; without it they are called by their number. Labels may begin at 0 or at 1.

    Raises ValueError for a share outside its range, a file that is not such a pickle, or labels that do not fit.
    All images are held in memory: 4 GB at 32 pixels.
    """
    if not 0 < labelled_share <= 1:
        raise ValueError(f"labelled_share must be in (0, 1], got {labelled_share}")
    test_images, test_labels = _read_batch(folder / TEST_BATCH)
    batches = [_read_batch(folder / name, test_images.shape[1]) for name in TRAIN_BATCHES]
    labels = np.concatenate([part for _, part in batches])
    first = int(labels.min())
    if first not in (0, 1):
        raise ValueError(f"{folder}: expected labels from 0 or from 1, got {first}")
    labels, test_labels = labels - first, test_labels - first

    notes = []
    if superclasses is not None:
        of_class = read_class_names(superclasses)
        names = sorted(set(of_class))
        to_superclass = np.array([names.index(name) for name in of_class], dtype=np.int64)
        _check_labels(labels, test_labels, len(of_class), f"the lines of {superclasses} say so")
        labels, test_labels = to_superclass[labels], to_superclass[test_labels]
    else:
        names = [str(k) for k in range(_SUPERCLASSES)]
        if class_names is not None:
            names = read_class_names(class_names)
        else:
            notes.append(NUMBERED)
        _check_labels(labels, test_labels, len(names), "give superclasses for the labels of ImageNet")
    sizes = np.bincount(labels, minlength=len(names))
    counts = np.around(labelled_share * sizes).astype(np.int64)
    order = np.argsort(-counts, kind="stable")
    rank = np.argsort(order)
    labels, test_labels, names = rank[labels], rank[test_labels], [names[k] for k in order]
    labelled = first_per_class(labels, counts[order])
    notes += repeated_names(names)
    notes += absent_classes("labelled", labels[labelled], names)
    return ImageData(
        train=JoinedImages(
            [
                ImageArray(images, f"imagenet127/{name}")
                for name, (images, _) in zip(TRAIN_BATCHES, batches, strict=True)
            ]
        ),
        labelled=labelled,
        labels=labels[labelled],
        unlabelled=np.arange(len(labels), dtype=np.int64),
        unlabelled_truth=labels,
        test=ImageArray(test_images, f"imagenet127/{TEST_BATCH}"),
        test_labels=test_labels,
        class_names=tuple(names),
        notes=tuple(notes),
    )


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}, which is refused")
        return super().find_class(module, name)


def _read_batch(path: Path, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, size, size, 3] and labels int64 [N] of one pickle; without `size`, of the size they have."""
    with path.open("rb") as file:
        try:
            batch = _ArrayUnpickler(file, encoding="latin1").load()
        # damaged bytes can make the unpickler raise anything
        except Exception as error:
            raise ValueError(
                f"{path}: expected a pickle of arrays, got {str(error) or 'a damaged one'}"
            ) from error
    try:
        pixels, labels = batch["data"], np.array(batch["labels"], dtype=np.int64).ravel()
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: expected a dict with data and labels, got another content") from error
    if size is None:
        size = math.isqrt(np.shape(pixels)[-1] // 3) if np.ndim(pixels) else 0
    shape = (len(labels), 3 * size * size)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != shape:
        got = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{path}: expected data uint8 [{len(labels)}, 3 * {size} * {size}], got {got}")
    return pixels.reshape(-1, 3, size, size).transpose(0, 2, 3, 1), labels


def _check_labels(labels: np.ndarray, test_labels: np.ndarray, classes: int, remedy: str) -> None:
    found = np.concatenate([labels, test_labels])
    if not 0 <= found.min() <= found.max() < classes:
        raise ValueError(
            f"expected labels of {classes} classes, got {found.min()}..{found.max()} from the first; {remedy}"
        )
