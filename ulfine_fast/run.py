"""One run from its configuration to its metrics, and what is done with it afterwards: evaluation, reports, export."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ulfine_fast import evaluation, report
from ulfine_fast.build import AnyData, AnyMethod, Builder, TestSet, class_rows, load_images
from ulfine_fast.checkpoint import CheckpointError, digest_of, replacing
from ulfine_fast.config import PRESETS, Encoder, Images, Method, Training
from ulfine_fast.distributed import World, gather_octets, whole
from ulfine_fast.engine import Student
from ulfine_fast.evaluation import Predictions
from ulfine_fast.features import FeatureData
from ulfine_fast.history import TrainResult
from ulfine_fast.image_data import shortened
from ulfine_fast.image_folders import folder_data
from ulfine_fast.images import ReadReport
from ulfine_fast.learners import LEARNERS
from ulfine_fast.loop import train
from ulfine_fast.options import one_of
from ulfine_fast.run_folder import CONFIG, PLACES, load_run
from ulfine_fast.training_state import load_tuned_tensors, tuned_tensors

UNITS = {"accuracy": "fraction of images, 0 to 1", "loss": "nats", "seconds": "s", "std": "sample, n - 1"}
CROPS = ("single", "five")


@dataclass(frozen=True)
class Outcome:
    """A trained student and what it does on the test set."""

    student: Student
    training: TrainResult
    seconds: float  # wall time from the first prototypes to the last step, encoding included
    metrics: dict[str, dict[str, Any]]  # by branch, the prediction first, see `classification_metrics`
    predictions: dict[str, Predictions]
    test: TestSet  # the images that these are of
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
    if crops not in CROPS:
        raise ValueError(f"run: crops must be {one_of(CROPS, crops)}")
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
    metrics, predictions = _evaluate(setup.student, test, setup.labelled_counts)
    if not isinstance(data, FeatureData):
        for record in gather_octets(json.dumps(data.report.record()).encode(), world, place):
            data.report.add(json.loads(record))
    trained = {name: whole(tensor, world).cpu() for name, tensor in tuned_tensors(setup.student).items()}
    return Outcome(setup.student, result, seconds, metrics, predictions, test, digest_of(trained))


def _place(device: str, world: World) -> torch.device:
    return torch.device(device, world.local_rank) if device == "cuda" else torch.device(device)


def _evaluate(
    student: Student, test: TestSet, labelled_counts: np.ndarray
) -> tuple[dict[str, dict[str, Any]], dict[str, Predictions]]:
    predictions = evaluation.predict(student.learner, test.features)
    return evaluation.metrics(predictions, test.labels, labelled_counts), predictions


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
        run_dir / "metrics.json",
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


def _load(
    run_dir: Path, configuration: Mapping[str, Any], device: str, crops: str | None = None
) -> tuple[dict[str, Any], dict[str, Any], Builder]:
    """Record and tensors of the checkpoint in `run_dir`, and what builds its student."""
    try:
        encoder = dict(configuration["encoder"])
        templates = encoder.pop("templates")
        encoder = Encoder(**encoder, templates=None if templates is None else tuple(templates))
        training = Training(**configuration["training"])
        method = replace(LEARNERS[PRESETS[configuration["name"]].learner], **configuration["method"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run_dir / CONFIG}: {error}") from error
    tensors, record = load_run(run_dir, configuration)
    if isinstance(method, Method) and method.eta_folds:
        method = replace(method, eta=record["eta"], eta_folds=0)
    place = _place(device, World())
    crops = crops or configuration["crops"]
    return record, tensors, Builder(encoder, method, training, place, crops=crops)


def _tower(run_dir: Path, record: Mapping[str, Any], builder: Builder) -> nn.Module:
    """The encoder of a run as it comes; none of a run on features of one's own."""
    if record["encoder"] is None:
        return nn.Identity()
    tower = builder.tower()
    # frozen weights are not in the checkpoint
    if record["encoder"] != tower.fingerprint:
        raise CheckpointError(
            f"{run_dir}: expected the encoder of the run, {record['encoder'][:12]}, got another one,"
            f" {tower.fingerprint[:12]}"
        )
    return tower


def _student(
    tower: nn.Module, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], builder: Builder
) -> Student:
    counts = torch.tensor(record["labelled_counts"])
    # first prototypes do not matter: those of the checkpoint take their place
    width = next(
        tensors[name].shape[1] for name in tensors if name.startswith("learner.") and tensors[name].ndim == 2
    )
    student = builder.student(tower, builder.method, torch.eye(len(counts), width), counts)
    load_tuned_tensors(student, tensors, averaged=True)
    return student


