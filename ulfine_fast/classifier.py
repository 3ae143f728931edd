"""A trained run as a Python object: training it, loading it from its folder, and its classifier for further images."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ulfine_fast import evaluation
from ulfine_fast.augment import sufficient_test_side
from ulfine_fast.build import AnyData, Builder, TestSet, load_images
from ulfine_fast.checkpoint import CheckpointError, replacing
from ulfine_fast.config import PRESETS, Encoder, Images, Method, Training
from ulfine_fast.engine import Student
from ulfine_fast.features import FeatureData
from ulfine_fast.image_data import shortened
from ulfine_fast.image_folders import folder_data
from ulfine_fast.images import GivenImages, ImageArray, ReadReport
from ulfine_fast.learners import LEARNERS
from ulfine_fast.loader import view_batches
from ulfine_fast.run import recipe
from ulfine_fast.run_folder import CONFIG, METRICS, PLACES, checkpoint_of, located, read_configuration
from ulfine_fast.training_state import load_tuned_tensors

# What can be classified: paths or PIL images, pixels, or features of one's own.
Given = Iterable[str | os.PathLike[str] | Image.Image] | Tensor | np.ndarray


class Prediction(NamedTuple):
    """What a classifier says of n images, most likely classes first; on the CPU."""

    label: Tensor  # [n] int64, -1: the image cannot be read
    name: list[str | None]  # [n] of the label
    confidence: Tensor  # [n] float32, softmax probability of the label; 0 without one
    top_label: Tensor  # [n, top] int64
    top_confidence: Tensor  # [n, top] float32
    unreadable: dict[int, str]  # why the image of a row cannot be read


class Classifier:
    """The prediction of a run, for images that need not be in it: encoder, head and the names of the C classes.

    An image is seen as the run sees its test images: in the view of its pipeline, or in five crops. Images are, in all
    methods, an iterable of paths and PIL images, of which a few batches are in memory at a time, or a tensor [n, 3, H, W],
    uint8 or floating in [0, 1]. A run on features of one's own has no encoder: in the place of images its classifier
    takes features [n, D], or [n, V, D] of V views, floating and of any length.
    """

    def __init__(self, student: Student, class_names: Sequence[str], builder: Builder) -> None:
        self.class_names = tuple(class_names)
        self.student, self._builder = student, builder

    def predict(self, images: Given, batch_size: int = 64, top: int = 1) -> Prediction:
        """The class of each image, of softmax(`logits`), and the `top` most likely ones, in 1..C.

        batch_size >= 1: images that are encoded together. An image that cannot be read has label -1 and its reason in
        `unreadable`. Raises ValueError for numbers outside their ranges and for pixels or features of another kind,
        TypeError for images that are neither paths nor PIL images, MachineError where the machine fails and not a file.
        """
        if not 1 <= top <= len(self.class_names):
            raise ValueError(f"predict: top must be in 1..{len(self.class_names)}, got {top}")
        labels, confidences, unreadable = [torch.empty(0, top, dtype=torch.int64)], [torch.empty(0, top)], {}
        start = 0
        for features, reasons in self._encoded(images, batch_size):
            confidence, label = self.logits(features).softmax(-1).topk(top)
            for row, reason in reasons.items():
                label[row], confidence[row], unreadable[start + row] = -1, 0.0, reason
            labels.append(label)
            confidences.append(confidence)
            start += len(features)
        label, confidence = torch.cat(labels), torch.cat(confidences)
        names = [None if row < 0 else self.class_names[row] for row in label[:, 0].tolist()]
        return Prediction(label[:, 0], names, confidence[:, 0], label, confidence, unreadable)

    def features(self, images: Given, batch_size: int = 64) -> Tensor:
        """What the head sees of each image: float32 [n, V, D] of its V views, NaN where it cannot be read.

        Of the encoder as the run tuned it, less its centre where it has one, and not of unit length. Raises as `predict`.
        """
        found = [features for features, _ in self._encoded(images, batch_size)]
        return torch.cat(found) if found else torch.empty(0, 1, self.student.learner.dim)

    @torch.no_grad()
    def logits(self, features: Tensor | np.ndarray) -> Tensor:
        """Class logits float32 [n, C] for equally frequent classes, the mean over views; on the CPU.

        features: [n, D] or [n, V, D], as `features` gives them; else ValueError.
        """
        learner, rows = self.student.learner, torch.as_tensor(features)
        if not (rows.is_floating_point() and rows.ndim in (2, 3) and rows.shape[-1] == learner.dim):
            kind = str(rows.dtype).removeprefix("torch.")
            raise ValueError(
                f"features must be floating, [n, {learner.dim}] or [n, V, {learner.dim}], got {kind} {list(rows.shape)}"
            )
        rows = rows if rows.ndim == 3 else rows[:, None]
        chunks = rows.float().split(max(evaluation.CHUNK // rows.shape[1], 1))
        return torch.cat(
            [evaluation.fused_logits(learner, chunk.to(self._builder.device)).cpu() for chunk in chunks]
        )

    def export(self, path: Path | str) -> None:
        """Write the head as one linear layer, a safetensors file: logits = weight @ unit(feature).

        Tensors: weight float32 [C, D] and, of a tower that has one, centre float32 [D], which its features have had
        subtracted. Metadata: class_names as JSON. ValueError for a method whose prediction is no such layer, and for a
        path that does not end in .safetensors.

        Of an encoder that was tuned nothing is written: the layer fits the features of the tuned one alone.
        """
        from safetensors.torch import save

        path, student = Path(path), self.student
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
        names = json.dumps(list(self.class_names), ensure_ascii=False)
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, {"class_names": names}))

    @torch.no_grad()
    def _encoded(self, images: Given, batch_size: int) -> Iterator[tuple[Tensor, dict[int, str]]]:
        """Features [b, V, D] batch by batch, NaN where an image cannot be read, and by row why not."""
        if batch_size < 1:
            raise ValueError(f"predict: batch_size must be at least 1, got {batch_size}")
        tower, builder = self.student.tower, self._builder
        if isinstance(tower, nn.Identity):
            rows = torch.as_tensor(images)
            rows = rows if rows.ndim == 3 else rows[:, None]
            yield from ((part, {}) for part in rows.split(batch_size))
            return
        if isinstance(images, (Tensor, np.ndarray)):
            source = ImageArray(_pixels(torch.as_tensor(images)), "images")
            places = (range(len(source))[first:][:batch_size] for first in range(0, len(source), batch_size))
        elif isinstance(images, (str, os.PathLike, Image.Image)):
            raise TypeError(f"images must be several, got one: {images!r}")
        else:
            source = GivenImages(images)
            places = source.batches(batch_size)
        view: Callable[[Image.Image], Tensor] = builder.test_views(tower)
        batches = view_batches(
            source,
            lambda image, _: view(image),
            places,
            shape=view(Image.new("RGB", (1, 1))).shape,
            workers=builder.threads,
            device=builder.device,
            at_least=sufficient_test_side(tower.size),
        )
        with closing(batches):
            for pixels, errors in batches:
                reasons = {row: error.reason for row, error in enumerate(errors) if error is not None}
                features = self.student.encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).cpu()
                features[list(reasons)] = torch.nan
                yield features, reasons


def _pixels(images: Tensor) -> np.ndarray:
    """uint8 [n, H, W, 3] of uint8 or floating images [n, 3, H, W]."""
    floating = images.is_floating_point()
    if not (floating or images.dtype == torch.uint8) or images.ndim != 4 or images.shape[1] != 3:
        kind = str(images.dtype).removeprefix("torch.")
        raise ValueError(
            f"images must be uint8 or floating, [n, 3, H, W], or paths or PIL images, got {kind} {list(images.shape)}"
        )
    if floating:
        # NaN is in no range
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(
                f"floating images must be in [0, 1], got {float(images.min()):g} to {float(images.max()):g}"
            )
        images = (images.float() * 255).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@dataclass(frozen=True, eq=False)
class Run:
    """A run that was trained or loaded. `train` and `load_run` make one.

    folder: None of a run without one. configuration: all that it was told, JSON values. metrics: by branch, the
    prediction first, see `classification_metrics`; {} of a run that was not finished. history: see `loop.train`.
    seconds: wall time of the steps, interrupted parts included. steps: those done. labelled_counts: [C] labelled images
    by class. data: what it was trained on, None of one that was loaded.
    """

    folder: Path | None
    configuration: Mapping[str, Any]
    classifier: Classifier
    metrics: dict[str, dict[str, Any]]
    history: list[dict[str, Any]]
    seconds: float
    steps: int
    labelled_counts: np.ndarray
    data: AnyData | None = None

    def evaluate(
        self, crops: str | None = None, report: ReadReport | None = None
    ) -> dict[str, dict[str, Any]]:
        """Metrics by branch on the test images, which are read again.

        crops: views of a test image, "single" or "five"; None: those of the run. report: takes what cannot be read. Of
        a run that was loaded, only the test images need be there, where they lie in folders of their own, and they may
        be of some classes alone. Raises FileNotFoundError where nothing is at a path of `configuration`, ValueError for
        test images of other classes.
        """
        classifier, report = self.classifier, report or ReadReport()
        student, builder = classifier.student, classifier._builder
        builder = replace(builder, crops=crops or builder.crops)
        if self.data is None:
            data, labels = _test_images(self.folder, self.configuration, classifier.class_names)
        else:
            data, labels = self.data, np.asarray(self.data.test_labels)
        if isinstance(data, FeatureData):
            test = TestSet.of(data)._replace(labels=torch.from_numpy(labels))
        elif builder.training.tuning == "none":
            # what is kept is of the encoder without its centre
            of_centre = builder.cached_test_set(builder.tower(), data.test, labels, report)
            test = of_centre(student.tower.centre)
        else:
            test = builder.test_set(student, data.test, labels, report)
        predictions = evaluation.predict(student.learner, test.features)
        return evaluation.metrics(predictions, test.labels, self.labelled_counts)


def train(
    images: Images | FeatureData,
    encoder: Encoder | None = None,
    *,
    method: str = "ulfine",
    tuning: str | None = None,
    out: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
    crops: str | None = None,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: int = 500,
    workers: int | None = None,
    capture: bool = False,
    progress: bool = True,
    **training: Any,
) -> Run:
    """Train a method, in this process; what the command `ulfine-fast train` does.

    Args:
        images: what is learned from, or features in memory.
        encoder: of images; None is `Encoder()`, the offline one.
        method: a preset, see `config.PRESETS`. settings: fields of the method by name, in the place of the preset's.
        tuning: what of the encoder is trained, see `Training.tuning`; None is the preset's choice, of features "none".
        out: folder of the run, which gets its checkpoint, metrics and pictures; None writes nothing.
        resume: go on from the checkpoint in `out`. overwrite: replace another run there.
        crops: views of a test image, "single" or "five"; None is the preset's choice.
        device, workers, checkpoint_every, capture, progress: as `run.run`.
        training: other fields of `Training`: steps, learning_rate, seed (of the training; that of a split is one of
            `images`) and so on. What is not given is as `training_of` says.

    Raises ValueError and TypeError for choices that do not fit, FileExistsError for a folder of another run, and what
    reading the images and `loop.train` raise.
    """
    if resume and (out is None or overwrite):
        raise ValueError("resume needs the folder of a run, out, that is not overwritten")
    known = {} if tuning is None else {"tuning": tuning}
    data = images if isinstance(images, FeatureData) else None
    chosen = recipe(
        None if data is not None else images,
        encoder,
        method=method,
        settings=settings,
        crops=crops,
        **known,
        **training,
    )
    folder = None if out is None else Path(out)
    data, outcome = chosen.do(
        folder,
        data,
        device=device,
        resume=resume,
        overwrite=overwrite,
        checkpoint_every=checkpoint_every,
        workers=workers,
        capture=capture,
        progress=progress,
    )
    builder = Builder(
        chosen.encoder, chosen.method, chosen.training, torch.device(device), crops=chosen.crops, workers=workers,
        progress=progress,
    )  # fmt: skip
    result = outcome.training
    return Run(
        folder,
        chosen.configuration(),
        Classifier(outcome.student, data.class_names, builder),
        outcome.metrics,
        result.history,
        result.seconds,
        result.steps,
        outcome.labelled_counts,
        data,
    )


def load_run(folder: Path | str, device: str = "cpu", *, at: Sequence[str] = ()) -> Run:
    """The run in the folder that `train`, or the command, wrote; no image is read.

    at: NAME=PATH for what was moved, see `run_folder.located`. Raises FileNotFoundError where there is no run or no
    checkpoint, CheckpointError for the checkpoint or the encoder of another run, ValueError for a damaged file.
    """
    folder = Path(folder)
    return stored_run(folder, located(read_configuration(folder), at), device)


def stored_run(folder: Path, configuration: Mapping[str, Any], device: str = "cpu") -> Run:
    """`load_run` of a folder whose configuration is known."""
    try:
        encoder = dict(configuration["encoder"])
        templates = encoder.pop("templates")
        encoder = Encoder(**encoder, templates=None if templates is None else tuple(templates))
        training = Training(**configuration["training"])
        method = replace(LEARNERS[PRESETS[configuration["name"]].learner], **configuration["method"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    tensors, record = checkpoint_of(folder, configuration)
    if isinstance(method, Method) and method.eta_folds:
        method = replace(method, eta=record["eta"], eta_folds=0)
    builder = Builder(encoder, method, training, torch.device(device), crops=configuration["crops"])
    student = _student(_tower(folder, record, builder), record, tensors, builder)
    path = folder / METRICS
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return Run(
        folder,
        configuration,
        Classifier(student, record["class_names"], builder),
        # those of fewer steps are of a run that went on
        written["metrics"] if written.get("steps") == record["steps"] else {},
        record["history"],
        record["seconds"],
        record["steps"],
        np.array(record["labelled_counts"]),
    )


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
    if not configuration["images"]:
        raise ValueError(f"{run_dir}: expected test images, got a run on features that were in memory")
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
