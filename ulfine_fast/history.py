"""What a run says while it goes on and leaves behind: progress, records, skipped steps, warnings."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ulfine_fast.checkpoint import CheckpointError
from ulfine_fast.config import Training
from ulfine_fast.distributed import gather_rows
from ulfine_fast.losses import labelled_log_prior
from ulfine_fast.metrics import pseudo_label_metrics
from ulfine_fast.optimizer import learning_rate
from ulfine_fast.splits import groups_by_rank

if TYPE_CHECKING:
    from ulfine_fast.engine import Engine, StepReport

LOGGER = logging.getLogger(__name__)
MOST_SKIPS = 20
# A run that ends with so many in a row has diverged; a single one is float16 that looks for its scale.
SKIPS_AT_THE_END = 3
# Records whose mean labelled loss is compared with that of a guess: one batch alone may be hard.
GUESSING_RECORDS = 4
# Seconds between two lines about a run, and steps that the first estimate of its time rests on.
LINE_SECONDS, FIRST_STEPS = 30.0, 3
# Steps whose rows a record is made of, the last ones: a run that hardly logs must not keep them all.
MOST_REPORTS = 1000
# One class with more than this share of the pseudo-labels is worth a warning.
COLLAPSED_SHARE = 0.9


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
    """Skips, the steps that changed nothing, after one more step: [3] int64, in the current streak, the longest, all.

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


def warn_of_guessing(history: list[dict[str, Any]], log_prior: Tensor, *, ended: bool = False) -> None:
    """Log a warning when the labelled loss of the last records begins to be no better than a guess by class size.

    log_prior: [C] of the labelled classes; the guess costs their entropy, in nats. That is how a rate that is too high
    shows while all numbers are finite. ended: of a run that is over, fewer records have to do.
    """
    guess = float(-(log_prior.exp() * log_prior).sum())
    enough = min(GUESSING_RECORDS, len(history)) if ended else GUESSING_RECORDS

    def guesses(records: list[dict[str, Any]]) -> bool:
        losses = [record["loss_labelled"] for record in records]
        return len(losses) == enough and None not in losses and sum(losses) >= guess * len(losses)

    before, last = history[-enough - 1 : -1], history[-enough:]
    if guesses(last) and not guesses(before):
        LOGGER.warning(
            "step %d: the labelled loss, %.2f nats over the last %d records, is no better than a guess by class size"
            " (%.2f): if it stays so, lower the learning rate",
            last[-1]["step"],
            sum(record["loss_labelled"] for record in last) / len(last),
            len(last),
            guess,
        )


