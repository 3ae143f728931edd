"""One fine-tuning run from its configuration to its metrics: images, encoder, first prototypes, training, reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ulfine_fast import evaluation, report
from ulfine_fast.augment import Pipeline, build_pipeline, five_crops, sufficient_test_side, test_views
from ulfine_fast.batches import ImageViews
from ulfine_fast.checkpoint import CheckpointError, digest_of, replacing
from ulfine_fast.config import PRESETS, Encoder, FineTuning, Images
from ulfine_fast.datasets import dataset_data
from ulfine_fast.distributed import World, gather_octets, gather_rows, whole
from ulfine_fast.engine import Student, encode, load_tuned_tensors, tuned_tensors
from ulfine_fast.evaluation import Predictions
from ulfine_fast.experiment import UNITS, curve, surroundings
from ulfine_fast.history import TrainResult
from ulfine_fast.image_data import UNKNOWN, ImageData, shortened
from ulfine_fast.image_folders import folder_data
from ulfine_fast.image_tables import list_data, table_data
from ulfine_fast.imagenet127 import imagenet127_data
from ulfine_fast.images import ChosenImages, ImageSource, ReadReport
from ulfine_fast.learners import LEARNERS, Config, DualConfig, build_learner
from ulfine_fast.loader import ViewLoader, default_workers, evaluation_batches
from ulfine_fast.loop import train
from ulfine_fast.run_folder import CONFIG, PLACES, load_run
from ulfine_fast.splits import ClassRow, first_per_class, groups_by_rank
from ulfine_fast.towers import Tower, load_tower
from ulfine_fast.tuning import tune
from ulfine_fast.validation import settle_eta

# Training images that the centre of a tower is measured on, and labelled ones of a class whose mean starts its
# prototype where there is no text (LIFT+).
CENTRE_IMAGES, MEAN_IMAGES = 1000, 100
CROPS = ("single", "five")


@dataclass(frozen=True)
class Outcome:
    """A fine-tuned student and what it does on the test set."""

    student: Student
    training: TrainResult
    metrics: dict[str, dict[str, Any]]  # by branch, the prediction first, see `classification_metrics`
    predictions: dict[str, Predictions]
    readable: np.ndarray  # [n_t] bool, the test images that these are of
    digest: str  # of everything that was trained


def load_images(choice: Images) -> ImageData:
    """The images of `choice`; raises what their builder raises."""
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


def class_rows(data: ImageData) -> list[ClassRow]:
    """One row for each class, most labelled images first; unlabelled counts only where every class is known."""
    labelled, truth = data.labelled_counts, data.unlabelled_truth
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


def _tower(encoder: Encoder, place: torch.device, seed: int) -> Tower:
    return load_tower(
        encoder.model,
        encoder.pretrained,
        space=encoder.space,
        size=encoder.size,
        compile=encoder.compile,
        gradient_checkpointing=encoder.gradient_checkpointing,
        device=place,
        seed=seed,
    )


def build_student(
    tower: Tower,
    data: ImageData,
    encoder: Encoder,
    method: DualConfig | Config,
    schedule: FineTuning,
    reader: Reader,
) -> Student:
    """A tower with its centre measured, tuned as `schedule` says, and a learner on its first prototypes.

    Prototypes are those of the text tower; without one the mean of at most 100 labelled images of each class.

    Raises ValueError where a tower has no text and a class no labelled image.
    """
    encode_images = partial(encode, tower, precision=schedule.precision)
    random = np.random.default_rng((schedule.seed, 4))
    if tower.centred:
        training = np.union1d(data.labelled, data.unlabelled)
        chosen = random.permutation(training)[:CENTRE_IMAGES]
        features, readable = reader.features(encode_images, data.train, np.sort(chosen))
        tower.centre.copy_(features[readable].mean((0, 1)))
    if tower.has_text:
        prototypes = tower.text_prototypes(data.class_names, encoder.templates)
    else:
        prototypes = _class_means(encode_images, data, reader, random)
    if isinstance(method, DualConfig) and method.eta_folds:
        method = _settled(encode_images, data, method, schedule, reader, prototypes)
    return _tuned(tower, prototypes, torch.from_numpy(data.labelled_counts), method, schedule)


def _tuned(
    tower: Tower, prototypes: Tensor, counts: Tensor, method: DualConfig | Config, schedule: FineTuning
) -> Student:
    """`tower` with the modules of its tuning in place, and the learner of `method` on these prototypes.

    counts: [C] int64 labelled images of each class.
    """
    seed = schedule.seed
    tune(
        tower,
        schedule.tuning,
        classes=len(prototypes),
        width=schedule.width,
        blocks=schedule.blocks,
        seed=seed,
    )
    learner = build_learner(method, prototypes.cpu(), counts, seed=seed).to(tower.centre.device)
    return Student(tower, learner, schedule.precision)


def _class_means(
    encode_images: Callable[[Tensor], Tensor], data: ImageData, reader: Reader, random: np.random.Generator
) -> Tensor:
    empty = np.flatnonzero(data.labelled_counts == 0)
    if len(empty):
        raise ValueError(
            "first prototypes must be class means where the encoder has no text tower: expected labelled images of"
            f" every class, got none of {data.class_names[empty[0]]!r}"
        )
    order = random.permutation(len(data.labels))
    most = np.full(len(data.class_names), MEAN_IMAGES)
    chosen = order[first_per_class(data.labels[order], most)]
    features, readable = reader.features(encode_images, data.train, data.labelled[chosen])
    rows, labels = F.normalize(features[readable, 0], dim=-1), torch.from_numpy(data.labels[chosen][readable])
    sums = torch.zeros(len(data.class_names), rows.shape[1]).index_add_(0, labels, rows)
    if not bool(sums.any(-1).all()):
        unread = int((~sums.any(-1)).nonzero()[0])
        raise ValueError(f"first prototypes: no labelled image of {data.class_names[unread]!r} can be read")
    return F.normalize(sums, dim=-1)


def _settled(
    encode_images: Callable[[Tensor], Tensor],
    data: ImageData,
    method: DualConfig,
    schedule: FineTuning,
    reader: Reader,
    prototypes: Tensor,
) -> DualConfig:
    """`method` with its eta chosen on the features of the labelled images before training."""
    features, readable = reader.features(encode_images, data.train, data.labelled)
    rows = F.normalize(features[readable, 0], dim=-1)[None]
    labels = torch.from_numpy(data.labels[readable])
    place = prototypes.to(reader.device)
    return settle_eta(rows, labels, place, method, FineTuning(seed=schedule.seed))


def run(
    data: ImageData,
    encoder: Encoder,
    method: DualConfig | Config,
    schedule: FineTuning,
    *,
    device: str = "cpu",
    world: World | None = None,
    crops: str = "single",
    workers: int | None = None,
    run_dir: Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    progress: bool = True,
    claim: AbstractContextManager[None] | None = None,
) -> Outcome:
    """Fine-tune `method` on `data` and evaluate it on the test set.

    Args:
        device: of the encoder. world: the processes of this run, None is this one alone.
        crops: views of a test image, "single" or "five" (LIFT's test-time ensembling).
        workers: threads that read and augment images, None: one for each processor, at most 16.
        run_dir, resume, checkpoint_every, progress: as `loop.train`.
        claim: entered before the first step, when everything is loaded, and left at the end of training.

    Raises ValueError for steps of a method that takes none.
    """
    if schedule.steps and not getattr(method, "trained", True):
        raise ValueError(f"run: steps must be 0 for a method that is not trained, got {schedule.steps}")
    world = world or World()
    place = torch.device(device, world.local_rank) if device == "cuda" else torch.device(device)
    workers = default_workers(world.on_machine) if workers is None else workers
    pipeline = build_pipeline(schedule.pipeline)
    tower = _tower(encoder, place, schedule.seed)
    plain = partial(test_views, pipeline=pipeline, size=tower.size)
    reader = Reader(plain, tower.size, workers, place, progress=progress and world.leads)
    student = build_student(tower, data, encoder, method, schedule, reader)
    loader = ViewLoader(
        data.train,
        pipeline,
        labelled=data.labelled,
        unlabelled=data.unlabelled,
        size=tower.size,
        seed=schedule.seed,
        workers=workers,
        device=place,
        randaugment_on_device=schedule.augment_on_device,
        on_unreadable=lambda _: None,
    )
    identity = {
        "method": asdict(method),
        "encoder": tower.fingerprint,
        # numbers first: a difference is told by the first field that differs
        "images": {name: len(getattr(data, name)) for name in ("labelled", "unlabelled", "test")},
        "names and labels of images": data.identity,
        # for `evaluate_run` and `export_run`, which have no training images
        "class_names": list(data.class_names),
        "labelled_counts": data.labelled_counts.tolist(),
    }
    if isinstance(method, DualConfig):
        # where it was chosen before training, the choice
        identity["eta"] = student.learner.config.eta
    with loader, claim or nullcontext():
        training = train(
            student,
            ImageViews(data, loader, schedule, place),
            data.labelled_counts,
            schedule,
            world=world,
            identity=identity,
            run_dir=run_dir,
            resume=resume,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
    metrics, predictions, readable = evaluate(
        student, data.test, data.test_labels, data.labelled_counts, pipeline, reader, crops=crops, world=world
    )
    for record in gather_octets(json.dumps(data.report.record()).encode(), world, place):
        data.report.add(json.loads(record))
    trained = {name: whole(tensor, world).cpu() for name, tensor in tuned_tensors(student).items()}
    return Outcome(student, training, metrics, predictions, readable, digest_of(trained))


def chosen_eta(student: Student) -> float | None:
    """Weight of the linear branch in the prediction, as it was set or chosen; None for a method without branches."""
    config = student.learner.config
    return config.eta if isinstance(config, DualConfig) else None


def evaluate(
    student: Student,
    images: ImageSource,
    labels: np.ndarray,
    labelled_counts: np.ndarray,
    pipeline: Pipeline,
    reader: Reader,
    *,
    crops: str = "single",
    world: World,
) -> tuple[dict[str, dict[str, Any]], dict[str, Predictions], np.ndarray]:
    """Metrics and predictions of every branch on the test images that can be read, and which these are, [n_t] bool.

    labels: [n_t] int64 of `images`. labelled_counts: [C], for the groups of the metrics.

    Each process encodes its share of the images; all return the same. ValueError for other crops than "single" and
    "five".
    """
    if crops not in CROPS:
        raise ValueError(f"evaluate: crops must be {' or '.join(CROPS)}, got {crops!r}")
    tower = student.tower
    if crops == "five":
        five = partial(five_crops, size=tower.size, patch=tower.patch, resampling=pipeline.resampling)
        reader = replace(reader, views=five)
    count = len(images)
    share = -(-count // world.size)
    # the last process reads some images again, so that all have as many
    rows = np.minimum(np.arange(world.rank * share, (world.rank + 1) * share), count - 1)
    features, readable = reader.features(student.encode, images, rows)
    columns = [features.to(reader.device)[None], torch.from_numpy(readable).to(reader.device)[None]]
    features, mask = (column[:count].cpu() for column in gather_rows(columns, world))
    predictions = evaluation.predict(student.learner, features[mask])
    truth = torch.from_numpy(labels)[mask]
    return evaluation.metrics(predictions, truth, labelled_counts), predictions, mask.numpy()


def write_run(run_dir: Path, configuration: Mapping[str, Any], data: ImageData, outcome: Outcome) -> None:
    """metrics.json, predictions.csv and the pictures of one run."""
    training, rows = outcome.training, class_rows(data)
    report.write_json(
        run_dir / "metrics.json",
        {
            **surroundings(),
            "units": UNITS,
            "configuration": configuration,
            "classes": [row._asdict() for row in sorted(rows)],
            "notes": data.notes,
            "reading": data.report.summary(),
            "steps": training.steps,
            "seconds": training.seconds,
            "eta": chosen_eta(outcome.student),
            "skipped": training.skipped,
            "digest": outcome.digest,
            "metrics": outcome.metrics,
            "history": training.history,
        },
    )
    (name, predictions) = next(iter(outcome.predictions.items()))
    shown = np.flatnonzero(outcome.readable)
    report.write_predictions(
        run_dir / "predictions.csv",
        data.test_labels[shown],
        {configuration["name"]: predictions},
        data.class_names,
        images=[data.test.name(row) for row in shown],
    )
    order = np.argsort(-data.labelled_counts, kind="stable")
    # all counts are known, or none is
    known = rows[0].unlabelled is not None
    last = training.history[-1] if training.history else {}
    truth = data.unlabelled_counts
    report.save_pictures(
        run_dir,
        report.names_in_pictures(rows),
        labelled=[row.labelled for row in rows],
        unlabelled=[row.unlabelled for row in rows] if known else None,
        truth=None if truth is None else truth[order],
        accuracy={branch: [m["per_class"][k] for k in order] for branch, m in outcome.metrics.items()},
        curves={name: curve(training.history, "fused")} if "pseudo_labels" in last else {},
        estimates={configuration["name"]: [last["distribution"][k] for k in order]}
        if last.get("distribution")
        else {},
    )


def _load_student(
    run_dir: Path, configuration: Mapping[str, Any], place: torch.device
) -> tuple[dict[str, Any], Student]:
    """Record of the checkpoint in `run_dir` and the student in it, without any image."""
    try:
        encoder = dict(configuration["encoder"])
        templates = encoder.pop("templates")
        encoder = Encoder(**encoder, templates=None if templates is None else tuple(templates))
        schedule = FineTuning(**configuration["schedule"])
        method = replace(LEARNERS[PRESETS[configuration["name"]].learner], **configuration["method"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run_dir / CONFIG}: {error}") from error
    tensors, record = load_run(run_dir, configuration)
    if isinstance(method, DualConfig) and method.eta_folds:
        method = replace(method, eta=record["eta"], eta_folds=0)
    tower = _tower(encoder, place, schedule.seed)
    # frozen weights are not in the checkpoint
    if record["encoder"] != tower.fingerprint:
        raise CheckpointError(
            f"{run_dir}: expected the encoder of the run, {record['encoder'][:12]}, got another one,"
            f" {tower.fingerprint[:12]}"
        )
    counts = torch.tensor(record["labelled_counts"])
    # first prototypes do not matter: those of the checkpoint take their place
    student = _tuned(tower, torch.eye(len(counts), tower.dim), counts, method, schedule)
    load_tuned_tensors(student, tensors, averaged=True)
    return record, student


def _load_test(
    run_dir: Path, configuration: Mapping[str, Any], class_names: Sequence[str]
) -> tuple[ImageSource, np.ndarray]:
    """The test images of a run, and their classes among those of the run."""
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
    if data.class_names == tuple(class_names):
        return data.test, data.test_labels
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
    return data.test, np.array([class_names.index(name) for name in data.class_names])[data.test_labels]


def evaluate_run(
    run_dir: Path, configuration: Mapping[str, Any], *, device: str = "cpu", crops: str | None = None
) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Steps and metrics by branch of the run in `run_dir`, from its checkpoint, and which images cannot be read.

    crops None: those of the run. Reads the test images alone, where they lie in folders of their own. Raises
    FileNotFoundError where there is no checkpoint or nothing at a path of `configuration`, see `run_folder.located`;
    CheckpointError for the checkpoint or the encoder of another run; ValueError for test images of other classes.
    """
    place = torch.device(device)
    record, student = _load_student(run_dir, configuration, place)
    images, labels = _load_test(run_dir, configuration, record["class_names"])
    pipeline = build_pipeline(configuration["schedule"]["pipeline"])
    views = partial(test_views, pipeline=pipeline, size=student.tower.size)
    reader = Reader(views, student.tower.size, default_workers(), place)
    metrics, _, _ = evaluate(
        student,
        images,
        labels,
        np.array(record["labelled_counts"]),
        pipeline,
        reader,
        crops=crops or configuration["crops"],
        world=World(),
    )
    return record["steps"], metrics, reader.report.summary()


def export_run(run_dir: Path, configuration: Mapping[str, Any], path: Path) -> None:
    """`export_head` of the run in `run_dir`; no image is read."""
    record, student = _load_student(run_dir, configuration, torch.device("cpu"))
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
    if student.tower.centred:
        tensors["centre"] = student.tower.centre.cpu()
    with replacing(path) as temporary:
        temporary.write_bytes(
            save(tensors, {"class_names": json.dumps(list(class_names), ensure_ascii=False)})
        )
