"""The engine: one step of training, on images or on cached features, and the state that it moves.

With images the weak views are encoded without gradient and pseudo-labelled, strong views are made and encoded of the
kept images alone, and one loss of the labelled and these strong rows moves encoder and head. The rows left out would
have had gradient zero: the step is the one of the joint batch, with fewer row passes. With cached features all views
are at hand and nothing is chosen, so nothing waits for the device and the step can be one CUDA graph.

Nothing here depends on when, where or on how many processes a run was cut: every random draw is a pure function of
(seed, role, step, slot), a slot being a place in the batch of all processes, so weights, optimizer, estimators and the
step number are the whole state of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ulfine_fast.batches import Batch, FeatureViews
from ulfine_fast.capture import CapturedStep, device_of
from ulfine_fast.config import Training
from ulfine_fast.distributed import World, gather_rows
from ulfine_fast.learners import Learner, Pseudo
from ulfine_fast.optimizer import learning_rate, set_learning_rate
from ulfine_fast.training_state import TrainingState

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Numbers of rows that a GPU sees: few of them, so that compiled towers and library kernels find their sizes again.
GPU_BUCKET = 16


class Views(Protocol):
    """Where the images of a step come from; a request is made early and its answer called for late.

    A slot is a place in the batch of all processes and parts; what is in it depends on seed, step and slot alone.
    """

    unlabelled_truth: Tensor  # [n_u] int64, -1 unknown; for reports
    unlabelled_is_labelled: Tensor  # [n_u] bool

    def labelled(self, step: int, slots: range) -> Callable[[], tuple[Tensor, Tensor]]:
        """Images [n, ...] and their targets [n] int64."""

    def weak(self, step: int, slots: range) -> Callable[[], tuple[Tensor, Tensor]]:
        """Weak views [n, ...] and the places [n] int64 of the images among the unlabelled ones."""

    def strong(self, step: int, slots: list[int], views: int) -> Callable[[], Tensor]:
        """So many strong views of each image, [views, n, ...]; asked for once, when the weak views are there."""


class Seen(NamedTuple):
    """What a part of a batch leaves for the estimators, without gradient."""

    labelled: Tensor  # [B_l, D] features
    targets: Tensor  # [B_l] int64
    weak: Tensor  # [B_u, D] features
    places: Tensor  # [B_u] int64 among the unlabelled images
    pseudo: Pseudo


# The loss of a part of a batch, what was seen of it, and its rows: encoded, and of these with gradient.
Result = tuple[Tensor, Seen, tuple[int, int]]


class Part(NamedTuple):
    """One part of a batch of images after its pseudo-labels are known."""

    labelled: Callable[[], tuple[Tensor, Tensor]]
    weak: Tensor  # [B_u, D] features
    places: Tensor  # [B_u] int64 among the unlabelled images
    pseudo: Pseudo
    rows: Tensor  # [n] int64, rows of `pseudo` whose strong views are encoded


class Look(NamedTuple):
    """A batch of images after its pseudo-labels are known."""

    parts: list[Part]
    strong: Callable[[], Tensor] | None  # views [V, n, ...] of the kept rows of all parts, None without any


class StepReport(NamedTuple):
    """What a step says of itself."""

    loss: Tensor  # [] of this process, nats
    finite: Tensor  # [] bool; False: the step changed nothing
    label: Tensor  # [B_u] int64 pseudo-labels of all processes
    weight: Tensor  # [B_u] float32, 0: not kept
    places: Tensor  # [B_u] int64 among the unlabelled images
    rows: tuple[int, int]  # of this process: encoded, and of these with gradient; none of cached features


def encode(tower: nn.Module, images: Tensor, precision: str = "fp32") -> Tensor:
    """Features float32 [B, D] of images [B, ...], with the products of `tower` in "fp32", "bf16" or "fp16"."""
    count, dtype = len(images), DTYPES[precision]
    if images.is_cuda and count % GPU_BUCKET:
        images = torch.cat([images, images[:1].expand(-count % GPU_BUCKET, *images.shape[1:])])
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return tower(images)[:count].float()


class Student(nn.Module):
    """Encoder and learner as one module with one loss."""

    def __init__(self, tower: nn.Module, learner: Learner, precision: str = "fp32") -> None:
        super().__init__()
        self.tower, self.learner = tower, learner
        self.precision = precision

    def encode(self, images: Tensor) -> Tensor:
        """Features float32 [B, D]."""
        return encode(self.tower, images, self.precision)

    def forward(
        self, images: Tensor, targets: Tensor, rows: Tensor, pseudo: Pseudo, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Loss of labelled images and, behind them, strong views; and the labelled features without gradient."""
        features = self.encode(images)
        labelled, strong = features[: len(targets)], features[len(targets) :]
        return self.learner.loss(labelled, targets, strong, rows, pseudo, progress), labelled.detach()