def warn_of_collapse(record: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Log a warning when one class begins to take nearly all pseudo-labels."""

    def collapsed(record: dict[str, Any]) -> bool:
        shares = record.get("distribution") or ()
        return len(shares) > 1 and max(shares) > COLLAPSED_SHARE * sum(shares)

    if collapsed(record) and not (history and collapsed(history[-1])):
        shares = record["distribution"]
        LOGGER.warning(
            "step %d: class %d has %.0f %% of the pseudo-labels; the other prototypes hardly move",
            record["step"],
            shares.index(max(shares)),
            100 * max(shares) / sum(shares),
        )


def run_record(training: Training, result: TrainResult) -> dict[str, Any]:
    """What a checkpoint says of a run beside its identity."""
    return {
        "steps": result.steps,
        "planned": training.steps,
        "seconds": result.seconds,
        "history": result.history,
    }


def resumed(path: Path, record: Mapping[str, Any], training: Training, skips: Tensor) -> TrainResult:
    """The result so far from the `run_record` of checkpoint `path`, and a line in the log about what follows.

    Another number of steps than was planned is a warning, for the cosine is another one; CheckpointError for fewer
    than are done.
    """
    done, planned, steps = record["steps"], record["planned"], training.steps
    if steps < done:
        raise CheckpointError(f"{path}: steps must be at least the {done} that are done, got {steps}")
    if done and steps != planned:
        LOGGER.warning(
            "the run was planned with %d steps: after step %d its learning rate goes from %.3g to %.3g, and its result"
            " is not that of %d steps in one go",
            planned,
            done,
            learning_rate(replace(training, steps=planned), done),
            learning_rate(training, done),
            steps,
        )
    LOGGER.info("going on after step %d of %d", done, steps)
    return TrainResult(record["history"], record["seconds"], done, int(skips[2]))


class Window:
    """What the steps since the last record said, at most the last 1,000.

    skips: see `count_skips`. labelled_counts: [C] labelled images of each class.
    """

    def __init__(self, engine: Engine, skips: Tensor, labelled_counts: Tensor) -> None:
        self.engine, self.skips = engine, skips
        views = engine.views
        self.log_prior = labelled_log_prior(labelled_counts)
        few = groups_by_rank(labelled_counts.cpu().numpy()) == "few"
        self.few = torch.from_numpy(few).to(engine.device)
        own = views.unlabelled_truth[~views.unlabelled_is_labelled]
        known = len(own) and bool((own >= 0).all())
        self.share = torch.bincount(own, minlength=len(few)) / len(own) if known else None
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.reports: deque[StepReport] = deque(maxlen=MOST_REPORTS)
        self.steps = 0
        self.started = time.perf_counter()

    def add(self, report: StepReport) -> None:
        """Take in a step; nothing waits for the device."""
        self.reports.append(report)
        self.steps += 1
        self.loss = report.loss
        self.skips = count_skips(self.skips, report.finite)

    def skipped(self, done: int, steps: int) -> int:
        """All of the `done` steps that changed nothing. RuntimeError after too many in a row."""
        remedy = "lower the learning rate, or take precision bf16 for fp16"
        if self.engine.at_hand:
            remedy = "check the features for NaN, or lower the learning rate"
        check_skips(self.skips, self.loss, done, steps, remedy)
        return int(self.skips[2])

    def record(self, step: int, history: list[dict[str, Any]]) -> dict[str, Any]:
        """Add a record of the steps up to `step` to `history`, warn of what is wrong, return what there is to show."""
        engine, training = self.engine, self.engine.training
        seconds = time.perf_counter() - self.started
        batch = training.labelled_batch + training.unlabelled_batch * engine.semi
        loss = float(gather_rows([self.reports[-1].loss[None, None]], engine.world)[0].mean())
        record = {
            "step": step + 1,
            "learning_rate": learning_rate(training, step),
            "loss": loss if math.isfinite(loss) else None,
            "loss_labelled": engine.labelled_loss(step),
            "images_per_second": batch * self.steps / seconds,
            "skipped": int(self.skips[2]),
        }
        if not engine.at_hand:
            rows = zip(*(report.rows for report in self.reports), strict=True)
            record["rows_encoded"], record["rows_trained"] = (sum(each) / len(self.reports) for each in rows)
        if engine.semi:
            record |= self._unlabelled()
            warn_of_collapse(record, history)
        if history:
            # of C numbers: hundreds of them would be more than a checkpoint can hold beside its tensors
            history[-1].pop("distribution", None)
        history.append(record)
        warn_of_guessing(history, self.log_prior, ended=step + 1 == training.steps)
        self.clear()
        shown = {"loss": record["loss"]}
        acceptance = record.get("pseudo_labels", {}).get("fused", {}).get("acceptance")
        return shown if acceptance is None else shown | {"kept": f"{acceptance:.0%}"}

    def _unlabelled(self) -> dict[str, Any]:
        """Pseudo-labels and the estimated distribution; copies of labelled images do not count."""
        engine, views = self.engine, self.engine.views
        label, weight, places = (
            torch.cat([getattr(report, name) for report in self.reports])
            for name in ("label", "weight", "places")
        )
        own = ~views.unlabelled_is_labelled[places]
        keep = weight[own] > 0
        found = {"fused": (label[own], keep)}
        truth = views.unlabelled_truth[places[own]]
        if engine.at_hand:
            weak, truth_of_sample = views.sample
            branches = engine.learner.pseudo_of_branches(weak)
            if branches:
                found, truth = branches, truth_of_sample
        record: dict[str, Any] = {"pseudo_labels": {}}
        for name, (label, keep) in found.items():
            quality = pseudo_label_metrics(label, keep, truth, self.few)
            if len(keep):
                # also where no truth is known
                quality["acceptance"] = float(keep.float().mean())
            record["pseudo_labels"][name] = quality
        estimate = engine.learner.distribution()
        if estimate is not None:
            record["distribution"] = estimate.tolist()
            if self.share is not None:
                record["distribution_l1"] = float((estimate - self.share).abs().sum())
        return record
