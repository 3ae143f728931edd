"""What is in the batch of each step: views of images, or copies of cached features.

Both answer the requests of `finetune.Views`. Rows and views of a slot are drawn from seed, step and slot alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.config import FineTuning

if TYPE_CHECKING:
    from ulfine_fast.augment import Kind
    from ulfine_fast.features import FeatureData
    from ulfine_fast.image_data import ImageData
    from ulfine_fast.loader import Pending, ViewLoader


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


class FeatureViews:
    """Cached features in the place of images, for a tower that is `torch.nn.Identity`: only the head learns.

    data: see `load_features`; everything stays on `device`. The batches of one strong view are those of
    `trainer.Batches` with the same seed; strong view v of an image is copy (c + v) modulo their number.
    """

    def __init__(self, data: FeatureData, schedule: FineTuning, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self.stored = {"labelled": data.labelled, "weak": data.weak, "strong": data.strong}
        self.stored = {name: features.to(device) for name, features in self.stored.items()}
        self.labels = data.labels.to(device)
        self.unlabelled_truth = torch.as_tensor(data.unlabelled_truth).to(device)
        self.unlabelled_is_labelled = torch.as_tensor(data.unlabelled_is_labelled).to(device)
        copies, rows = data.labelled.shape[:2]
        self.from_labelled = Stream(rows, schedule.labelled_batch, (copies,), schedule.seed, 0, device)
        views = data.weak.shape[0], data.strong.shape[0]
        rows = data.weak.shape[1]
        self.from_unlabelled = Stream(rows, schedule.unlabelled_batch, views, schedule.seed, 1, device)

    def labelled(self, step: int, slots: range) -> Callable[[], tuple[Tensor, Tensor]]:
        """Features [n, D] and labels [n] of `slots`."""
        row, copy = self.from_labelled(step)[:, slots.start : slots.stop]
        return lambda: (self.stored["labelled"][copy, row], self.labels[row])

    def weak(self, step: int, slots: range) -> Callable[[], tuple[Tensor, Tensor]]:
        """Features [n, D] of weak views and the places of their images among the unlabelled ones."""
        row, copy, _ = self.from_unlabelled(step)[:, slots.start : slots.stop]
        return lambda: (self.stored["weak"][copy, row], row)

    def strong(self, step: int, slots: list[int], views: int) -> Callable[[], Tensor]:
        """Features [views, n, D] of strong views."""
        row, _, copy = self.from_unlabelled(step)[:, slots]
        strong = self.stored["strong"]
        return lambda: torch.stack([strong[(copy + view) % len(strong), row] for view in range(views)])


class ImageViews:
    """Views of images, read and augmented by `loader` in the background.

    An image that cannot be read is replaced by another one, whose label or place is in the answer.
    """

    def __init__(
        self, data: ImageData, loader: ViewLoader, schedule: FineTuning, device: torch.device | str = "cpu"
    ) -> None:
        self.data, self.loader, self.schedule = data, loader, schedule
        self.device, cpu = torch.device(device), torch.device("cpu")
        self.unlabelled_truth = torch.from_numpy(data.unlabelled_truth).to(device)
        self.unlabelled_is_labelled = torch.from_numpy(data.unlabelled_is_labelled).to(device)
        seed = schedule.seed
        self.from_labelled = Stream(len(data.labelled), schedule.labelled_batch, (), seed, 0, cpu)
        self.from_unlabelled = Stream(len(data.unlabelled), schedule.unlabelled_batch, (), seed, 1, cpu)
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
        batch = self.schedule.unlabelled_batch
        every = np.concatenate([np.asarray(slots) + view * batch for view in range(views)])
        pending = self._submit("strong", np.tile(rows, views), step, every)
        return lambda: pending.result().images.unflatten(0, (views, len(slots)))

    def _submit(self, kind: Kind, rows: np.ndarray, step: int, slots: np.ndarray) -> Pending:
        progress = step / max(self.schedule.steps - 1, 1)
        return self.loader.submit(kind, rows, step=step, slots=slots, progress=progress)
