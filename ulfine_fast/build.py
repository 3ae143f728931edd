"""What a run is made of, from its configuration: images, encoder, first prototypes, student, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ulfine_fast.augment import build_pipeline, five_crops, sufficient_test_side, test_views
from ulfine_fast.batches import FeatureViews, ImageViews
from ulfine_fast.checkpoint import digest
from ulfine_fast.config import Encoder, Images, Method, Training
from ulfine_fast.datasets import dataset_data
from ulfine_fast.distributed import World, gather_rows
from ulfine_fast.engine import Student, encode
from ulfine_fast.feature_cache import encoded_features, encoded_test
from ulfine_fast.feature_file import read_features
from ulfine_fast.features import FeatureData, check_every_class, class_means
from ulfine_fast.image_data import UNKNOWN, ImageData
from ulfine_fast.image_folders import folder_data
from ulfine_fast.image_tables import list_data, table_data
from ulfine_fast.imagenet127 import imagenet127_data
from ulfine_fast.images import ChosenImages, ImageSource, ReadReport
from ulfine_fast.learners import Config, build_learner
from ulfine_fast.loader import ViewLoader, default_workers, evaluation_batches
from ulfine_fast.splits import ClassRow, first_per_class, groups_by_rank
from ulfine_fast.towers import Tower, load_tower
from ulfine_fast.tuning import tune
from ulfine_fast.validation import settle_eta

if TYPE_CHECKING:
    from PIL import Image

# Training images that the centre of a tower is measured on, and labelled ones of a class whose mean starts its
# prototype where there is no text (LIFT+).
CENTRE_IMAGES, MEAN_IMAGES = 1000, 100

AnyMethod = Method | Config
AnyData = ImageData | FeatureData


def load_images(choice: Images) -> AnyData:
    """What `choice` names: images, or features; raises what their reader raises."""
    if choice.features is not None:
        return read_features(choice.features)
    if choice.labelled is not None:
        unlabelled = None if choice.unlabelled is None else Path(choice.unlabelled)
        return folder_data(Path(choice.labelled), unlabelled, Path(choice.test))
    if choice.table is not None:
        return table_data(Path(choice.table), None if choice.root is None else Path(choice.root))
    class_names = None if choice.class_names is None else Path(choice.class_names)
    share = {} if choice.labelled_share is None else {"labelled_share": choice.labelled_share}
    if choice.train_list is not None:
        lists = Path(choice.train_list), Path(choice.test_list)
        root = lists[0].parent if choice.root is None else Path(choice.root)
        return list_data(*lists, root, class_names=class_names, **share)
    if choice.imagenet127 is not None:
        superclasses = None if choice.superclasses is None else Path(choice.superclasses)
        return imagenet127_data(
            Path(choice.imagenet127), superclasses=superclasses, class_names=class_names, **share
        )
    unlabelled_largest = choice.unlabelled_largest
    # it comes with unlabelled images of its own
    if unlabelled_largest is None and choice.dataset != "stl10":
        unlabelled_largest = 2 * choice.labelled_largest
    return dataset_data(
        choice.dataset,
        protocol=choice.protocol,
        labelled_largest=choice.labelled_largest,
        unlabelled_largest=unlabelled_largest,
        imbalance=choice.imbalance,
        unlabelled_imbalance=choice.unlabelled_imbalance,
        unlabelled=choice.distribution,
        class_order=choice.class_order,
        seed=choice.seed,
    )


def class_rows(data: AnyData) -> list[ClassRow]:
    """One row for each class, most labelled images first; unlabelled counts only where every class is known."""
    labelled, truth = np.asarray(data.labelled_counts), np.asarray(data.unlabelled_truth)
    unlabelled = None if (truth == UNKNOWN).any() else np.bincount(truth, minlength=len(labelled)).tolist()
    groups = groups_by_rank(labelled)
    return [
        ClassRow(
            int(k),
            data.class_names[k],
            int(labelled[k]),
            None if unlabelled is None else unlabelled[k],
            str(groups[k]),
        )
        for k in np.argsort(-labelled, kind="stable")
    ]


class TestSet(NamedTuple):
    """Test images that could be read: what a learner sees of them, and what they are."""

    features: Tensor  # [n, V, D] of V views, on the CPU
    labels: Tensor  # [n] int64
    names: list[str] | None  # None: features of one's own

    @classmethod
    def of(cls, data: FeatureData) -> Self:
        """The test part of `data`."""
        images = None if data.images is None else data.images.test
        names = None if images is None else [images.name(row) for row in range(len(images))]
        return cls(data.test if data.test.ndim == 3 else data.test[:, None], data.test_labels, names)


@dataclass(frozen=True)
class Setup:
    """A student with its batches; the same of images, of cached features and of features of one's own."""

    student: Student
    views: ImageViews | FeatureViews
    labelled_counts: np.ndarray  # [C]
    test: Callable[[], TestSet]
    identity: dict[str, Any]  # what a checkpoint must share with the run that continues it


