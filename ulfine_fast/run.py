"""One run from its recipe to its metrics, and what it leaves in its folder."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ulfine_fast import evaluation, report, run_folder
from ulfine_fast.build import AnyData, AnyMethod, Builder, TestSet, class_rows, load_images
from ulfine_fast.checkpoint import digest_of
from ulfine_fast.config import PRESETS, Encoder, Images, Method, Training, training_of
from ulfine_fast.distributed import World, gather_octets, whole
from ulfine_fast.encoder import IMAGE_WEIGHTS
from ulfine_fast.engine import Student
from ulfine_fast.evaluation import Predictions
from ulfine_fast.feature_cache import VIEWS
from ulfine_fast.features import FeatureData
from ulfine_fast.history import TrainResult
from ulfine_fast.learners import changed_method
from ulfine_fast.loop import train
from ulfine_fast.options import one_of, options_of
from ulfine_fast.training_state import tuned_tensors

UNITS = {"accuracy": "fraction of images, 0 to 1", "loss": "nats", "seconds": "s", "std": "sample, n - 1"}


@dataclass(frozen=True)
class Outcome:
    """A trained student and what it does on the test set."""

    student: Student
    training: TrainResult
    seconds: float  # wall time from the first prototypes to the last step, encoding included
    metrics: dict[str, dict[str, Any]]  # by branch, the prediction first, see `classification_metrics`
    predictions: dict[str, Predictions]
    test: TestSet  # the images that these are of
    labelled_counts: np.ndarray  # [C]
    digest: str  # of everything that was trained


def run(
    data: AnyData,
    encoder: Encoder,
    method: AnyMethod,
    training: Training,
    *,
    device: str = "cpu",
    world: World | None = None,
    crops: str = "single",
    workers: int | None = None,
    run_dir: Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    capture: bool = False,
    progress: bool = True,
    claim: AbstractContextManager[None] | None = None,
) -> Outcome:
    """Train `method` on `data` and evaluate it on the test set.

    Args:
        data: images, or with tuning "none" features. encoder: of images.
        device: of the encoder and the head. world: the processes of this run, None is this one alone.
        crops: views of a test image, "single" or "five" (LIFT's test-time ensembling).
        workers: threads that read and augment images, None: one for each processor, at most 16.
        run_dir, resume, checkpoint_every, capture, progress: as `loop.train`.
        claim: entered before the first step, when everything is loaded, and left at the end of training.

    Raises ValueError for steps of a method that takes none.
    """
    if training.steps and not getattr(method, "trained", True):
        raise ValueError(f"run: steps must be 0 for a method that is not trained, got {training.steps}")
    if crops not in VIEWS:
        raise ValueError(f"run: crops must be {one_of(VIEWS, crops)}")
    world = world or World()
    place = _place(device, world)
    started = time.perf_counter()
    builder = Builder(encoder, method, training, place, world, crops, workers, progress)
    with builder.setup(data) as setup:
        with claim or nullcontext():
            result = train(
                setup.student,
                setup.views,
                setup.labelled_counts,
                training,
                world=world,
                identity=setup.identity,
                run_dir=run_dir,
                resume=resume,
                checkpoint_every=checkpoint_every,
                capture=capture,
                progress=progress,
            )
        seconds = time.perf_counter() - started
        test = setup.test()
    predictions = evaluation.predict(setup.student.learner, test.features)
    metrics = evaluation.metrics(predictions, test.labels, setup.labelled_counts)
    if not isinstance(data, FeatureData):
        for record in gather_octets(json.dumps(data.report.record()).encode(), world, place):
            data.report.add(json.loads(record))
    trained = {name: whole(tensor, world).cpu() for name, tensor in tuned_tensors(setup.student).items()}
    return Outcome(
        setup.student, result, seconds, metrics, predictions, test, setup.labelled_counts, digest_of(trained)
    )


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what and how: all that a run keeps to in its folder. `recipe` makes one."""

    images: Images | None  # None: features in memory, which no folder can find again
    encoder: Encoder
    name: str  # of a preset
    method: AnyMethod
    training: Training
    crops: str

    def configuration(self) -> dict[str, Any]:
        """What `run_folder` compares and `classifier.load_run` reads, JSON values."""
        return {
            "images": {} if self.images is None else asdict(self.images),
            "encoder": asdict(self.encoder),
            "name": self.name,
            "method": asdict(self.method),
            "training": asdict(self.training),
            "crops": self.crops,
            # where relative paths begin
            "began_in": str(Path.cwd()),
        }

    def do(
        self,
        run_dir: Path | None = None,
        data: AnyData | None = None,
        *,
        world: World | None = None,
        resume: bool = False,
        overwrite: bool = False,
        pictures: bool = True,
        begun: Callable[[AnyData], object] | None = None,
        **options: Any,
    ) -> tuple[AnyData, Outcome]:
        """Train and write what a run leaves; the data and what came of them.

        Args:
            run_dir: the folder of the run, None for none; of several processes the first one writes it.
            data: None: what `images` names.
            resume, overwrite: as `run_folder.reserve`. pictures: as `write_run`. world, options: as `run`.
            begun: called with the data before the first step.
        """
        configuration = self.configuration()
        writes = run_dir is not None and (world or World()).leads
        with (
            run_folder.reserve(run_dir, configuration, resume=resume, overwrite=overwrite)
            if writes
            else nullcontext()
        ):
            data = load_images(self.images) if data is None else data
            if begun is not None:
                begun(data)
            outcome = run(
                data,
                self.encoder,
                self.method,
                self.training,
                world=world,
                crops=self.crops,
                run_dir=run_dir,
                resume=resume,
                claim=run_folder.claim(run_dir, configuration, resume=resume) if writes else None,
                **options,
            )
            if writes:
                write_run(run_dir, configuration, data, outcome, pictures=pictures)
        return data, outcome


def recipe(
    images: Images | None,
    encoder: Encoder | None = None,
    *,
    method: str = "ulfine",
    settings: Mapping[str, Any] | None = None,
    crops: str | None = None,
    **training: Any,
) -> Recipe:
    """The recipe of a preset, with what it leaves open settled.

    images: None for features in memory. encoder: None is `Encoder()`. settings: fields of the method, in the place of
    the preset's. crops: None takes the preset's, and "single" of a frozen encoder. training: fields of `Training`; of
    features tuning is "none" unless it is given, see `training_of` for the others.

    Raises ValueError for an unknown method and for settings and fields that do not fit, TypeError for an unknown field
    of `Training`.
    """
    unknown = training.keys() - options_of(Training).keys()
    if unknown:
        raise TypeError(f"training must be {one_of(options_of(Training), min(unknown))}")
    chosen = changed_method(method, settings or {})
    if images is None or images.features is not None:
        training = {"tuning": "none", **training}
    settled = training_of(method, training)
    preset, frozen, encoder = PRESETS[method], settled.tuning == "none", encoder or Encoder()
    if encoder.space is None:
        # other encoders have one space only, and a frozen one has the same for all methods
        joint = frozen or encoder.model in IMAGE_WEIGHTS or encoder.model.startswith("timm:")
        encoder = replace(encoder, space="joint" if joint else preset.space)
    crops = crops or ("single" if frozen else preset.crops)
    return Recipe(images, encoder, method, chosen, settled, crops)


def _place(device: str, world: World) -> torch.device:
    return torch.device(device, world.local_rank) if device == "cuda" else torch.device(device)


def chosen_eta(student: Student) -> float | None:
    """Weight of the linear branch in the prediction, as it was set or chosen; None for a method without branches."""
    config = student.learner.config
    return config.eta if isinstance(config, Method) else None


def curve(history: Sequence[Mapping[str, Any]], branch: str) -> list[dict[str, Any]]:
    """Pseudo-label metrics of `branch` at each record, [] for a run without unlabelled data."""
    return [
        {"step": record["step"], **record["pseudo_labels"][branch]}
        for record in history
        if branch in record.get("pseudo_labels", {})
    ]


def write_run(
    run_dir: Path,
    configuration: Mapping[str, Any],
    data: AnyData,
    outcome: Outcome,
    *,
    pictures: bool = True,
) -> None:
    """metrics.json, predictions.csv and, if they are wanted, the pictures of one run."""
    training, rows = outcome.training, class_rows(data)
    images = None if isinstance(data, FeatureData) else data
    report.write_json(
        run_dir / run_folder.METRICS,
        {
            **surroundings(),
            "units": UNITS,
            "configuration": configuration,
            "classes": [row._asdict() for row in sorted(rows)],
            "unlabelled_counts": data.unlabelled_counts,
            "notes": () if images is None else images.notes,
            "reading": "" if images is None else images.report.summary(),
            "steps": training.steps,
            "seconds": outcome.seconds,
            "seconds_of_steps": training.seconds,
            "eta": chosen_eta(outcome.student),
            "skipped": training.skipped,
            "digest": outcome.digest,
            "metrics": outcome.metrics,
            "history": training.history,
        },
    )
    report.write_predictions(
        run_dir / "predictions.csv",
        outcome.test.labels,
        {configuration["name"]: next(iter(outcome.predictions.values()))},
        data.class_names,
        images=outcome.test.names,
    )
    if not pictures:
        return
    order = [row.id for row in rows]
    last = training.history[-1] if training.history else {}
    truth = data.unlabelled_counts
    branches = list(last.get("pseudo_labels", {}))
    curves = {branch: curve(training.history, branch) for branch in branches}
    report.save_pictures(
        run_dir,
        report.names_in_pictures(rows),
        labelled=[row.labelled for row in rows],
        # all counts are known, or none is
        unlabelled=[row.unlabelled for row in rows] if rows[0].unlabelled is not None else None,
        truth=None if truth is None else np.asarray(truth)[order],
        accuracy={branch: [m["per_class"][k] for k in order] for branch, m in outcome.metrics.items()},
        curves={configuration["name"]: curves["fused"]} if branches == ["fused"] else curves,
        estimates={configuration["name"]: [last["distribution"][k] for k in order]}
        if last.get("distribution")
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
