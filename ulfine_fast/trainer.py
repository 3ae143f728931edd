"""Training of a `DualHead` on cached features, from one readable step to exact resume.

Nothing here depends on when or where a run was cut: every random draw is a pure function of (seed, step), so
head, optimizer and step number are the whole state of a run.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.batches import Stream
from ulfine_fast.capture import CapturedStep, device_of
from ulfine_fast.checkpoint import (
    CHECKPOINT,
    deferred_signals,
    digest,
    load_checkpoint,
    save_checkpoint,
    stop,
)
from ulfine_fast.config import Method, Schedule
from ulfine_fast.evaluation import CHUNK, Predictions, most_likely
from ulfine_fast.head import DualHead
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
from ulfine_fast.learners.dual import (
    BRANCHES,
    measure_scales,
    only,
    parameter_groups,
    strong_adjustment,
    weak_adjustment,
)
from ulfine_fast.losses import labelled_log_prior
from ulfine_fast.metrics import classification_metrics, pseudo_label_metrics
from ulfine_fast.optimizer import (
    fused_optimizer,
    learning_rate,
    load_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from ulfine_fast.splits import groups_by_rank

if TYPE_CHECKING:
    from ulfine_fast.features import FeatureData

LOGGER = logging.getLogger(__name__)
# One class with more than this share of P_u is worth a warning.
COLLAPSED_SHARE = 0.9
# Unlabelled rows that the quality of pseudo-labels is measured on: a log step must stay cheap on a large set.
REPORT_ROWS = 2048


class Batch(NamedTuple):
    """Features of one step; `weak` and `strong` are two views of the same images."""

    labelled: Tensor  # [B_l, D]
    targets: Tensor  # [B_l] int64
    weak: Tensor  # [B_u, D], B_u is 0 for a method without unlabelled data
    strong: Tensor  # [B_u, D]
    copies: Tensor | None = None  # [B_u] bool, the image is in the labelled set too; None: no such image


class LabelledClasses(NamedTuple):
    """How the labelled images of the training set spread over the classes; see `losses.labelled_log_prior`."""

    counts: Tensor  # [C] int64
    log_prior: Tensor  # [C] float32


class StepReport(NamedTuple):
    """What a step says of itself, scalars on the device."""

    loss: Tensor  # all terms, nats
    acceptance: Tensor  # share of pseudo-labels that were kept
    finite: Tensor  # bool; False: the step changed nothing


def train_step(
    head: DualHead,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    method: Method,
    classes: LabelledClasses,
    *,
    first: bool = False,
) -> StepReport:
    """One step: pseudo-labels, one loss for all rows, optimizer, estimators. Never waits for the device.

    Args:
        optimizer: from `build_optimizer`, which can skip a step on the device.
        classes: the labelled images of the whole training set by class.
        first: the branch scales are measured on this batch before the branches are fused.

    A loss or a gradient that is not finite leaves parameters, optimizer and estimators bit by bit as they
    were. Copies of labelled images are pseudo-labelled and trained on, but do not count in P_u.
    """
    state = head.state
    if first:
        scales_before = state.branch_scale.clone(), state.measured.clone()
        measure_scales(head, batch.weak, method)
    loss, pseudo = head.step_loss(
        torch.cat([batch.labelled, batch.strong]),
        batch.weak,
        batch.targets,
        method.threshold,
        weak_adjustment=weak_adjustment(state, method),
        adjustment=method.adjust_labelled * classes.log_prior,
        strong_adjustment=strong_adjustment(state, method, classes.log_prior),
        temperature=method.temperature,
        scale_rows=method.scale_rows,
        unlabelled_weight=method.unlabelled_weight,
        orthogonality_weight=method.orthogonality_weight,
    )
    optimizer.zero_grad()
    loss.backward()

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # In one launch, as gradient scalers look for what is not finite; a scale of 1 changes no bit.
    scaled = [loss.detach(), *(p.grad for p in parameters)]
    found_inf = loss.new_zeros((), dtype=torch.float32)
    torch._amp_foreach_non_finite_check_and_unscale_(scaled, found_inf, torch.ones_like(found_inf))
    # Fused optimizers read this flag on the device and then do nothing.
    optimizer.found_inf = found_inf
    optimizer.step()

    finite = found_inf == 0
    normalize = method.orthogonality_weight > 0
    if len(batch.weak):
        state.advance(
            batch.labelled,
            batch.targets,
            batch.weak,
            pseudo,
            classes.counts,
            finite,
            copies=batch.copies,
            mu=method.mu,
            beta=method.beta,
            gamma=method.gamma,
            scale_decay=method.scale_decay,
            posterior=method.fitting == "posterior",
            strength=method.strength,
            unlabelled_mass=method.unlabelled_mass,
            normalize=normalize,
        )
    elif normalize:
        state.normalize(finite)
    if first:
        for tensor, before in zip((state.branch_scale, state.measured), scales_before, strict=True):
            tensor.copy_(torch.where(finite, tensor, before))
    return StepReport(loss.detach(), pseudo.keep.sum() / max(len(batch.weak), 1), finite)


def build_optimizer(head: DualHead, method: Method, schedule: Schedule) -> torch.optim.Optimizer:
    """Fused SGD (momentum 0.9) or AdamW over the linear probe and, if it is learned, the textual prototypes.

    Textual prototypes have no weight decay: their rows keep norm 1. Without orthogonality nothing gives them
    a gradient and they are left out. On a CUDA device the learning rate is a tensor there, so that a captured
    step reads it.
    """
    groups = parameter_groups(head, method, schedule.weight_decay)
    return fused_optimizer(groups, schedule.optimizer, schedule.learning_rate)


class Batches:
    """The batch of every step of a schedule, from features that stay on the device of the head."""

    def __init__(self, data: FeatureData, method: Method, schedule: Schedule, device: torch.device) -> None:
        self.labelled, self.labels = data.labelled.to(device), data.labels.to(device)
        copies, rows = self.labelled.shape[:2]
        if rows == 0:
            raise ValueError("training needs labelled images, got none")
        self.from_labelled = Stream(rows, schedule.labelled_batch, (copies,), schedule.seed, 0, device)
        self.from_unlabelled = None
        if method.unlabelled_weight and schedule.unlabelled_batch and data.weak.shape[1]:
            self.weak, self.strong = data.weak.to(device), data.strong.to(device)
            marks = torch.as_tensor(data.unlabelled_is_labelled)
            self.marks = marks.to(device) if bool(marks.any()) else None
            views = self.weak.shape[0], self.strong.shape[0]
            rows = self.weak.shape[1]
            self.from_unlabelled = Stream(rows, schedule.unlabelled_batch, views, schedule.seed, 1, device)

    def __call__(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        row, view = self.from_labelled(step)
        labelled = self.labelled[view, row]
        batch = Batch(labelled, self.labels[row], labelled[:0], labelled[:0])
        if self.from_unlabelled is None:
            return batch
        row, weak, strong = self.from_unlabelled(step)
        return batch._replace(
            weak=self.weak[weak, row],
            strong=self.strong[strong, row],
            copies=None if self.marks is None else self.marks[row],
        )


class Quality:
    """Quality of the pseudo-labels of each branch and of P_u against the truth: for reports, never to train.

    Copies of labelled images are left out: their labels were trained on.
    """

    def __init__(self, data: FeatureData, seed: int, device: torch.device) -> None:
        rows = np.flatnonzero(~np.asarray(data.unlabelled_is_labelled))
        chosen = np.random.default_rng((seed, 2)).permutation(rows)[:REPORT_ROWS]
        self.weak = data.weak[0][chosen].to(device)
        self.truth = torch.as_tensor(data.unlabelled_truth)[chosen].to(device)
        self.few = torch.from_numpy(groups_by_rank(np.asarray(data.labelled_counts)) == "few").to(device)
        counts = torch.as_tensor(data.unlabelled_counts, dtype=torch.float64)
        self.share = (counts / counts.sum().clamp_min(1)).tolist()

    def __call__(self, head: DualHead, method: Method) -> dict[str, Any]:
        """precision, recall and acceptance per branch, P_u, and its L1 distance from the truth, in [0, 2]."""
        branches = {}
        for name, eta in BRANCHES.items():
            pseudo = only(head, eta).pseudo_label(
                self.weak,
                method.threshold,
                adjustment=weak_adjustment(head.state, method),
                temperature=method.temperature,
                scale_rows=0,
            )
            branches[name] = pseudo_label_metrics(pseudo.label, pseudo.keep, self.truth, self.few)
        estimate = head.state.distribution.tolist()
        distance = sum(abs(p - q) for p, q in zip(estimate, self.share, strict=True))
        return {"pseudo_labels": branches, "distribution": estimate, "distribution_l1": distance}


def train(
    head: DualHead,
    data: FeatureData,
    method: Method,
    schedule: Schedule,
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    capture: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train `head` in place, on its device.

    Args:
        run_dir: where checkpoints go; None writes none.
        resume: continue from the checkpoint in `run_dir` if there is one. The result is bit by bit that of a
            run without interruption on the same machine with the same number of threads and back end.
        checkpoint_every: steps between two checkpoints; one more is written at the end, and one after the step
            in which SIGINT or SIGTERM comes.
        capture: run the steps after the first one as one CUDA graph, with the same bits; needs a CUDA device.
        progress: show a progress bar on a terminal, and elsewhere log lines of level INFO.

    Returns:
        TrainResult; its history has, every `schedule.log_every` steps and at the end: step, learning_rate,
        loss_labelled, loss_unlabelled (nats) and orthogonality before the step, acceptance (of
        the batch), skipped (steps so far), and with unlabelled data what `Quality` says.

    Raises:
        CheckpointError: the checkpoint is damaged, of another method, schedule or data, or of more steps.
        ValueError: `capture` without a CUDA device. RuntimeError: 20 steps in a row were not finite, or the last 3;
        the run stops at its next log step or multiple of 20. KeyboardInterrupt, Terminated: a signal stopped it.
    """
    device = device_of(head) if capture else head.linear.device
    optimizer = build_optimizer(head, method, schedule)
    steps = schedule.steps if method.trained else 0
    result = TrainResult()
    skips = torch.zeros(3, dtype=torch.int64, device=device)  # in a row, longest row, all
    path = None if run_dir is None else Path(run_dir) / CHECKPOINT
    identity = {} if path is None else _identity(data, method, schedule)
    if resume and path is not None and path.exists():
        result = _restore(path, identity, schedule, head, optimizer, skips)
    if steps:
        batches = Batches(data, method, schedule, device)
        quality = Quality(data, schedule.seed, device) if batches.from_unlabelled else None
        counts = torch.as_tensor(data.labelled_counts)
        classes = LabelledClasses(counts.to(device), labelled_log_prior(counts).to(device))

    captured = None
    started = time.perf_counter() - result.seconds
    with reporting(result.steps, steps, progress) as report_progress, deferred_signals() as signals:
        for step in range(result.steps, steps):
            set_learning_rate(optimizer, learning_rate(schedule, step))
            batch = batches(step)
            log = (step + 1) % schedule.log_every == 0 or step + 1 == steps
            terms = _terms(head, batch, method, classes.log_prior, first=step == 0) if log else None
            if capture and step > 0:
                if captured is None:
                    captured = CapturedStep(
                        lambda batch: train_step(head, optimizer, batch, method, classes),
                        head,
                        optimizer,
                        batch,
                    )
                report = captured(batch)
            else:
                report = train_step(head, optimizer, batch, method, classes, first=step == 0)
            skips = count_skips(skips, report.finite)
            if log:
                record = _record(step, schedule, method, report, terms, skips)
                if quality is not None:
                    record |= quality(head, method)
                    _warn_of_collapse(record, result.history)
                result.history.append(record)
                warn_of_guessing(result.history, classes.log_prior)
            if log or (step + 1) % MOST_SKIPS == 0:
                remedy = "check the features for NaN, or lower the learning rate"
                check_skips(skips, report.loss, step + 1, steps, remedy)
            result.steps = step + 1
            report_progress(result.steps, {"loss": record["loss_labelled"]} if log else None)
            if signals:
                break
            if path is not None and result.steps % checkpoint_every == 0 and result.steps < steps:
                result.seconds = time.perf_counter() - started
                _save(path, identity, schedule, head, optimizer, skips, result)
    result.seconds = time.perf_counter() - started
    result.skipped = int(skips[2])
    if path is not None:
        _save(path, identity, schedule, head, optimizer, skips, result)
    if signals:
        stop(signals[0])
    return result