def _test_images(
    run_dir: Path, configuration: Mapping[str, Any], class_names: Sequence[str]
) -> tuple[AnyData, np.ndarray]:
    """The data of a run, of which only the test images need be there, and their classes among those of the run."""
    try:
        choice = Images(**configuration["images"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{run_dir / CONFIG}: {error}") from error
    for name in PLACES["images"]:
        # folders of training images may be gone
        path = None if name in ("labelled", "unlabelled") else getattr(choice, name)
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(
                f"{run_dir}: expected {name} of the run at {path}, got nothing there; relative paths begin in"
                f" {configuration.get('began_in', '.')}; say where it is: --at {name}=PATH"
            )
    if choice.test is None:
        data = load_images(choice)
    else:
        data = folder_data(Path(choice.test), None, Path(choice.test), classes=class_names)
    labels = np.asarray(data.test_labels)
    if data.class_names == tuple(class_names):
        return data, labels
    unknown = [name for name in data.class_names if name not in class_names]
    if unknown:
        raise ValueError(
            f"{run_dir}: test images must be of the classes of the run, got {shortened(unknown)}"
        )
    for names in (class_names, data.class_names):
        if len(set(names)) < len(names):
            raise ValueError(
                f"{run_dir}: classes must be those of the run in its order, for several have one name, got"
                f" {shortened(data.class_names)}"
            )
    return data, np.array([class_names.index(name) for name in data.class_names])[labels]


def evaluate_run(
    run_dir: Path, configuration: Mapping[str, Any], *, device: str = "cpu", crops: str | None = None
) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Steps and metrics by branch of the run in `run_dir`, from its checkpoint, and which images cannot be read.

    crops None: those of the run. Reads the test images alone, where they lie in folders of their own. Raises
    FileNotFoundError where there is no checkpoint or nothing at a path of `configuration`, see `run_folder.located`;
    CheckpointError for the checkpoint or the encoder of another run; ValueError for test images of other classes.
    """
    record, tensors, builder = _load(run_dir, configuration, device, crops)
    data, labels = _test_images(run_dir, configuration, record["class_names"])
    reading = ReadReport()
    if isinstance(data, FeatureData):
        student = _student(nn.Identity(), record, tensors, builder)
        views = data.test if data.test.ndim == 3 else data.test[:, None]
        test = TestSet(views, torch.from_numpy(labels), None)
    else:
        tower = _tower(run_dir, record, builder)
        if builder.training.tuning == "none":
            # before the centre of the run is in its place
            of_centre = builder.cached_test_set(tower, data.test, labels, reading)
            student = _student(tower, record, tensors, builder)
            test = of_centre(tower.centre)
        else:
            student = _student(tower, record, tensors, builder)
            test = builder.test_set(student, data.test, labels, reading)
    metrics, _ = _evaluate(student, test, np.array(record["labelled_counts"]))
    return record["steps"], metrics, reading.summary()


def export_run(run_dir: Path, configuration: Mapping[str, Any], path: Path) -> None:
    """`export_head` of the run in `run_dir`; no image is read."""
    record, tensors, builder = _load(run_dir, configuration, "cpu")
    student = _student(_tower(run_dir, record, builder), record, tensors, builder)
    export_head(path, student, record["class_names"])


def export_head(path: Path, student: Student, class_names: Sequence[str]) -> None:
    """Write the head as one linear layer, a safetensors file: logits = weight @ unit(feature).

    Tensors: weight float32 [C, D] and, of a tower that has one, centre float32 [D], which its features have had
    subtracted. Metadata: class_names as JSON. ValueError for a method whose prediction is no such layer, and for a
    path that does not end in .safetensors.

    Of an encoder that was tuned nothing is written: the layer fits the features of the tuned one alone.
    """
    from safetensors.torch import save

    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    folded = student.learner.folded()
    if folded is None:
        raise ValueError(
            f"the prediction must be one linear map of the unit feature, got {type(student.learner).__name__}"
        )
    tensors = {"weight": folded.detach().cpu().contiguous()}
    if getattr(student.tower, "centred", False):
        tensors["centre"] = student.tower.centre.cpu()
    with replacing(path) as temporary:
        temporary.write_bytes(
            save(tensors, {"class_names": json.dumps(list(class_names), ensure_ascii=False)})
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