@dataclass(frozen=True)
class Reader:
    """How whole sets of images are encoded: the view of each, and the work in the background.

    report: the images that could not be read.
    """

    views: Callable[..., Tensor]  # picture -> uint8 [K, 3, S, S]
    size: int  # S
    workers: int
    device: torch.device
    batch_size: int = 64
    progress: bool = True
    report: ReadReport = field(default_factory=ReadReport)

    @torch.no_grad()
    def features(
        self, encode_images: Callable[[Tensor], Tensor], source: ImageSource, rows: np.ndarray
    ) -> tuple[Tensor, np.ndarray]:
        """Features float32 [n, K, D] on the CPU of images `rows` of `source`, and which could be read, [n] bool."""
        found, readable = [], []
        batches = evaluation_batches(
            ChosenImages(source, rows),
            self.views,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            at_least=sufficient_test_side(self.size),
            on_unreadable=lambda error: self.report.add_unreadable(error.name, error.reason),
            progress=self.progress,
        )
        for batch in batches:
            images, views = batch.images.shape[:2]
            found.append(encode_images(batch.images.flatten(0, 1)).float().view(images, views, -1).cpu())
            readable.append(batch.readable)
        return torch.cat(found), np.concatenate(readable)


@dataclass(frozen=True)
class Builder:
    """Makes the setup of a run.

    workers: threads that read and augment images, None: one for each processor, at most 16.
    """

    encoder: Encoder
    method: AnyMethod
    training: Training
    device: torch.device
    world: World = field(default_factory=World)
    crops: str = "single"
    workers: int | None = None
    progress: bool = True

    @contextmanager
    def setup(self, data: AnyData) -> Iterator[Setup]:
        """The setup on `data`, with its readers at work for the length of the block.

        Raises ValueError for features with a tuning, which needs images.
        """
        if isinstance(data, FeatureData):
            if self.training.tuning != "none":
                raise ValueError(f"tuning must be none with features, got {self.training.tuning!r}")
            yield self._on_features(data, nn.Identity())
        elif self.training.tuning == "none":
            tower = self.tower()
            yield self._on_features(self._encoded(tower, data), tower)
        else:
            with self._on_images(data) as setup:
                yield setup

    def tower(self) -> Tower:
        """The encoder as it comes."""
        encoder = self.encoder
        return load_tower(
            encoder.model,
            encoder.pretrained,
            space=encoder.space or "joint",
            size=encoder.size,
            compile=encoder.compile,
            gradient_checkpointing=encoder.gradient_checkpointing,
            device=self.device,
            seed=self.training.seed,
        )

    def student(self, tower: nn.Module, method: AnyMethod, prototypes: Tensor, counts: Tensor) -> Student:
        """`tower` with the modules of its tuning in place, and the learner of `method` on these prototypes.

        counts: [C] int64 labelled images of each class.
        """
        training = self.training
        if isinstance(tower, Tower):
            tune(
                tower,
                training.tuning,
                classes=len(prototypes),
                width=training.width,
                blocks=training.blocks,
                seed=training.seed,
            )
        learner = build_learner(method, prototypes.cpu(), counts.cpu(), seed=training.seed).to(self.device)
        return Student(tower, learner, training.precision)

    def test_set(
        self, student: Student, images: ImageSource, labels: np.ndarray, report: ReadReport
    ) -> TestSet:
        """The test images through the encoder of `student`; each process encodes a share, all return the same."""
        count, size = len(images), self.world.size
        reader = replace(self._reader(student.tower, report), views=self.test_views(student.tower))
        share = -(-count // size)
        # the last process reads some images again, so that all have as many
        rows = np.minimum(np.arange(self.world.rank * share, (self.world.rank + 1) * share), count - 1)
        features, readable = reader.features(student.encode, images, rows)
        columns = [features.to(self.device)[None], torch.from_numpy(readable).to(self.device)[None]]
        features, mask = (column[:count].cpu() for column in gather_rows(columns, self.world))
        names = [images.name(int(row)) for row in mask.nonzero().flatten()]
        return TestSet(features[mask], torch.from_numpy(labels)[mask], names)

    def cached_test_set(
        self, tower: Tower, images: ImageSource, labels: np.ndarray, report: ReadReport
    ) -> Callable[[Tensor], TestSet]:
        """The test images of a run on cached features, as a function of the centre [D] of the tower."""
        rows, readable = encoded_test(
            tower, images, build_pipeline(self.training.pipeline), report=report, **self._encoding()
        )
        names = [images.name(int(row)) for row in np.flatnonzero(readable)]
        kept = torch.from_numpy(labels)[torch.from_numpy(readable)]
        return lambda centre: TestSet(F.normalize(rows - centre.cpu(), dim=-1), kept, names)

    def test_views(self, tower: Tower) -> Callable[[Image.Image], Tensor]:
        """From a test image to its views, uint8 [V, 3, S, S]: one, or five crops."""
        pipeline = build_pipeline(self.training.pipeline)
        if self.crops == "five":
            return partial(five_crops, size=tower.size, patch=tower.patch, resampling=pipeline.resampling)
        return partial(test_views, pipeline=pipeline, size=tower.size)

    def _reader(self, tower: Tower, report: ReadReport) -> Reader:
        plain = replace(self, crops="single").test_views(tower)
        shown = self.progress and self.world.leads
        return Reader(plain, tower.size, self.threads, self.device, progress=shown, report=report)

    @property
    def threads(self) -> int:
        """Threads of this process that read and augment images."""
        return default_workers(self.world.on_machine) if self.workers is None else self.workers

    def _encoding(self) -> dict[str, Any]:
        return {
            "crops": self.crops,
            "precision": self.training.precision,
            "workers": self.threads,
            "world": self.world,
            "progress": self.progress,
        }

    def _encoded(self, tower: Tower, data: ImageData) -> FeatureData:
        training = self.training
        semi = self.method.semi and training.unlabelled_batch > 0
        if not (semi or tower.centred):
            # nothing reads their views
            none = np.empty(0, dtype=np.int64)
            data = replace(data, unlabelled=none, unlabelled_truth=none)
        return encoded_features(
            tower,
            data,
            build_pipeline(training.pipeline),
            templates=self.encoder.templates,
            weak_copies=training.copies,
            strong_copies=training.copies if semi else 0,
            seed=training.seed,
            **self._encoding(),
        )

    def _on_features(self, data: FeatureData, tower: nn.Module) -> Setup:
        training = self.training
        if data.centre is not None and isinstance(tower, Tower):
            tower.centre.copy_(data.centre)
        prototypes = data.prototypes.to(self.device)
        method = settle_eta(data.labelled, data.labels, prototypes, self.method, training)
        student = self.student(tower, method, data.prototypes, data.labelled_counts)
        used = (
            "labelled", "labels", "weak", "strong", "prototypes", "unlabelled_is_labelled", "labelled_counts",
        )  # fmt: skip
        features = {name: digest(torch.as_tensor(getattr(data, name))) for name in used}
        return Setup(
            student,
            FeatureViews.of(data, training, self.device),
            data.labelled_counts.numpy(),
            lambda: TestSet.of(data),
            self._identity(tower, data, method, {"features": features}),
        )

    @contextmanager
    def _on_images(self, data: ImageData) -> Iterator[Setup]:
        training, tower = self.training, self.tower()
        reader = self._reader(tower, ReadReport())
        prototypes, method = self._beginning(tower, data, reader)
        student = self.student(tower, method, prototypes, torch.from_numpy(data.labelled_counts))
        loader = ViewLoader(
            data.train,
            build_pipeline(training.pipeline),
            labelled=data.labelled,
            unlabelled=data.unlabelled,
            size=tower.size,
            seed=training.seed,
            workers=self.threads,
            device=self.device,
            randaugment_on_device=training.augment_on_device,
            on_unreadable=lambda _: None,
        )
        images = {
            # numbers first: a difference is told by the first field that differs
            "images": {name: len(getattr(data, name)) for name in ("labelled", "unlabelled", "test")},
            "names and labels of images": data.identity,
        }
        with loader:
            yield Setup(
                student,
                ImageViews(data, loader, training, self.device),
                data.labelled_counts,
                lambda: self.test_set(student, data.test, data.test_labels, ReadReport()),
                self._identity(tower, data, method, images),
            )

    def _identity(
        self, tower: nn.Module, data: AnyData, method: AnyMethod, own: dict[str, Any]
    ) -> dict[str, Any]:
        identity = {
            "method": asdict(self.method),
            "encoder": tower.fingerprint if isinstance(tower, Tower) else None,
            **own,
            # for what has no training images: evaluation, prediction, export
            "class_names": list(data.class_names),
            "labelled_counts": np.asarray(data.labelled_counts).tolist(),
        }
        if isinstance(method, Method):
            # where it was chosen before training, the choice
            identity["eta"] = method.eta
        return identity

    def _beginning(self, tower: Tower, data: ImageData, reader: Reader) -> tuple[Tensor, AnyMethod]:
        """First prototypes and, where eta is to be chosen, the method with the choice; the centre is measured.

        Prototypes are those of the text tower; without one the mean of at most 100 labelled images of each class.
        Raises ValueError where a tower has no text and a class no labelled image.
        """
        training, method = self.training, self.method
        encode_images = partial(encode, tower, precision=training.precision)
        random = np.random.default_rng((training.seed, 4))
        if tower.centred:
            every = np.union1d(data.labelled, data.unlabelled)
            chosen = random.permutation(every)[:CENTRE_IMAGES]
            features, readable = reader.features(encode_images, data.train, np.sort(chosen))
            tower.centre.copy_(features[readable].mean((0, 1)))
        if tower.has_text:
            prototypes = tower.text_prototypes(data.class_names, self.encoder.templates)
        else:
            prototypes = _class_means(encode_images, data, reader, random)
        if getattr(method, "eta_folds", 0):
            features, readable = reader.features(encode_images, data.train, data.labelled)
            rows = F.normalize(features[readable, 0], dim=-1)[None]
            labels = torch.from_numpy(data.labels[readable])
            place = prototypes.to(self.device)
            method = settle_eta(rows, labels, place, method, Training(seed=training.seed))
        return prototypes, method


def _class_means(
    encode_images: Callable[[Tensor], Tensor], data: ImageData, reader: Reader, random: np.random.Generator
) -> Tensor:
    check_every_class(data.labelled_counts, data.class_names)
    order = random.permutation(len(data.labels))
    most = np.full(len(data.class_names), MEAN_IMAGES)
    chosen = order[first_per_class(data.labels[order], most)]
    features, readable = reader.features(encode_images, data.train, data.labelled[chosen])
    rows, labels = F.normalize(features[readable, 0], dim=-1), torch.from_numpy(data.labels[chosen][readable])
    return class_means(rows[None], labels, data.class_names)