@torch.no_grad()
def _terms(
    head: DualHead, batch: Batch, method: Method, log_prior: Tensor, *, first: bool
) -> tuple[Tensor, Tensor]:
    """Labelled cross-entropy and orthogonality of the batch before its step."""
    if first:
        head = copy.deepcopy(head)
        measure_scales(head, batch.weak, method)
    adjustment = method.adjust_labelled * log_prior
    return head.loss(batch.labelled, batch.targets, adjustment=adjustment), head.orthogonality()


def _record(
    step: int,
    schedule: Schedule,
    method: Method,
    report: StepReport,
    terms: tuple[Tensor, Tensor],
    skips: Tensor,
) -> dict[str, Any]:
    labelled, orthogonality = terms
    unlabelled = report.loss - labelled - method.orthogonality_weight * orthogonality
    # Sums in another order differ in the last bit, and the term of no pseudo-label is 0.
    unlabelled = unlabelled * (report.acceptance > 0)
    scalars = torch.stack([labelled, unlabelled, orthogonality, report.acceptance]).tolist()
    names = ("loss_labelled", "loss_unlabelled", "orthogonality", "acceptance")
    return {
        "step": step + 1,
        "learning_rate": learning_rate(schedule, step),
        **{name: x if math.isfinite(x) else None for name, x in zip(names, scalars, strict=True)},
        "skipped": int(skips[2]),
    }


