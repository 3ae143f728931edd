"""Fine-tuning of an encoder together with its head, from one readable step to exact resume.

In a step the weak views are encoded without gradient and pseudo-labelled, strong views are made and encoded of the
kept images alone, and one loss of the labelled and these strong rows moves encoder and head. The rows left out would
have had gradient zero: the step is the one of the joint batch, with fewer row passes.

Nothing here depends on when, where or on how many processes a run was cut: every random draw is a pure function of
(seed, role, step, slot), a slot being a place in the batch of all processes, so weights, optimizer, estimators and the
step number are the whole state of a run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ulfine_fast.checkpoint import (
    CHECKPOINT,
    CheckpointError,
    deferred_signals,
    digest,
    digest_of,
    load_checkpoint,
    save_checkpoint,
    stop,
)
from ulfine_fast.config import FineTuning
from ulfine_fast.distributed import (
    World,
    average_gradients,
    check_equal,
    gather_rows,
    largest,
    own_rows,
    shard,
    sharded_parameters,
    take_from_first,
    whole,
)
from ulfine_fast.history import (
    MOST_SKIPS,
    TrainResult,
    check_skips,
    count_skips,
    reporting,
    resumed,
    run_record,
    warn_of_guessing,
)
from ulfine_fast.learners import Learner, Pseudo
from ulfine_fast.losses import labelled_log_prior
from ulfine_fast.metrics import pseudo_label_metrics
from ulfine_fast.optimizer import (
    fused_optimizer,
    learning_rate,
    load_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from ulfine_fast.splits import groups_by_rank

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Numbers of rows that a GPU sees: few of them, so that compiled towers and library kernels find their sizes again.
GPU_BUCKET = 16
# Of the scale of float16 gradients: torch.amp.GradScaler's defaults.
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_STEPS = 2.0**16, 2.0, 0.5, 2000
# What an optimizer keeps for each element of a parameter.
SLOTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")


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


class Part(NamedTuple):
    """One part of a batch after its pseudo-labels are known."""

    labelled: Callable[[], tuple[Tensor, Tensor]]
    weak: Tensor  # [B_u, D] features
    places: Tensor  # [B_u] int64 among the unlabelled images
    pseudo: Pseudo
    rows: Tensor  # [n] int64, rows of `pseudo` whose strong views are encoded


class Look(NamedTuple):
    """A batch after its pseudo-labels are known."""

    parts: list[Part]
    strong: Callable[[], Tensor] | None  # views [V, n, ...] of the kept rows of all parts, None without any


class StepReport(NamedTuple):
    """What a step says of itself."""

    loss: Tensor  # [] of this process, nats
    finite: Tensor  # [] bool; False: the step changed nothing
    label: Tensor  # [B_u] int64 pseudo-labels of all processes
    keep: Tensor  # [B_u] bool
    truth: Tensor  # [B_u] int64, -1 unknown
    copies: Tensor  # [B_u] bool, of labelled images
    rows: tuple[int, int]  # rows of this process: encoded, and of these with gradient


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
    """A run in one process: its step and its state.

    All processes start from the trained weights of the first one. With `schedule.shard` the tower of `student` is
    split over them in place, see `distributed.shard`; a `tower.blocks` has the modules that are whole one at a time.
    ValueError for batches that do not divide, and for `shard` in a single process.
    """

    def __init__(self, student: Student, views: Views, schedule: FineTuning, world: World) -> None:
        shares = world.size * schedule.parts
        for name in ("labelled_batch", "unlabelled_batch"):
            size = getattr(schedule, name)
            if size % shares:
                raise ValueError(
                    f"{name} must be a multiple of processes x parts, {world.size} x {schedule.parts}, got {size}"
                )
        if schedule.shard and world.size == 1:
            raise ValueError("shard must be False in a single process, got True; torchrun starts several")
        self.student, self.views, self.schedule, self.world = student, views, schedule, world
        self.learner = student.learner
        self.semi = bool(self.learner.semi and schedule.unlabelled_batch and len(views.unlabelled_truth))
        self.device = next(student.learner.parameters()).device
        take_from_first(list(tuned_tensors(student).values()), world)
        split = {}
        if schedule.shard:
            shard(student.tower, student.tower.blocks, world, self.device)
            split = sharded_parameters(student)
        # of a parameter that is split, the rows of this process: an ordinary tensor, for which all optimizers work
        self.weights = {}
        for name, p in student.named_parameters():
            if p.requires_grad:
                # a loss that does not touch a parameter leaves it a gradient of zero, on one process as on several
                p.grad = torch.zeros_like(p)
                self.weights[name] = _rows(p) if name in split else p
        tower = [name for name in self.weights if name.startswith("tower.")]
        # by the names of the state; the tower's are the first parameters of the optimizer
        self.split = split | {f"mean.{name}": p for name, p in split.items()}
        for index, name in enumerate(tower):
            if name in split:
                self.split |= {f"optimizer.{index}.{slot}": split[name] for slot in SLOTS}
        decay = schedule.weight_decay
        groups = [{"params": [self.weights[name] for name in tower], "weight_decay": decay}] if tower else []
        self.optimizer = fused_optimizer(
            [*groups, *self.learner.groups(decay)], schedule.optimizer, schedule.learning_rate
        )
        self.mean_weights = (
            {name: p.detach().clone() for name, p in self.weights.items()} if schedule.ema else {}
        )
        self.scale = torch.tensor(FIRST_SCALE if schedule.precision == "fp16" else 1.0, device=self.device)
        self.scale_age = torch.zeros((), dtype=torch.int32, device=self.device)
        self.asked: dict[int, list[tuple[Any, Any]]] = {}
        self.ahead: Look | None = None
        # the learner before its start, until the first step is done
        self.before: dict[str, Tensor] = {}

    def slots(self, batch: int, part: int) -> range:
        """Places of this process in part `part` of a batch of `batch`."""
        size = batch // (self.world.size * self.schedule.parts)
        start = (part * self.world.size + self.world.rank) * size
        return range(start, start + size)

    def ask(self, step: int) -> list[tuple[Any, Any]]:
        """Requests for labelled and weak views of `step`, part by part."""
        if step not in self.asked and step < self.schedule.steps:
            self.asked[step] = [
                (
                    self.views.labelled(step, self.slots(self.schedule.labelled_batch, part)),
                    self.views.weak(step, self.slots(self.schedule.unlabelled_batch, part))
                    if self.semi
                    else None,
                )
                for part in range(self.schedule.parts)
            ]
        return self.asked.get(step, [])

    @torch.no_grad()
    def look(self, step: int) -> Look:
        """Pseudo-labels of the batch of `step`; strong views of the kept rows are asked for."""
        requests = self.ask(step)
        del self.asked[step]
        self.ask(step + 1)
        progress = step / self.schedule.steps
        if not self.semi:
            weak = torch.empty(0, self.learner.dim, device=self.device)
            none = torch.empty(0, dtype=torch.int64, device=self.device)
            pseudo = self.learner.pseudo(weak, progress)
            return Look([Part(labelled, weak, none, pseudo, none) for labelled, _ in requests], None)
        answers = [weak() for _, weak in requests]
        features = [self.student.encode(images) for images, _ in answers]
        if step == 0:
            self.before = {name: tensor.clone() for name, tensor in self.learner.state_dict().items()}
            self.learner.start(gather_rows([torch.stack(features)], self.world)[0])
        parts, kept = [], []
        for part, (labelled, _) in enumerate(requests):
            pseudo = self.learner.pseudo(features[part], progress)
            rows = pseudo.weight.nonzero().flatten()
            slots = self.slots(self.schedule.unlabelled_batch, part)
            kept += [slots[row] for row in rows.tolist()]
            parts.append(Part(labelled, features[part], answers[part][1], pseudo, rows))
        return Look(parts, self.views.strong(step, kept, self.learner.views) if kept else None)

    def step(self, step: int, *, alone: bool = True) -> StepReport:
        """One step; with `alone` no work for the next one is done that a checkpoint would have to hold.

        A loss or a gradient that is not finite leaves weights, optimizer and estimators as they were.
        """
        look, self.ahead = self.ahead or self.look(step), None
        if self.schedule.look_ahead and not alone and step + 1 < self.schedule.steps:
            self.ahead = self.look(step + 1)
        set_learning_rate(self.optimizer, learning_rate(self.schedule, step))
        self.optimizer.zero_grad(set_to_none=False)
        strong = None if look.strong is None else look.strong()
        losses, columns, encoded, trained, start = [], [], 0, 0, 0
        for part in look.parts:
            images, labels = part.labelled()
            rows, stop = part.rows, start + len(part.rows)
            if stop > start:
                images = torch.cat([images, strong[:, start:stop].flatten(0, 1)])
                # view by view, as the images
                rows = rows.repeat(len(strong))
            start = stop
            loss, features = self.student(images, labels, rows, part.pseudo, step / self.schedule.steps)
            (loss * (self.scale / len(look.parts))).backward()
            losses.append(loss.detach())
            columns.append((features, labels, part.weak, part.places, *part.pseudo[:3], *part.pseudo.detail))
            encoded += len(part.weak) + len(images)
            trained += len(images)
        loss = torch.stack(losses).mean()
        finite = self._update(loss)

        # all rows of the batch, so that every process has the same state
        rows = [torch.stack(column) for column in zip(*columns, strict=True)]
        features, labels, weak, places, *flat = gather_rows(rows, self.world)
        self.labelled = features, labels
        pseudo = Pseudo(*flat[:3], tuple(flat[3:]))
        copies = self.views.unlabelled_is_labelled[places]
        self.learner.advance(features, labels, weak, pseudo, finite, copies)
        for name, tensor in self.learner.state_dict().items() if self.before else ():
            tensor.copy_(torch.where(finite, tensor, self.before[name]))
        self.before = {}
        if self.mean_weights:
            share = torch.where(finite, 1.0 - self.schedule.ema, 0.0)
            for name, mean in self.mean_weights.items():
                mean.lerp_(self.weights[name].detach(), share)
        return StepReport(
            loss,
            finite,
            pseudo.label,
            pseudo.weight > 0,
            self.views.unlabelled_truth[places],
            copies,
            (encoded, trained),
        )

    @torch.no_grad()
    def labelled_loss(self, step: int) -> float | None:
        """What the heads make of the labelled batch of the last step, `step`, after it, in nats; None: not finite."""
        progress, (features, labels) = step / self.schedule.steps, self.labelled
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        pseudo = self.learner.pseudo(features[:0], progress)
        loss = float(self.learner.loss(features, labels, features[:0], none, pseudo, progress))
        return loss if math.isfinite(loss) else None

    def _update(self, loss: Tensor) -> Tensor:
        """One step of the optimizer; [] bool, whether `loss` and gradients were finite in all processes."""
        average_gradients([p for name, p in self.weights.items() if name not in self.split], self.world)
        gradients = [p.grad for p in self.weights.values()]
        found_inf = (~loss.isfinite()).float()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, self.scale.reciprocal())
        # Fused optimizers read this flag and then do nothing.
        self.optimizer.found_inf = largest(found_inf, self.world)
        self.optimizer.step()
        if self.schedule.precision == "fp16":
            torch._amp_update_scale_(self.scale, self.scale_age, found_inf, GROWTH, BACKOFF, GROWTH_STEPS)
        return found_inf == 0

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a continued run needs, by name and not copied; of what is split, the rows of this process.

        Frozen weights of the tower are not part of it.
        """
        tensors = tuned_tensors(self.student)
        tensors |= {name: self.weights[name] for name in tensors if name in self.split}
        tensors |= {f"mean.{name}": tensor for name, tensor in self.mean_weights.items()}
        tensors |= {"scale": self.scale, "scale_age": self.scale_age}
        return tensors | optimizer_tensors(self.optimizer)

    def whole_tensors(self) -> dict[str, Tensor]:
        """`tensors` for a checkpoint, nothing split; empty in all processes but the first. All of them call this."""
        found = {}
        for name, tensor in self.tensors().items():
            tensor = whole(tensor, self.world, self.split.get(name))
            if self.world.leads:
                # one at a time: together they may not fit on the device
                found[name] = tensor.cpu() if name in self.split else tensor
        return found

    def checksum(self) -> str:
        """Hexadecimal digits that are equal in all processes as long as what all of them hold is."""
        sums = [
            tensor.detach().contiguous().flatten().view(torch.uint8).sum(dtype=torch.int64)
            for name, tensor in self.tensors().items()
            if name not in self.split
        ]
        return digest(torch.stack([total.to(self.device) for total in sums]))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the `whole_tensors` of a checkpoint, whatever number of processes wrote it."""
        _check_fit(self.student, tensors)
        own = {
            name: own_rows(tensor, self.split[name]) if name in self.split else tensor
            for name, tensor in tensors.items()
        }
        load_optimizer(self.optimizer, own)
        for name, place in self.tensors().items():
            place.copy_(own[name])


def tuned_tensors(student: Student) -> dict[str, Tensor]:
    """Everything of `student` that training changes, by name and not copied."""
    frozen = {name for name, p in student.tower.named_parameters(prefix="tower") if not p.requires_grad}
    return {name: tensor for name, tensor in student.state_dict().items() if name not in frozen}


@torch.no_grad()
def load_tuned_tensors(student: Student, tensors: Mapping[str, Tensor], *, averaged: bool = False) -> None:
    """Fill `student` from the tensors of a checkpoint, with `averaged` from the mean weights where it has them.

    Raises CheckpointError, before anything is written, when it is of another encoder, tuning or method.
    """
    _check_fit(student, tensors)
    for name, place in tuned_tensors(student).items():
        place.copy_(tensors.get(f"mean.{name}", tensors[name]) if averaged else tensors[name])


def _check_fit(student: Student, tensors: Mapping[str, Tensor]) -> None:
    for name, place in tuned_tensors(student).items():
        if name not in tensors or tensors[name].shape != place.shape:
            got = list(tensors[name].shape) if name in tensors else "none"
            raise CheckpointError(f"expected {name} {list(place.shape)} in the checkpoint, got {got}")


def _rows(parameter: DTensor) -> Tensor:
    """The rows of this process of a split parameter and of its gradient, sharing their memory."""
    rows = parameter.to_local().detach()
    rows.grad = parameter.grad.to_local()
    return rows


def finetune(
    student: Student,
    views: Views,
    labelled_counts: np.ndarray,
    schedule: FineTuning,
    *,
    world: World | None = None,
    identity: Mapping[str, Any] | None = None,
    run_dir: Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    progress: bool = True,
) -> TrainResult:
    """Train `student` in place; at the end it holds the mean weights, where the schedule asks for them.

    With `schedule.shard` the tower is left split: its parameters are DTensors, `distributed.whole` has their values,
    and all processes encode equally many batches.

    Args:
        labelled_counts: [C] labelled images by class, for the groups of the reports.
        world: the processes of the run; None is this one alone.
        identity: what a checkpoint must share with the run that continues it, JSON values: method, data, encoder.
        run_dir: where the first process writes checkpoints, None writes none.
        resume: continue from the checkpoint in `run_dir` if there is one. The result is bit by bit that of a run
            without interruption with the same number of processes and threads on the same machine; another number
            of processes may go on, too, and with or without `schedule.shard`, and rounds differently.
        checkpoint_every: steps between two checkpoints; one more is written at the end and, without
            `schedule.look_ahead`, one after the step in which SIGINT or SIGTERM comes (of several processes: the next
            step at which they meet, at most 20 later).
        progress: show a progress bar on a terminal, and elsewhere log lines of level INFO.

    Returns:
        TrainResult; its history has, every `schedule.log_every` steps and at the end: step, learning_rate, loss
        (nats, mean of the processes), loss_labelled (of the labelled batch alone after its step), images_per_second
        (labelled and unlabelled images of all processes), rows_encoded and rows_trained by this process per step
        since the last record, skipped, and with unlabelled images pseudo_labels (see `pseudo_label_metrics`, over
        the steps since the last record, without copies of labelled images); the last record the learner's
        `distribution`, too.

    Raises:
        CheckpointError: the checkpoint is damaged, of another run or of more steps. ValueError: batches that the
        processes cannot share, or nothing that `shard` could split them over. RuntimeError: 20 steps in a row were not
        finite, or the last 3 (the run stops at its next record, checkpoint or multiple of 20), or the processes do not agree.
        KeyboardInterrupt, Terminated: a signal stopped it.
    """
    world = world or World()
    engine = Engine(student, views, schedule, world)
    result, skips = TrainResult(), torch.zeros(3, dtype=torch.int64)
    path = None if run_dir is None else Path(run_dir) / CHECKPOINT
    identity = {**(identity or {}), "schedule": schedule.identity()}
    if schedule.look_ahead:
        # a step after a checkpoint does not look ahead, so that none of that has to be saved
        identity["checkpoint_every"] = checkpoint_every
    if resume and path is not None and path.exists():
        result, skips = _restore(path, identity, engine)
    if world.size > 1:
        # folders differ between machines, and a checkpoint may be on one of them only
        beginning = digest_of({}, json.dumps([identity, schedule.steps, result.steps]))
        check_equal(beginning, "data, encoder, method and first step", world, engine.device)
    few = torch.from_numpy(groups_by_rank(np.asarray(labelled_counts)) == "few").to(engine.device)
    log_prior = labelled_log_prior(torch.as_tensor(labelled_counts))
    window = _Window(skips.to(engine.device))
    started = time.perf_counter() - result.seconds
    showing = progress and world.leads
    with (
        reporting(result.steps, schedule.steps, showing) as report_progress,
        deferred_signals() as signals,
    ):
        for step in range(result.steps, schedule.steps):
            done = step + 1
            saves = path is not None and (done % checkpoint_every == 0 or done == schedule.steps)
            report = engine.step(step, alone=saves)
            window.add(report)
            logs = done % schedule.log_every == 0 or done == schedule.steps
            waits = logs or saves or done % MOST_SKIPS == 0
            if waits:
                result.skipped = window.skipped(done, schedule.steps)
            shown = None
            if logs:
                record = window.record(engine, step, few)
                if result.history:
                    # of C numbers: hundreds of them would be more than a checkpoint can hold beside its tensors
                    result.history[-1].pop("distribution", None)
                result.history.append(record)
                warn_of_guessing(result.history, log_prior)
                acceptance = record.get("pseudo_labels", {}).get("fused", {}).get("acceptance")
                shown = {"loss": record["loss"]}
                shown |= {} if acceptance is None else {"kept": f"{acceptance:.0%}"}
                if world.size > 1:
                    check_equal(engine.checksum(), "weights and state", world, engine.device)
            result.steps = done
            report_progress(done, shown)
            ends = signals[0] if signals else 0
            if world.size > 1:
                # all of them end after the same step, one at which the host waits anyway
                ends = int(largest(torch.tensor(ends, device=engine.device), world)) if waits else 0
            # what was looked ahead is in no checkpoint: such a run goes on from the one before
            if saves or (ends and path is not None and not schedule.look_ahead):
                tensors = engine.whole_tensors()
                if world.leads:
                    result.seconds = time.perf_counter() - started
                    _save(path, tensors, identity, schedule, window.skips, result)
            if ends:
                stop(ends)
    result.seconds = time.perf_counter() - started
    if path is not None and not schedule.steps:
        tensors = engine.whole_tensors()
        if world.leads:
            _save(path, tensors, identity, schedule, window.skips, result)
    if engine.mean_weights:
        with torch.no_grad():
            for name, tensor in engine.mean_weights.items():
                engine.weights[name].copy_(tensor)
    return result


class _Window:
    """What the steps since the last record said."""

    def __init__(self, skips: Tensor) -> None:
        self.skips = skips  # see `count_skips`
        self.clear()

    def clear(self) -> None:
        self.reports: list[StepReport] = []
        self.started = time.perf_counter()

    def add(self, report: StepReport) -> None:
        """Take in a step; nothing waits for the device."""
        self.reports.append(report)
        self.loss = report.loss
        self.skips = count_skips(self.skips, report.finite)

    def skipped(self, done: int, steps: int) -> int:
        """All of the `done` steps that changed nothing. RuntimeError after too many in a row."""
        remedy = "lower the learning rate, or take precision bf16 for fp16"
        check_skips(self.skips, self.loss, done, steps, remedy)
        return int(self.skips[2])

    def record(self, engine: Engine, step: int, few: Tensor) -> dict[str, Any]:
        schedule, world = engine.schedule, engine.world
        seconds = time.perf_counter() - self.started
        batch = schedule.labelled_batch + schedule.unlabelled_batch * engine.semi
        loss = float(gather_rows([self.reports[-1].loss[None, None]], world)[0].mean())
        encoded, trained = (
            sum(column) / len(self.reports) for column in zip(*(r.rows for r in self.reports), strict=True)
        )
        record = {
            "step": step + 1,
            "learning_rate": learning_rate(schedule, step),
            "loss": loss if math.isfinite(loss) else None,
            "loss_labelled": engine.labelled_loss(step),
            "images_per_second": batch * len(self.reports) / seconds,
            "rows_encoded": encoded,
            "rows_trained": trained,
            "skipped": int(self.skips[2]),
        }
        if engine.semi:
            label, keep, truth, copies = (
                torch.cat([getattr(r, name) for r in self.reports])
                for name in ("label", "keep", "truth", "copies")
            )
            # their labels were trained on
            label, keep, truth = label[~copies], keep[~copies], truth[~copies]
            quality = pseudo_label_metrics(label, keep, truth, few)
            if len(keep):
                # also where no truth is known
                quality["acceptance"] = float(keep.float().mean())
            record["pseudo_labels"] = {"fused": quality}
            estimate = engine.learner.distribution()
            if estimate is not None:
                record["distribution"] = estimate.tolist()
        self.clear()
        return record


def _save(
    path: Path,
    tensors: Mapping[str, Tensor],
    identity: Mapping[str, Any],
    schedule: FineTuning,
    skips: Tensor,
    result: TrainResult,
) -> None:
    save_checkpoint(path, {**tensors, "skips": skips}, {**identity, **run_record(schedule, result)})


def _restore(path: Path, identity: Mapping[str, Any], engine: Engine) -> tuple[TrainResult, Tensor]:
    tensors, record = load_checkpoint(path, identity)
    result = resumed(path, record, engine.schedule, tensors["skips"])
    engine.load(tensors)
    return result, tensors["skips"]
