"""What is in the batch of each step: views of images, or cached features.

Rows and views of a slot, a place in the batch of all processes, are drawn from seed, step and slot alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.config import Training

if TYPE_CHECKING:
    from ulfine_fast.augment import Kind
    from ulfine_fast.features import FeatureData
    from ulfine_fast.image_data import ImageData
    from ulfine_fast.loader import Pending, ViewLoader


# Images that the pseudo-labels of branches are measured on: a record must stay cheap on a large set.
REPORT_ROWS = 2048


class Stream:
    """Endless stream over `size` rows, reshuffled in every pass: the rows of a step depend on the step alone.

    Pass p is drawn from (seed, role, p): an order of the rows, and for each kind of view the copy of each row.
    """

    def __init__(
        self, size: int, batch: int, copies: tuple[int, ...], seed: int, role: int, device: torch.device
    ) -> None:
        self.size, self.batch, self.copies = size, batch, copies
        self.key = seed, role
        self.device = device
        self.passes: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        """[1 + len(copies), batch] int64: row numbers, then a copy number for each kind of view."""
        start, stop = step * self.batch, (step + 1) * self.batch
        wanted = range(start // self.size, (stop - 1) // self.size + 1)
        self.passes = {p: self.passes[p] if p in self.passes else self._pass(p) for p in wanted}
        parts = [
            table[:, max(start - p * self.size, 0) : stop - p * self.size] for p, table in self.passes.items()
        ]
        return torch.cat(parts, dim=1)

    def _pass(self, number: int) -> Tensor:
        random = np.random.default_rng((*self.key, number))
        order = random.permutation(self.size)
        copies = [random.integers(count, size=self.size) for count in self.copies]
        return torch.from_numpy(np.stack([order, *copies])).to(self.device)


class Batch(NamedTuple):
    """Features of one step."""

    labelled: Tensor  # [B_l, D]
    targets: Tensor  # [B_l] int64
    weak: Tensor  # [B_u, D], B_u is 0 for a method without unlabelled data
    strong: Tensor  # [V B_u, D], other views of the same images, view by view
    places: Tensor  # [B_u] int64 among the unlabelled images


class FeatureViews:
    """Cached features in the place of images, all on `device`: the encoder is frozen and only the head learns.

    Args:
        labelled: [K, n_l, D], K copies of views of the labelled images; a step draws one of each row.
        labels: [n_l] int64.
        weak, strong: [K, n_u, D] and [K', n_u, D], views of the same images; None without unlabelled images. Strong
            view v of an image is copy (c + v) modulo K'.
        truth: [n_u] int64, -1 unknown; for reports. copies: [n_u] bool, copies of labelled images. None: all unknown,
            and none.

    ValueError without labelled images.
    """

    def __init__(
        self,
        labelled: Tensor,
        labels: Tensor,
        training: Training,
        device: torch.device | str = "cpu",
        *,
        weak: Tensor | None = None,
        strong: Tensor | None = None,
        truth: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> None:
        device = torch.device(device)
        views, rows = labelled.shape[:2]
        if rows == 0:
            raise ValueError("training needs labelled images, got none")
        if weak is None or strong is None:
            weak = strong = labelled[:1, :0]
        self.stored = labelled.to(device), weak.to(device), strong.to(device)
        self.labels = labels.to(device)
        count, self.seed = weak.shape[1], training.seed
        unknown = torch.full((count,), -1) if truth is None else truth
        self.unlabelled_truth = unknown.to(device)
        none = torch.zeros(count, dtype=torch.bool) if copies is None else copies
        self.unlabelled_is_labelled = none.to(device)
        self.from_labelled = Stream(rows, training.labelled_batch, (views,), self.seed, 0, device)
        kinds = len(weak), len(strong)
        self.from_unlabelled = Stream(count, training.unlabelled_batch, kinds, self.seed, 1, device)

    @cached_property
    def sample(self) -> tuple[Tensor, Tensor]:
        """[m, D] weak views of at most 2,048 images that are no copies of labelled ones, and their truth [m]."""
        rows = np.flatnonzero(~self.unlabelled_is_labelled.cpu().numpy())
        rows = np.random.default_rng((self.seed, 2)).permutation(rows)[:REPORT_ROWS]
        rows = torch.from_numpy(rows).to(self.labels.device)
        return self.stored[1][0, rows], self.unlabelled_truth[rows]

    @classmethod
    def of(cls, data: FeatureData, training: Training, device: torch.device | str = "cpu") -> Self:
        """The views of `data`."""
        return cls(
            data.labelled,
            data.labels,
            training,
            device,
            weak=data.weak,
            strong=data.strong,
            truth=torch.as_tensor(data.unlabelled_truth),
            copies=torch.as_tensor(data.unlabelled_is_labelled),
        )

    def batch(self, step: int, labelled: range, unlabelled: range, views: int) -> Batch:
        """What is in these slots of the batch of `step`, with so many strong views of each unlabelled image."""
        stored_labelled, stored_weak, stored_strong = self.stored
        row, copy = self.from_labelled(step)[:, labelled.start : labelled.stop]
        features, targets = _taken(stored_labelled, copy, row), self.labels[row]
        if not len(unlabelled):
            none = features[:0]
            return Batch(features, targets, none, none, row[:0])
        place, weak, copy = self.from_unlabelled(step)[:, unlabelled.start : unlabelled.stop]
        strong = [_taken(stored_strong, copy, place)]
        strong += [_taken(stored_strong, (copy + v) % len(stored_strong), place) for v in range(1, views)]
        return Batch(
            features,
            targets,
            _taken(stored_weak, weak, place),
            strong[0] if views == 1 else torch.cat(strong),
            place,
        )


def _taken(stored: Tensor, copy: Tensor, row: Tensor) -> Tensor:
    """stored[copy, row] of [K, n, D], by the numbers of the rows of all copies: a third of the time of two indices."""
    return stored.flatten(0, 1).index_select(0, copy * stored.shape[1] + row)


class ImageViews:
    """Views of images, read and augmented by `loader` in the background.

    An image that cannot be read is replaced by another one, whose label or place is in the answer.
    """

    def __init__(
        self, data: ImageData, loader: ViewLoader, training: Training, device: torch.device | str = "cpu"
    ) -> None:
        self.data, self.loader, self.training = data, loader, training
        self.device, cpu = torch.device(device), torch.device("cpu")
        self.unlabelled_truth = torch.from_numpy(data.unlabelled_truth).to(device)
        self.unlabelled_is_labelled = torch.from_numpy(data.unlabelled_is_labelled).to(device)
        seed = training.seed
        self.from_labelled = Stream(len(data.labelled), training.labelled_batch, (), seed, 0, cpu)
        self.from_unlabelled = Stream(len(data.unlabelled), training.unlabelled_batch, (), seed, 1, cpu)
        # by row of the training images
        self.label = np.zeros(len(data.train), dtype=np.int64)
        self.label[data.labelled] = data.labels
        self.place = np.zeros(len(data.train), dtype=np.int64)
        self.place[data.unlabelled] = np.arange(len(data.unlabelled))
        # rows of the weak views of a step by slot, until its strong views are asked for
        self.read: dict[int, dict[int, int]] = {}

    def labelled(self, step: int, slots: range) -> Callable[[], tuple[Tensor, Tensor]]:
        """Images [n, 3, S, S] uint8 and labels [n] of `slots`."""
        places = self.from_labelled(step)[0, slots.start : slots.stop].numpy()
        pending = self._submit("labelled", self.data.labelled[places], step, np.asarray(slots))

        def answer() -> tuple[Tensor, Tensor]:
            views = pending.result()
            return views.images, torch.from_numpy(self.label[views.rows]).to(self.device)

        return answer

    def weak(self, step: int, slots: range) -> Callable[[], tuple[Tensor, Tensor]]:
        """Weak views [n, 3, S, S] uint8 and the places [n] of their images among the unlabelled ones."""
        places = self.from_unlabelled(step)[0, slots.start : slots.stop].numpy()
        pending = self._submit("weak", self.data.unlabelled[places], step, np.asarray(slots))

        def answer() -> tuple[Tensor, Tensor]:
            views = pending.result()
            # a step without kept rows asks for no strong views
            self.read = {later: rows for later, rows in self.read.items() if later >= step}
            self.read.setdefault(step, {}).update(zip(slots, views.rows.tolist(), strict=True))
            return views.images, torch.from_numpy(self.place[views.rows]).to(self.device)

        return answer

    def strong(self, step: int, slots: list[int], views: int) -> Callable[[], Tensor]:
        """Strong views [views, n, 3, S, S] uint8 of the images that the weak views of these slots show."""
        read = self.read.pop(step)
        rows = np.array([read[slot] for slot in slots], dtype=np.int64)
        batch = self.training.unlabelled_batch
        every = np.concatenate([np.asarray(slots) + view * batch for view in range(views)])
        pending = self._submit("strong", np.tile(rows, views), step, every)
        return lambda: pending.result().images.unflatten(0, (views, len(slots)))

    def _submit(self, kind: Kind, rows: np.ndarray, step: int, slots: np.ndarray) -> Pending:
        progress = step / max(self.training.steps - 1, 1)
        return self.loader.submit(kind, rows, step=step, slots=slots, progress=progress)