def _warn_of_collapse(record: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Log a warning when one class begins to take nearly all pseudo-labels."""

    def collapsed(shares: list[float]) -> bool:
        return len(shares) > 1 and max(shares) > COLLAPSED_SHARE * sum(shares)

    shares = record["distribution"]
    if collapsed(shares) and not (history and collapsed(history[-1]["distribution"])):
        LOGGER.warning(
            "step %d: class %d has %.0f %% of the pseudo-labels; the other prototypes hardly move",
            record["step"],
            shares.index(max(shares)),
            100 * max(shares) / sum(shares),
        )


def _identity(data: FeatureData, method: Method, schedule: Schedule) -> dict[str, Any]:
    """What a checkpoint must share with the run that continues it."""
    used = ("labelled", "labels", "weak", "strong", "prototypes", "unlabelled_is_labelled", "labelled_counts")
    method_fields = asdict(method)
    del method_fields["summary"]
    return {
        "method": method_fields,
        "schedule": schedule.identity(),
        "data": {name: digest(torch.as_tensor(getattr(data, name))) for name in used},
    }


def _save(
    path: Path,
    identity: dict[str, Any],
    schedule: Schedule,
    head: DualHead,
    optimizer: torch.optim.Optimizer,
    skips: Tensor,
    result: TrainResult,
) -> None:
    tensors = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    tensors |= optimizer_tensors(optimizer)
    tensors["skips"] = skips
    save_checkpoint(path, tensors, {**identity, **run_record(schedule, result)})


def _restore(
    path: Path,
    identity: dict[str, Any],
    schedule: Schedule,
    head: DualHead,
    optimizer: torch.optim.Optimizer,
    skips: Tensor,
) -> TrainResult:
    tensors, record = load_checkpoint(path, identity)
    result = resumed(path, record, schedule, tensors["skips"])
    load_head(head, tensors)
    load_optimizer(optimizer, tensors)
    skips.copy_(tensors["skips"])
    return result


def load_head(head: DualHead, tensors: dict[str, Tensor]) -> None:
    """Fill `head` from the tensors of a checkpoint."""
    prefix = "head."
    head.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def predict(head: DualHead, features: Tensor, branch: str = "fused", *, chunk: int = CHUNK) -> Predictions:
    """Predictions for features [N, D]; `branch` is "fused", "linear" or "text". Holds [chunk, C] logits."""
    if branch not in BRANCHES:
        raise ValueError(f"predict: branch must be one of {', '.join(BRANCHES)}, got {branch!r}")
    reading = only(head, BRANCHES[branch])
    parts = [most_likely(reading(rows.to(head.linear.device))) for rows in features.split(chunk)]
    return Predictions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def evaluate(
    head: DualHead, features: Tensor, labels: Tensor, labelled_counts: np.ndarray, *, chunk: int = CHUNK
) -> dict[str, dict[str, Any]]:
    """`classification_metrics` of the fused head and of its linear and text branch alone, on [N, D] features."""
    return {
        branch: classification_metrics(
            *predict(head, features, branch, chunk=chunk), labels, np.asarray(labelled_counts)
        )
        for branch in BRANCHES
    }
