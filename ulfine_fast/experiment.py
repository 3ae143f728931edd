"""One run from its configuration to its metrics: what the demo and the command line share."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ulfine_fast import evaluation, report
from ulfine_fast.batches import FeatureViews
from ulfine_fast.checkpoint import digest
from ulfine_fast.config import Data, FineTuning, Method, Schedule
from ulfine_fast.engine import Student, load_tuned_tensors
from ulfine_fast.evaluation import Predictions
from ulfine_fast.features import FeatureData, load_features
from ulfine_fast.history import TrainResult
from ulfine_fast.learners import DualConfig, Learner, build_learner
from ulfine_fast.loop import train
from ulfine_fast.run_folder import CONFIG, load_run
from ulfine_fast.splits import ClassRow, split_table
from ulfine_fast.validation import settle_eta

UNITS = {"accuracy": "fraction of images, 0 to 1", "loss": "nats", "seconds": "s", "std": "sample, n - 1"}


@dataclass(frozen=True)
class Outcome:
    """A trained learner and what it does on the test set."""

    learner: Learner
    training: TrainResult
    seconds: float  # wall time of choosing eta, where the method asks for it, and of the steps
    metrics: dict[str, dict[str, Any]]  # by branch, see `classification_metrics`
    predictions: Predictions  # of the first branch, which is the prediction


def load_data(choice: Data, *, progress: bool = True) -> FeatureData:
    """Features of `choice`, from the cache or encoded into it."""
    options = asdict(choice)
    return load_features(options.pop("dataset"), progress=progress, **options)


def run(
    data: FeatureData,
    method: Method,
    schedule: Schedule,
    *,
    device: str = "cpu",
    run_dir: Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    capture: bool = False,
    progress: bool = True,
) -> Outcome:
    """Train `method` on `data` and evaluate it on the test set; the options are those of `loop.train`."""
    started = time.perf_counter()
    tuning = FineTuning(**asdict(schedule))
    prototypes = data.prototypes.to(device)
    settled = settle_eta(data.labelled, data.labels, prototypes, method, tuning)
    choosing = time.perf_counter() - started
    student = _student(data, settled, tuning.seed, device)
    training = train(
        student,
        FeatureViews.of(data, tuning, device),
        data.labelled_counts.numpy(),
        tuning,
        identity={**_identity(data, method), "eta": settled.eta},
        run_dir=run_dir,
        resume=resume,
        checkpoint_every=checkpoint_every,
        capture=capture,
        progress=progress,
    )
    metrics, predictions = evaluate(student.learner, data)
    return Outcome(student.learner, training, choosing + training.seconds, metrics, predictions)


def _student(data: FeatureData, method: Method, seed: int, device: str) -> Student:
    """A learner on the prototypes of `data`, behind no encoder."""
    config, counts = DualConfig(**vars(method)), data.labelled_counts
    return Student(nn.Identity(), build_learner(config, data.prototypes.to(device), counts, seed=seed))


def _identity(data: FeatureData, method: Method) -> dict[str, Any]:
    """What a checkpoint must share with the run that continues it."""
    used = ("labelled", "labels", "weak", "strong", "prototypes", "unlabelled_is_labelled", "labelled_counts")
    return {
        "method": asdict(method),
        "data": {name: digest(torch.as_tensor(getattr(data, name))) for name in used},
    }


def evaluate(learner: Learner, data: FeatureData) -> tuple[dict[str, dict[str, Any]], Predictions]:
    """Metrics of every branch on the test set, and what the first one predicts."""
    predictions = evaluation.predict(learner, data.test[:, None])
    metrics = evaluation.metrics(predictions, data.test_labels, data.labelled_counts)
    return metrics, next(iter(predictions.values()))


def evaluate_run(
    run_dir: Path, configuration: Mapping[str, Any], *, device: str = "cpu"
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Steps and metrics by branch of the run in `run_dir`, from its checkpoint.

    Raises FileNotFoundError without a checkpoint, CheckpointError for one of another run, ValueError for a
    configuration that is not of such a run.
    """
    try:
        choice, method = Data(**configuration["data"]), Method(**configuration["method"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{run_dir / CONFIG}: {error}") from error
    tensors, record = load_run(run_dir, configuration)
    data = load_data(choice)
    student = _student(data, replace(method, eta=record["eta"], eta_folds=0), 0, device)
    load_tuned_tensors(student, tensors, averaged=True)
    return record["steps"], evaluate(student.learner, data)[0]


def split_rows(data: FeatureData) -> list[ClassRow]:
    """`split_table` of the split behind `data`."""
    split = data.split
    labels = np.zeros(
        1 + max(part.max(initial=0) for part in (split.labelled, split.unlabelled)), dtype=np.int64
    )
    labels[split.labelled] = data.labels
    labels[split.unlabelled] = data.unlabelled_truth
    return split_table(split, labels, data.class_names)


def curve(history: Sequence[Mapping[str, Any]], branch: str) -> list[dict[str, Any]]:
    """Pseudo-label metrics of `branch` at each log step, [] for a run without unlabelled data."""
    return [
        {"step": record["step"], **record["pseudo_labels"][branch]}
        for record in history
        if "pseudo_labels" in record
    ]


def write_run(run_dir: Path, configuration: Mapping[str, Any], data: FeatureData, outcome: Outcome) -> None:
    """metrics.json, predictions.csv and the pictures of one run; the pictures compare the branches."""
    training, rows = outcome.training, split_rows(data)
    report.write_json(
        run_dir / "metrics.json",
        {
            **surroundings(),
            "units": UNITS,
            "configuration": configuration,
            "classes": [row._asdict() for row in sorted(rows)],
            "steps": training.steps,
            "seconds": outcome.seconds,
            "eta": outcome.learner.config.eta,
            "skipped": training.skipped,
            "metrics": outcome.metrics,
            "history": training.history,
        },
    )
    report.write_predictions(
        run_dir / "predictions.csv",
        data.test_labels,
        {configuration["name"]: outcome.predictions},
        data.class_names,
    )
    order = data.split.class_order
    curves = {branch: curve(training.history, branch) for branch in outcome.metrics}
    trained_on_unlabelled = all(curves.values())
    report.save_pictures(
        run_dir,
        report.names_in_pictures(rows),
        labelled=[row.labelled for row in rows],
        unlabelled=[row.unlabelled for row in rows],
        truth=data.unlabelled_counts.numpy()[order],
        accuracy={branch: [m["per_class"][k] for k in order] for branch, m in outcome.metrics.items()},
        curves=curves if trained_on_unlabelled else {},
        estimates={configuration["name"]: [training.history[-1]["distribution"][k] for k in order]}
        if trained_on_unlabelled
        else {},
    )


def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    from ulfine_fast import __version__

    return {
        "ulfine_fast": __version__,
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "python": platform.python_version(),
    }


def surroundings() -> dict[str, Any]:
    """What the numbers of a run depend on beside its configuration, for its records."""
    return {"versions": versions(), "threads": torch.get_num_threads(), "processor": platform.machine()}
