"""What a run says while it goes on and leaves behind: progress, records, skipped steps, warnings."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ulfine_fast.checkpoint import CheckpointError
from ulfine_fast.config import FineTuning, Schedule
from ulfine_fast.optimizer import learning_rate

LOGGER = logging.getLogger(__name__)
MOST_SKIPS = 20
# A run that ends with so many in a row has diverged; a single one is float16 that looks for its scale.
SKIPS_AT_THE_END = 3
# Records whose mean labelled loss is compared with that of a guess: one batch alone may be hard.
GUESSING_RECORDS = 4
# Seconds between two lines about a run, and steps that the first estimate of its time rests on.
LINE_SECONDS, FIRST_STEPS = 30.0, 3


@dataclass
class TrainResult:
    """What a run leaves beside the trained head."""

    history: list[dict[str, Any]] = field(default_factory=list)  # one record per log step
    seconds: float = 0.0  # wall time of the steps, interrupted parts included
    steps: int = 0  # steps done
    skipped: int = 0  # steps that changed nothing because something was not finite


@contextmanager
def reporting(
    start: int, steps: int, progress: bool
) -> Iterator[Callable[[int, Mapping[str, Any] | None], None]]:
    """A function to call after each step, with the steps done and at a log step what there is to show.

    It moves a bar on a terminal. Elsewhere it logs a line after the first steps, at log steps and every 30 seconds:
    how far the run is and how long it will take. Without `progress` it does nothing.
    """
    from tqdm import tqdm

    terminal = sys.stderr is not None and sys.stderr.isatty()
    bar = tqdm(
        total=steps,
        initial=start,
        unit="step",
        disable=not (progress and steps and terminal),
        leave=False,
        desc="training",
    )
    began = said = time.monotonic()

    def report(done: int, shown: Mapping[str, Any] | None = None) -> None:
        nonlocal said
        values = {
            name: f"{x:.3f}" if isinstance(x, float) else str(x or "-") for name, x in (shown or {}).items()
        }
        bar.update()
        if values:
            bar.set_postfix(values, refresh=False)
        now = time.monotonic()
        due = values or done - start == FIRST_STEPS or now - said >= LINE_SECONDS
        if progress and not terminal and due:
            said = now
            left = (now - began) / (done - start) * (steps - done)
            found = "".join(f", {name} {value}" for name, value in values.items())
            LOGGER.info("step %d of %d%s, about %s to go", done, steps, found, _duration(left))

    with bar:
        yield report


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def count_skips(skips: Tensor, finite: Tensor) -> Tensor:
    """The steps that changed nothing, in a row, the longest row and all, [3] int64, after one more step.

    finite: [] bool; nothing waits for the device to know.
    """
    row = torch.where(finite, 0, skips[0] + 1)
    return torch.stack([row, torch.maximum(row, skips[1]), skips[2] + ~finite])


def check_skips(skips: Tensor, loss: Tensor, done: int, steps: int, remedy: str) -> None:
    """RuntimeError, with a `remedy`, for 20 steps in a row that changed nothing, or 3 at the end of the run.

    skips: see `count_skips`. loss: of the last one of the `done` steps, out of `steps`.
    """
    row, longest = skips[:2].tolist()
    if longest >= MOST_SKIPS or (done == steps and row >= SKIPS_AT_THE_END):
        what = "loss or gradient" if bool(loss.isfinite()) else "loss"
        raise RuntimeError(
            f"training stopped at step {done}: {what} was not finite in {max(row, longest)} steps in a row; {remedy}"
        )


def warn_of_guessing(history: list[dict[str, Any]], log_prior: Tensor) -> None:
    """Log a warning when the labelled loss of the last records begins to be no better than a guess by class size.

    log_prior: [C] of the labelled classes; the guess costs their entropy, in nats. That is how a rate that is too high
    shows while all numbers are finite.
    """
    guess = float(-(log_prior.exp() * log_prior).sum())

    def guesses(records: list[dict[str, Any]]) -> bool:
        losses = [record["loss_labelled"] for record in records]
        return len(losses) == GUESSING_RECORDS and None not in losses and sum(losses) >= guess * len(losses)

    before, last = history[-GUESSING_RECORDS - 1 : -1], history[-GUESSING_RECORDS:]
    if guesses(last) and not guesses(before):
        LOGGER.warning(
            "step %d: the labelled loss, %.2f nats over the last %d records, is no better than a guess by class size"
            " (%.2f): if it stays so, lower the learning rate",
            last[-1]["step"],
            sum(record["loss_labelled"] for record in last) / len(last),
            len(last),
            guess,
        )


def run_record(schedule: Schedule | FineTuning, result: TrainResult) -> dict[str, Any]:
    """What a checkpoint says of a run beside its identity."""
    return {
        "steps": result.steps,
        "planned": schedule.steps,
        "seconds": result.seconds,
        "history": result.history,
    }


def resumed(
    path: Path, record: Mapping[str, Any], schedule: Schedule | FineTuning, skips: Tensor
) -> TrainResult:
    """The result so far from the `run_record` of checkpoint `path`, and a line in the log about what follows.

    Another number of steps than was planned is a warning, for the cosine is another one; CheckpointError for fewer
    than are done.
    """
    done, planned, steps = record["steps"], record["planned"], schedule.steps
    if steps < done:
        raise CheckpointError(f"{path}: steps must be at least the {done} that are done, got {steps}")
    if done and steps != planned:
        LOGGER.warning(
            "the run was planned with %d steps: after step %d its learning rate goes from %.3g to %.3g, and its result"
            " is not that of %d steps in one go",
            planned,
            done,
            learning_rate(replace(schedule, steps=planned), done),
            learning_rate(schedule, done),
            steps,
        )
    LOGGER.info("going on after step %d of %d", done, steps)
    return TrainResult(record["history"], record["seconds"], done, int(skips[2]))