class Engine:
    """A run in one process: its step, and its state, see `TrainingState`.

    Args:
        student: with cached features its tower is a `torch.nn.Identity`.
        views: where images come from, or `FeatureViews`.
        capture: run the steps on cached features, but the first, as one CUDA graph with the same bits.

    ValueError for batches that do not divide, for `shard` in a single process, for choices that cached features do not
    have, and for `capture` without them or without a CUDA device.
    """

    def __init__(
        self,
        student: Student,
        views: Views | FeatureViews,
        training: Training,
        world: World,
        *,
        capture: bool = False,
    ) -> None:
        self.at_hand = isinstance(views, FeatureViews)
        _check(training, world, at_hand=self.at_hand, capture=capture)
        self.student, self.views, self.training, self.world = student, views, training, world
        self.learner = student.learner
        self.device = device_of(self.learner) if capture else next(self.learner.parameters()).device
        self.semi = bool(self.learner.semi and training.unlabelled_batch and len(views.unlabelled_truth))
        self.copies = views.unlabelled_is_labelled if bool(views.unlabelled_is_labelled.any()) else None
        self.state = TrainingState(student, training, world)
        # a tensor, which a captured step reads
        self.progress = torch.zeros((), dtype=torch.float64, device=self.device)
        self.capture, self.captured = capture, None
        self.asked: dict[int, list[tuple[Any, Any]]] = {}
        self.ahead: Look | None = None
        # the learner before its start, until the first step is done
        self.before: dict[str, Tensor] = {}

    def slots(self, batch: int, part: int = 0) -> range:
        """Places of this process in part `part` of a batch of `batch`."""
        size = batch // (self.world.size * self.training.parts)
        start = (part * self.world.size + self.world.rank) * size
        return range(start, start + size)

    def step(self, step: int, *, alone: bool = True) -> StepReport:
        """One step; with `alone` no work for the next one is done that a checkpoint would have to hold.

        A loss or a gradient that is not finite leaves weights, optimizer and estimators as they were.
        """
        set_learning_rate(self.state.optimizer, learning_rate(self.training, step))
        if not self.at_hand:
            return self._take(self._encoded(step, alone))
        batch = self.batch(step)
        self.progress.fill_(step / self.training.steps)
        if step == 0 and self.semi:
            self._start([batch.weak])
        if not self.capture or step == 0:
            return self._take(self._joint(batch))
        if self.captured is None:
            state = self.state
            self.captured = CapturedStep(
                lambda batch: self._take(self._joint(batch)), state.tensors, state.optimizer, batch
            )
        report = self.captured(batch)
        # the next replay overwrites it
        return StepReport(*(tensor.clone() for tensor in report[:-1]), report.rows)

    def batch(self, step: int) -> Batch:
        """The rows of this process in the batch of `step`, of cached features."""
        training = self.training
        unlabelled = self.slots(training.unlabelled_batch) if self.semi else range(0)
        return self.views.batch(step, self.slots(training.labelled_batch), unlabelled, self.learner.views)

    def _joint(self, batch: Batch) -> Iterator[Result]:
        labelled, targets, weak, strong, places = batch
        # what a learner counts of a batch as a whole does not join with that of other processes
        joint = self.learner.joint if self.world.size == 1 else partial(Learner.joint, self.learner)
        loss, pseudo = joint(labelled, targets, weak, strong, self.progress)
        yield loss, Seen(labelled, targets, weak, places, pseudo), (0, 0)

    def ask(self, step: int) -> list[tuple[Any, Any]]:
        """Requests for labelled and weak views of `step`, part by part."""
        if step not in self.asked and step < self.training.steps:
            self.asked[step] = [
                (
                    self.views.labelled(step, self.slots(self.training.labelled_batch, part)),
                    self.views.weak(step, self.slots(self.training.unlabelled_batch, part))
                    if self.semi
                    else None,
                )
                for part in range(self.training.parts)
            ]
        return self.asked.get(step, [])

    @torch.no_grad()
    def look(self, step: int) -> Look:
        """Pseudo-labels of the images of `step`; strong views of the kept rows are asked for."""
        requests = self.ask(step)
        del self.asked[step]
        self.ask(step + 1)
        progress = step / self.training.steps
        if not self.semi:
            weak = torch.empty(0, self.learner.dim, device=self.device)
            none = torch.empty(0, dtype=torch.int64, device=self.device)
            pseudo = self.learner.pseudo(weak, progress)
            return Look([Part(labelled, weak, none, pseudo, none) for labelled, _ in requests], None)
        answers = [weak() for _, weak in requests]
        features = [self.student.encode(images) for images, _ in answers]
        if step == 0:
            self._start(features)
        parts, kept = [], []
        for part, (labelled, _) in enumerate(requests):
            pseudo = self.learner.pseudo(features[part], progress)
            rows = pseudo.weight.nonzero().flatten()
            slots = self.slots(self.training.unlabelled_batch, part)
            kept += [slots[row] for row in rows.tolist()]
            parts.append(Part(labelled, features[part], answers[part][1], pseudo, rows))
        return Look(parts, self.views.strong(step, kept, self.learner.views) if kept else None)

    def _encoded(self, step: int, alone: bool) -> Iterator[Result]:
        look, self.ahead = self.ahead or self.look(step), None
        if self.training.look_ahead and not alone and step + 1 < self.training.steps:
            self.ahead = self.look(step + 1)
        strong = None if look.strong is None else look.strong()
        start = 0
        for part in look.parts:
            images, targets = part.labelled()
            rows, stop = part.rows, start + len(part.rows)
            if stop > start:
                images = torch.cat([images, strong[:, start:stop].flatten(0, 1)])
                # view by view, as the images
                rows = rows.repeat(len(strong))
            start = stop
            loss, features = self.student(images, targets, rows, part.pseudo, step / self.training.steps)
            seen = Seen(features, targets, part.weak, part.places, part.pseudo)
            yield loss, seen, (len(part.weak) + len(images), len(images))

    def _start(self, weak: list[Tensor]) -> None:
        self.before = {name: tensor.clone() for name, tensor in self.learner.state_dict().items()}
        self.learner.start(gather_rows([torch.stack(weak)], self.world)[0])

    def _take(self, parts: Iterator[Result]) -> StepReport:
        """Gradients of all parts, the optimizer, the estimators."""
        self.state.clear_gradients()
        losses, seen, rows = [], [], []
        for loss, part, encoded in parts:
            self.state.add_gradients(loss)
            losses.append(loss.detach())
            seen.append(part)
            rows.append(encoded)
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        finite = self.state.update(loss)
        labelled, targets, weak, places, pseudo = self._everywhere(seen)
        self.labelled = labelled, targets
        copies = None if self.copies is None else self.copies[places]
        self.learner.advance(labelled, targets, weak, pseudo, finite, copies)
        for name, tensor in self.learner.state_dict().items() if self.before else ():
            tensor.copy_(torch.where(finite, tensor, self.before[name]))
        self.before = {}
        self.state.average(finite)
        encoded, trained = (sum(column) for column in zip(*rows, strict=True))
        return StepReport(loss, finite, pseudo.label, pseudo.weight, places, (encoded, trained))

    def _everywhere(self, seen: list[Seen]) -> Seen:
        """All rows of the batch, so that every process has the same state."""
        if len(seen) == self.world.size == 1:
            return seen[0]
        columns = [(*part[:4], *part.pseudo[:3], *part.pseudo.detail) for part in seen]
        rows = [torch.stack(column) for column in zip(*columns, strict=True)]
        labelled, targets, weak, places, *pseudo = gather_rows(rows, self.world)
        return Seen(labelled, targets, weak, places, Pseudo(*pseudo[:3], tuple(pseudo[3:])))

    @torch.no_grad()
    def labelled_loss(self, step: int) -> float | None:
        """What the heads make of the labelled batch of the last step, `step`, after it, in nats; None: not finite."""
        progress, (features, labels) = step / self.training.steps, self.labelled
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        pseudo = self.learner.pseudo(features[:0], progress)
        loss = float(self.learner.loss(features, labels, features[:0], none, pseudo, progress))
        return loss if math.isfinite(loss) else None


def _check(training: Training, world: World, *, at_hand: bool, capture: bool) -> None:
    for name in ("labelled_batch", "unlabelled_batch"):
        size = getattr(training, name)
        if size % (world.size * training.parts):
            raise ValueError(
                f"{name} must be a multiple of processes x parts, {world.size} x {training.parts}, got {size}"
            )
    if training.shard and world.size == 1:
        raise ValueError("shard must be False in a single process, got True; torchrun starts several")
    if at_hand:
        for name, plain in (("parts", 1), ("shard", False), ("look_ahead", False)):
            if getattr(training, name) != plain:
                raise ValueError(
                    f"{name} must be {plain} with cached features, got {getattr(training, name)}"
                )
    if capture and not (at_hand and world.size == 1):
        raise ValueError("capture needs cached features and a single process")
