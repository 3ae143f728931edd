"""A small long-tailed set of Gaussian features with its text prototypes: what the encoder gives, in no time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ulfine_fast.batches import FeatureViews
from ulfine_fast.config import Method, Training
from ulfine_fast.engine import Student
from ulfine_fast.features import FeatureData
from ulfine_fast.history import TrainResult
from ulfine_fast.learners import LEARNERS, Config, Learner, build_learner
from ulfine_fast.loop import train
from ulfine_fast.splits import make_split

# Every method that trains; eta is settled before a head is built.
TRAINED = {
    name: replace(config, eta_folds=0) if isinstance(config, Method) else config
    for name, config in LEARNERS.items()
    if name != "zero_shot"
}


def small_data(
    classes: int = 6,
    dim: int = 16,
    seed: int = 0,
    protocol: str = "usb",
    copies: int = 2,
    noise: float = 0.3,
    text_noise: float = 0.2,
) -> FeatureData:
    """FeatureData with 30..3 labelled and 60..6 unlabelled images in `classes` well separated classes.

    `noise` and `text_noise` are standard deviations around the unit class centres: of weak features, and of the text.
    """
    random = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape, generator=random), dim=-1)

    centres = unit(classes, dim)
    labels = np.repeat(np.arange(classes), 100)
    split = make_split(
        labels, protocol=protocol, labelled_largest=30, unlabelled_largest=60, imbalance=10.0, seed=seed
    )

    def views(truth: torch.Tensor, noise: float) -> torch.Tensor:
        shape = copies, len(truth), dim
        return F.normalize(centres[truth] + noise * torch.randn(*shape, generator=random), dim=-1)

    labelled, unlabelled = (torch.from_numpy(labels[part]) for part in (split.labelled, split.unlabelled))
    test = torch.arange(classes).repeat_interleave(20)
    return FeatureData(
        labelled=views(labelled, noise),
        labels=labelled,
        weak=views(unlabelled, noise),
        strong=views(unlabelled, noise + 0.1),
        unlabelled_truth=unlabelled,
        test=views(test, noise)[0],
        test_labels=test,
        validation=None,
        validation_labels=None,
        prototypes=F.normalize(centres + text_noise * torch.randn(classes, dim, generator=random), dim=-1),
        class_names=tuple(f"class {k}" for k in range(classes)),
        labelled_counts=torch.from_numpy(split.labelled_counts),
        unlabelled_counts=torch.from_numpy(split.unlabelled_counts),
        unlabelled_is_labelled=torch.from_numpy(split.unlabelled_is_labelled),
        split=split,
    )


def cached_run(
    method: Method | Config,
    schedule: Training,
    data: FeatureData,
    *,
    views: FeatureViews | None = None,
    device: str = "cpu",
    **options,
) -> tuple[Learner, TrainResult]:
    """A run of `loop.train` on the features of `data`; `options` are those of it."""
    learner = build_learner(method, data.prototypes.to(device), data.labelled_counts, seed=schedule.seed)
    views = views or FeatureViews.of(data, schedule, device)
    counts = data.labelled_counts.numpy()
    return learner, train(Student(nn.Identity(), learner), views, counts, schedule, progress=False, **options)


class VectorViews:
    """Features as if they were images, for a small tower: the requests of `engine.Views`."""

    def __init__(self, data: FeatureData, schedule: Training, device: str = "cpu") -> None:
        self.features = FeatureViews.of(data, schedule, device)
        self.unlabelled_truth = self.features.unlabelled_truth
        self.unlabelled_is_labelled = self.features.unlabelled_is_labelled

    def labelled(self, step: int, slots: range) -> Callable[[], tuple[Tensor, Tensor]]:
        row, copy = self.features.from_labelled(step)[:, slots.start : slots.stop]
        return lambda: (self.features.stored[0][copy, row], self.features.labels[row])

    def weak(self, step: int, slots: range) -> Callable[[], tuple[Tensor, Tensor]]:
        place, copy, _ = self.features.from_unlabelled(step)[:, slots.start : slots.stop]
        return lambda: (self.features.stored[1][copy, place], place)

    def strong(self, step: int, slots: list[int], views: int) -> Callable[[], Tensor]:
        place, _, copy = self.features.from_unlabelled(step)[:, slots]
        strong = self.features.stored[2]
        return lambda: torch.stack([strong[(copy + view) % len(strong), place] for view in range(views)])
