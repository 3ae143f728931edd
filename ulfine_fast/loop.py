"""The loop of a run: steps, records, checkpoints, signals, and exact resume."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ulfine_fast.checkpoint import (
    CHECKPOINT,
    deferred_signals,
    digest_of,
    load_checkpoint,
    save_checkpoint,
    stop,
)
from ulfine_fast.config import Training
from ulfine_fast.distributed import World, check_equal, largest
from ulfine_fast.engine import Engine, Student, Views
from ulfine_fast.history import MOST_SKIPS, TrainResult, Window, reporting, resumed, run_record

if TYPE_CHECKING:
    import numpy as np

    from ulfine_fast.batches import FeatureViews


def train(
    student: Student,
    views: Views | FeatureViews,
    labelled_counts: np.ndarray,
    training: Training,
    *,
    world: World | None = None,
    identity: Mapping[str, Any] | None = None,
    run_dir: Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    capture: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train `student` in place; at the end it holds the mean weights, where the training asks for them.

    A learner that is not trained takes no step. With `training.shard` the tower is left split: its parameters are DTensors, `distributed.whole` has their values,
    and all processes encode equally many batches.

    Args:
        labelled_counts: [C] labelled images by class, for the groups of the reports.
        world: the processes of the run; None is this one alone.
        identity: what a checkpoint must share with the run that continues it, JSON values: method, data, encoder.
        run_dir: where the first process writes checkpoints, None writes none.
        resume: continue from the checkpoint in `run_dir` if there is one. The result is bit by bit that of a run
            without interruption with the same number of processes and threads on the same machine; another number
            of processes may go on, too, and with or without `training.shard`, and rounds differently.
        checkpoint_every: steps between two checkpoints; one more is written at the end and, without
            `training.look_ahead`, one after the step in which SIGINT or SIGTERM comes (of several processes: the next
            step at which they meet, at most 20 later).
        capture: run the steps on cached features as one CUDA graph, with the same bits.
        progress: show a progress bar on a terminal, and elsewhere log lines of level INFO.

    Returns:
        TrainResult; its history has, every `training.log_every` steps and at the end: step, learning_rate, loss
        (nats, mean of the processes), loss_labelled (of the labelled batch alone after its step), images_per_second
        (labelled and unlabelled images of all processes), with images rows_encoded and rows_trained by this process
        per step since the last record, skipped, and with unlabelled images pseudo_labels (see
        `pseudo_label_metrics`, over the last 1,000 steps at most since the last record, without copies of labelled
        images; on cached features of each branch, over the same 2,048 images in each record), and distribution_l1,
        from the learner's `distribution` to the true one, in [0, 2], where both are known; the last record that
        `distribution`, too.

    Raises:
        CheckpointError: the checkpoint is damaged, of another run or of more steps. ValueError: see `Engine`.
        RuntimeError: 20 steps in a row were not finite, or the last 3 (the run stops at its next record, checkpoint or
        multiple of 20), or the processes do not agree. KeyboardInterrupt, Terminated: a signal stopped it.
    """
    world = world or World()
    engine = Engine(student, views, training, world, capture=capture)
    steps = training.steps if engine.learner.trained else 0
    result, skips = TrainResult(), torch.zeros(3, dtype=torch.int64)
    path = None if run_dir is None else Path(run_dir) / CHECKPOINT
    identity = {**(identity or {}), "training": training.identity()}
    if training.look_ahead:
        # a step after a checkpoint does not look ahead, so that none of that has to be saved
        identity["checkpoint_every"] = checkpoint_every
    if resume and path is not None and path.exists():
        result, skips = _restore(path, identity, engine)
    if world.size > 1:
        # folders differ between machines, and a checkpoint may be on one of them only
        beginning = digest_of({}, json.dumps([identity, steps, result.steps]))
        check_equal(beginning, "data, encoder, method and first step", world, engine.device)
    window = Window(engine, skips.to(engine.device), torch.as_tensor(labelled_counts))
    started = time.perf_counter() - result.seconds
    with (
        reporting(result.steps, steps, progress and world.leads) as report_progress,
        deferred_signals() as signals,
    ):
        for step in range(result.steps, steps):
            done = step + 1
            saves = path is not None and (done % checkpoint_every == 0 or done == steps)
            window.add(engine.step(step, alone=saves))
            logs = done % training.log_every == 0 or done == steps
            waits = logs or saves or done % MOST_SKIPS == 0
            if waits:
                result.skipped = window.skipped(done, steps)
            shown = None
            if logs:
                shown = window.record(step, result.history)
                if world.size > 1:
                    check_equal(engine.state.checksum(), "weights and state", world, engine.device)
            result.steps = done
            report_progress(done, shown)
            ends = signals[0] if signals else 0
            if world.size > 1:
                # all of them end after the same step, one at which the host waits anyway
                ends = int(largest(torch.tensor(ends, device=engine.device), world)) if waits else 0
            # what was looked ahead is in no checkpoint: such a run goes on from the one before
            if saves or (ends and path is not None and not training.look_ahead):
                result.seconds = time.perf_counter() - started
                _save(path, identity, engine, window.skips, result)
            if ends:
                stop(ends)
    result.seconds = time.perf_counter() - started
    if path is not None and not steps:
        _save(path, identity, engine, window.skips, result)
    engine.state.take_mean_weights()
    return result


def _save(
    path: Path, identity: Mapping[str, Any], engine: Engine, skips: Tensor, result: TrainResult
) -> None:
    tensors = engine.state.whole_tensors()
    if engine.world.leads:
        record = {**identity, **run_record(engine.training, result)}
        save_checkpoint(path, {**tensors, "skips": skips}, record)


def _restore(path: Path, identity: Mapping[str, Any], engine: Engine) -> tuple[TrainResult, Tensor]:
    tensors, record = load_checkpoint(path, identity)
    result = resumed(path, record, engine.training, tensors["skips"])
    engine.state.load(tensors)
    return result, tensors["skips"]
