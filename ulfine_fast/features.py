"""From a data set's name to the tensors a head trains on: split, views, frozen encoder, cache, centring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.cache import cached_features
from ulfine_fast.datasets import ImageSet, load_dataset
from ulfine_fast.encoder import LiteClip, PairedEncoder
from ulfine_fast.splits import ClassOrder, Protocol, Split, Unlabelled, make_split
from ulfine_fast.views import CUTOUT_RATIO, View

if TYPE_CHECKING:
    from ulfine_fast.image_data import ImageData

Encode = Literal["all", "split"]


# Equal is identical: a comparison of tensors has no truth value.
@dataclass(frozen=True, eq=False)
class FeatureData:
    """Everything a head needs, on the CPU. K is the number of copies of a view, D the encoder's width.

    Features are float32 unit rows. labelled [K, n_l, D]: weak views of the labelled images; labels [n_l] int64.
    weak [K, n_u, D], strong [K', n_u, D]: views of the unlabelled images, row for row the same images.
    unlabelled_truth [n_u] int64, -1 where unknown, and unlabelled_counts [C] int64, the classes of the unlabelled
    images (copies of labelled ones not counted; None where one is unknown), are for reports only, never for
    training. unlabelled_is_labelled [n_u] bool: copies of labelled images. test [n_t, D] or, of V views of an image,
    [n_t, V, D], test_labels [n_t]: plain views. validation, validation_labels [n_v]: the same, None where nothing is
    held out. prototypes [C, D]: unit rows. labelled_counts [C] int64. centre [D]: the mean that was subtracted from
    the encoder's features before they got unit length, None where none was. split: the indices behind it all. images:
    the image set behind it, without what could not be read. Both None where there is none.
    """

    labelled: Tensor
    labels: Tensor
    weak: Tensor
    strong: Tensor
    unlabelled_truth: Tensor
    test: Tensor
    test_labels: Tensor
    validation: Tensor | None
    validation_labels: Tensor | None
    prototypes: Tensor
    class_names: tuple[str, ...]
    labelled_counts: Tensor
    unlabelled_counts: Tensor | None
    unlabelled_is_labelled: Tensor
    split: Split | None = None
    centre: Tensor | None = None
    images: ImageData | None = None


def load_features(
    dataset_name: str = "fashion-mnist-subset",
    *,
    protocol: Protocol = "acr",
    labelled_largest: int = 100,
    unlabelled_largest: int = 300,
    imbalance: float = 50.0,
    unlabelled_imbalance: float | None = None,
    unlabelled: Unlabelled = "consistent",
    seed: int = 0,
    class_order: ClassOrder = "index",
    validation_per_class: int | None = None,
    encoder: PairedEncoder | None = None,
    weak_copies: int = 2,
    strong_copies: int = 2,
    view_seed: int = 0,
    cutout_ratio: float = CUTOUT_RATIO,
    size: int = 160,
    encode: Encode = "all",
    cache_dir: Path | str | None = None,
    batch_size: int = 256,
    progress: bool = True,
    refresh: bool = False,
) -> FeatureData:
    """Features of a long-tailed semi-supervised split of a data set.

    dataset_name: as `datasets.load_dataset`. protocol ... validation_per_class: as `splits.make_split`, seed
    included; view_seed selects the augmentations, apart from it, so that other split seeds reuse the cache.
    encoder: default `LiteClip()`. weak_copies, strong_copies >= 1: independent views of every image.
    cutout_ratio: as `views.augment`. size: side of the encoder's input, in pixels. encode "all": the whole
    training set goes into the cache, once for all splits; "split": only the images of this split, quicker
    where they are few of many; both give the same features up to rounding. cache_dir, batch_size, progress,
    refresh: as `cache.cached_features`.

    Every row is x -> unit(x - m), m the mean of the weak views of all training images of the split, labelled
    and unlabelled, each image once: what semi-supervised training may see. Raises the errors of the functions
    named.
    """
    if encode not in get_args(Encode):
        raise ValueError(
            f"load_features: encode must be one of {', '.join(get_args(Encode))}, got {encode!r}"
        )
    train, test = load_dataset(dataset_name)
    split = make_split(
        train.labels,
        protocol=protocol,
        labelled_largest=labelled_largest,
        unlabelled_largest=unlabelled_largest,
        imbalance=imbalance,
        unlabelled_imbalance=unlabelled_imbalance,
        unlabelled=unlabelled,
        seed=seed,
        class_order=class_order,
        validation_per_class=validation_per_class,
    )
    if encoder is None:
        encoder = LiteClip()

    def features(images: ImageSet, view: View, copies: int, chosen: np.ndarray) -> np.memmap:
        return cached_features(
            encoder,
            images.images[chosen],
            view=view,
            copies=copies,
            seed=view_seed,
            indices=chosen,
            cutout_ratio=cutout_ratio,
            size=size,
            invert=images.invert,
            cache_dir=cache_dir,
            batch_size=batch_size,
            progress=progress,
            refresh=refresh,
        )

    everything = np.arange(len(train.images))
    training = np.union1d(split.labelled, split.unlabelled)
    encoded = everything if encode == "all" else training
    weak = features(train, "weak", weak_copies, encoded)
    strong = features(train, "strong", strong_copies, encoded)
    plain_test = features(test, "plain", 1, np.arange(len(test.images)))[0]

    labelled_rows, unlabelled_rows, training_rows = (
        np.searchsorted(encoded, part) for part in (split.labelled, split.unlabelled, training)
    )
    mean = weak[:, training_rows].mean(axis=(0, 1), dtype=np.float64)
    validation = None
    if len(split.validation):
        held_out = everything if encode == "all" else split.validation
        plain = features(train, "plain", 1, held_out)[0]
        validation = centred(plain[split.validation] if encode == "all" else plain, mean)
    return FeatureData(
        labelled=centred(weak[:, labelled_rows], mean),
        labels=torch.from_numpy(train.labels[split.labelled]),
        weak=centred(weak[:, unlabelled_rows], mean),
        strong=centred(strong[:, unlabelled_rows], mean),
        unlabelled_truth=torch.from_numpy(train.labels[split.unlabelled]),
        test=centred(plain_test, mean),
        test_labels=torch.from_numpy(test.labels),
        validation=validation,
        validation_labels=None if validation is None else torch.from_numpy(train.labels[split.validation]),
        prototypes=encoder.text_prototypes(train.class_names).cpu(),
        class_names=train.class_names,
        labelled_counts=torch.from_numpy(split.labelled_counts),
        unlabelled_counts=torch.from_numpy(split.unlabelled_counts),
        unlabelled_is_labelled=torch.from_numpy(split.unlabelled_is_labelled),
        split=split,
        centre=torch.from_numpy(mean.astype(np.float32)),
    )


def centred(rows: np.ndarray, mean: np.ndarray) -> Tensor:
    """Unit rows float32 of features [..., D] less their mean [D]; a zero row stays zero."""
    rows = rows.astype(np.float32) - mean.astype(np.float32)
    return unit_(torch.from_numpy(rows))


def unit_(rows: Tensor) -> Tensor:
    """Divide the rows of features [..., D] by their length, in place; a zero row stays zero."""
    return rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(1e-12))


def class_means(labelled: Tensor, labels: Tensor, class_names: Sequence[str]) -> Tensor:
    """Unit means [C, D] of the rows of each class, for prototypes where there is no text.

    labelled: [K, n_l, D] unit rows; labels: [n_l]. ValueError for a class without any.
    """
    check_every_class(torch.bincount(labels, minlength=len(class_names)).numpy(), class_names)
    sums = torch.zeros(len(class_names), labelled.shape[-1]).index_add_(0, labels, labelled.sum(0))
    return F.normalize(sums, dim=1)


def check_every_class(counts: np.ndarray, class_names: Sequence[str]) -> None:
    """ValueError unless every class has labelled images, `counts` [C], for `class_means`."""
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        raise ValueError(
            "first prototypes must be class means where there are none of a text: expected labelled images of every"
            f" class, got none of {class_names[empty[0]]!r}"
        )
