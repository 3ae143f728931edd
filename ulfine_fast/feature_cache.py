"""Features of all views of an image set: each is encoded once, by the tower and pipeline of image training, and kept.

An entry has the features of one kind and copy of views of one part of an image set. It is a folder named by the hash
of all that determines them, with a file for each block of 256 images. A block is written beside its place and renamed
onto it, so it is there whole or not at all: what was encoded before a kill is found by the next run, several processes
write blocks of one entry, and a block that is damaged is encoded again. Batches end where a block ends, so that
features do not depend, by their rounding, on where a run was interrupted or on how many processes there were.

Rows are kept as the tower gives them, in float16, half the size of float32. Measured on the 2,000 packaged test images
with lite0 at 160 pixels, whose rows are then centred: their cosine with those of float32 is at least 1 - 3e-7, logits of
scale 30 differ by at most 0.0011 (bfloat16: 0.0085), and no label of the text prototypes does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ulfine_fast.augment import (
    Kind,
    Pipeline,
    five_crops,
    sufficient_side,
    sufficient_test_side,
    test_views,
    view,
)
from ulfine_fast.cache import CACHE_VARIABLE, CacheError, default_cache_dir
from ulfine_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ulfine_fast.distributed import World, check_equal
from ulfine_fast.engine import DTYPES, encode
from ulfine_fast.features import FeatureData, class_means, unit_
from ulfine_fast.image_data import shortened
from ulfine_fast.images import ChosenImages
from ulfine_fast.loader import ahead, default_workers, draws, view_batches
from ulfine_fast.options import one_of

if TYPE_CHECKING:
    from ulfine_fast.image_data import ImageData
    from ulfine_fast.images import ImageSource, ReadReport, UnreadableImage
    from ulfine_fast.towers import Tower

LOGGER = logging.getLogger(__name__)

Crops = Literal["single", "five"]
VIEWS = {"single": 1, "five": 5}

BLOCK = 256
# Raised with every change of a draw, of a pixel or of what is in a block.
VERSION = 1

_LINE_SECONDS = 30.0
# A block is written within seconds: an older temporary file is that of a process that was killed.
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Encoding:
    """How views are encoded and where they are kept.

    tower: as it was loaded, neither tuned nor centred; it stays so, on its device.
    crops: plain views of an image, "single" or "five" (LIFT's test-time ensembling).
    precision: of the tower's products, as `engine.encode`.
    workers: threads that read and augment images, None: one for each processor, at most 16.
    batch_size: views that are encoded together, >= 1. None: 16 on a processor, where fewer stay closer to its cache,
        else 64. Like device and workers it selects no entry.
    cache_dir: None: `cache.default_cache_dir`; one for all processes.
    world: the processes that share the work, in a `distributed.process_group`; each gets all features.
    progress: show a bar on a terminal, elsewhere log a line every 30 seconds.
    refresh: encode everything again.

    Raises ValueError for an argument outside its range.
    """

    tower: Tower
    pipeline: Pipeline
    crops: Crops = "single"
    precision: str = "fp32"
    workers: int | None = None
    batch_size: int | None = None
    cache_dir: Path | str | None = None
    world: World = field(default_factory=World)
    progress: bool = True
    refresh: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"encoded_features: batch_size must be >= 1, got {self.batch_size}")
        for name, known in (("crops", VIEWS), ("precision", DTYPES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"encoded_features: {name} must be {one_of(known, value)}")
        tuning = self.tower.tuning
        if tuning is not None or self.tower.centre.any():
            raise ValueError(
                "encoded_features: tower must be as it was loaded, got one that is "
                + ("centred" if tuning is None else f"tuned by {tuning}")
            )

    def entry(self, part: _Part, views: _Views, rows: Tensor, report: ReadReport) -> _Entry:
        """The entry of some views of a part, which get into `rows`."""
        root = Path(default_cache_dir() if self.cache_dir is None else self.cache_dir)
        encoder = {"version": VERSION, "encoder": self.tower.fingerprint, "precision": self.precision}
        return _Entry(root, encoder, part, views, rows, report)

    def fill(self, entries: Sequence[_Entry]) -> None:
        """Read all entries, encoding what is missing."""
        device = self.tower.centre.device
        _fill(
            entries,
            partial(encode, self.tower, precision=self.precision),
            workers=default_workers(self.world.on_machine) if self.workers is None else self.workers,
            batch_size=self.batch_size or (16 if device.type == "cpu" else 64),
            device=device,
            world=self.world,
            progress=self.progress and self.world.leads,
            refresh=self.refresh,
        )


@torch.no_grad()
def encoded_features(
    tower: Tower,
    data: ImageData,
    pipeline: Pipeline,
    *,
    templates: Sequence[str] | None = None,
    weak_copies: int = 2,
    strong_copies: int = 2,
    seed: int = 0,
    **options: Any,
) -> FeatureData:
    """Features of `data` for a head on a frozen tower, read from the cache or computed into it.

    Copy c of an image's view is the one that a `loader.ViewLoader` of the same seed draws for its row at step c, slot
    row; training on cached features draws no other. Where crops grow with training, copy c shows the stage 1/2, 1/4,
    3/4, 1/8, ... of it, so that the copies together show what the whole training would, however many there are.

    Args:
        data: "labelled" views are taken of the labelled images, "weak" and "strong" ones of the unlabelled images, plain
            ones of the test images and of those held out.
        templates: of the text prototypes, see `Tower.text_prototypes`. A tower without text gets class means.
        weak_copies: >= 1, independent views of each labelled and of each unlabelled image; strong_copies: >= 0. More
            copies later begin with the same ones.
        seed: >= 0, of the views.
        options: those of `Encoding`.

    Returns rows x -> unit(x - m) in the fields of `FeatureData`: `test` and `validation` have V views of an image,
    `centre` is m, the mean of the labelled and weak views of all training images, each image once, for a tower that is
    `centred` (which `Tower.centre` takes to encode further images); for others m is zero and `centre` None. An image
    that cannot be read in all its views is in no field, nor in `images`, and `data.report` names it, also where it was
    found by an earlier run; how images were converted is told when they are encoded.

    Raises ValueError for an argument outside its range, for a part without an image that can be read and for features
    that are not finite in float16, CacheError for a folder that cannot be used and MachineError for images that the
    machine could not read.
    """
    encoding = Encoding(tower, pipeline, **options)
    for name, value, least in (
        ("weak_copies", weak_copies, 1),
        ("strong_copies", strong_copies, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"encoded_features: {name} must be >= {least}, got {value}")
    parts = {
        "labelled": _Part(data.train, data.labelled),
        "unlabelled": _Part(data.train, data.unlabelled),
        "test": _Part(data.test, np.arange(len(data.test))),
    }
    wanted: dict[str, tuple[str, Kind | None, int]] = {
        "labelled": ("labelled", "labelled", weak_copies),
        "weak": ("unlabelled", "weak", weak_copies),
        "strong": ("unlabelled", "strong", strong_copies),
        "test": ("test", None, 1),
    }
    if data.validation is not None:
        parts["validation"] = _Part(data.validation, np.arange(len(data.validation)))
        wanted["validation"] = ("validation", None, 1)
    features = {}
    for name, (part, kind, copies) in wanted.items():
        several = VIEWS[encoding.crops] if kind is None else 1
        features[name] = torch.zeros(copies, len(parts[part].rows), several, tower.dim)

    def entry(name: str, copy: int) -> _Entry:
        part, kind, _ = wanted[name]
        if kind is None:
            views = _plain_views(tower, pipeline, encoding.crops)
        else:
            views = _random_views(tower, pipeline, kind, seed, copy, parts[part].rows)
        return encoding.entry(parts[part], views, features[name][copy], data.report)

    encoding.fill([entry(name, copy) for name, (*_, copies) in wanted.items() for copy in range(copies)])
    return _without_unreadable(tower, data, templates, parts, features)


@torch.no_grad()
def encoded_test(
    tower: Tower, images: ImageSource, pipeline: Pipeline, *, report: ReadReport, **options: Any
) -> tuple[Tensor, np.ndarray]:
    """The test images of `encoded_features` alone, [n, V, D] of those that can be read, and which can be, [N] bool.

    Rows are as the tower gives them: neither centred nor of unit length. report: takes what cannot be read. options,
    errors: as `encoded_features`.
    """
    encoding, part = Encoding(tower, pipeline, **options), _Part(images, np.arange(len(images)))
    rows = torch.zeros(len(images), VIEWS[encoding.crops], tower.dim)
    encoding.fill([encoding.entry(part, _plain_views(tower, pipeline, encoding.crops), rows, report)])
    return rows[torch.from_numpy(part.readable)], part.readable


class _Part:
    """Images of a set: `rows` of a source, what stands for them in a key, and which could be read so far."""

    def __init__(self, source: ImageSource, rows: np.ndarray) -> None:
        self.rows = rows
        self.images = ChosenImages(source, rows)
        self.readable = np.ones(len(rows), dtype=bool)
        names = [self.images.name(place) for place in range(len(rows))]
        # a moved folder keeps its entries. By character: absolute and relative paths may stand side by side
        shared = len(os.path.commonprefix(names))  # noqa: RUF071
        digest = hashlib.blake2b(digest_size=16)
        for place, (row, name) in enumerate(zip(rows.tolist(), names, strict=True)):
            text = f"{row} {name[shared:]}\0{self.images.stamp(place)}\0"
            digest.update(text.encode("utf-8", "surrogateescape"))
        self.digest = digest.hexdigest()


class _Views(NamedTuple):
    """What is seen of each image of a part."""

    # from a picture and its place in the part to uint8 [V, 3, S, S]
    draw: Callable[[Image.Image, int], Tensor]
    # short side of a picture that suffices
    at_least: int
    # all that the views depend on besides the picture, as JSON
    described: dict[str, Any]


def _random_views(
    tower: Tower, pipeline: Pipeline, kind: Kind, seed: int, copy: int, rows: np.ndarray
) -> _Views:
    # the digits of copy + 1 in base 2, mirrored at the point
    digits = f"{copy + 1:b}"
    progress = int(digits[::-1], 2) / 2 ** len(digits)

    def draw(image: Image.Image, place: int) -> Tensor:
        random = draws(seed, kind, copy, int(rows[place]))
        return view(image, pipeline, kind, random, size=tower.size, progress=progress)[None]

    described = {
        **_described(pipeline, pipeline.labelled if kind == "labelled" else pipeline.weak, tower),
        "kind": kind,
        "copy": copy,
        "seed": seed,
        "flip": pipeline.flip,
        "growth": pipeline.growth,
    }
    if kind == "strong":
        described["cutout"] = pipeline.cutout_side(tower.size)
    return _Views(draw, sufficient_side(pipeline, tower.size, progress), described)


def _plain_views(tower: Tower, pipeline: Pipeline, crops: Crops) -> _Views:
    if crops == "five":
        of_picture = partial(five_crops, size=tower.size, patch=tower.patch, resampling=pipeline.resampling)
    else:
        of_picture = partial(test_views, pipeline=pipeline, size=tower.size)
    described = {**_described(pipeline, pipeline.test, tower), "kind": "plain", "crops": crops}
    return _Views(lambda image, _: of_picture(image), sufficient_test_side(tower.size), described)


def _described(pipeline: Pipeline, geometry: Callable, tower: Tower) -> dict[str, Any]:
    bound = geometry.keywords if isinstance(geometry, partial) else {}
    function = geometry.func if isinstance(geometry, partial) else geometry
    return {
        "pipeline": pipeline.name,
        "geometry": [
            f"{function.__module__}.{function.__qualname__}",
            sorted([name, repr(value)] for name, value in bound.items()),
        ],
        "resampling": pipeline.resampling.name,
        "size": tower.size,
    }


class _Entry:
    """The features of one kind and copy of the views of a part; they get into `rows` float32 [n, V, D], block by block.

    key: the hash of `identity`, all that determines them, and the name of their folder in `root`.
    """

    def __init__(
        self,
        root: Path,
        encoder: dict[str, Any],
        part: _Part,
        views: _Views,
        rows: Tensor,
        report: ReadReport,
    ) -> None:
        self.part, self.views, self.rows, self.report = part, views, rows, report
        self.identity = {**encoder, "images": part.digest, **views.described}
        self.key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = root / self.key
        self.blocks = [range(start, min(start + BLOCK, len(rows))) for start in range(0, len(rows), BLOCK)]

    def read(self, block: range) -> bool:
        """Whether the file of a block is there and whole, and then its rows are taken from it."""
        try:
            tensors, record = load_checkpoint(self._path(block), self._label(block))
        except FileNotFoundError:
            return False
        except CheckpointError as error:
            LOGGER.warning("%s; these images are encoded again", error)
            return False
        except OSError as error:
            raise CacheError(f"{self._path(block)}: expected to read it, got: {error}") from error
        self._take(block, tensors["features"], record["unreadable"])
        return True

    def write(self, block: range, features: Tensor, errors: Sequence[UnreadableImage | None]) -> None:
        """Keep the features [n V, D] of a block, and what was met when its images were read."""
        unreadable = [[place, error.reason] for place, error in enumerate(errors) if error is not None]
        rows = features.view(len(block), *self.rows.shape[1:]).to("cpu", torch.float16)
        rows[[place for place, _ in unreadable]] = 0
        if not rows.isfinite().all():
            raise ValueError(
                f"encoded_features: features must be finite in float16, got {features.abs().max():.3g}"
            )
        try:
            save_checkpoint(
                self._path(block), {"features": rows}, {**self._label(block), "unreadable": unreadable}
            )
        except OSError as error:
            raise CacheError(f"{error}; make room, or set {CACHE_VARIABLE} to another folder") from error
        self._take(block, rows, unreadable)

    def sweep(self) -> None:
        """Remove what processes left behind that were killed while they wrote a block."""
        for path in self.folder.glob(".*"):
            # another process may do the same
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()

    def _path(self, block: range) -> Path:
        return self.folder / f"{block.start // BLOCK:06d}.safetensors"

    def _label(self, block: range) -> dict[str, Any]:
        return {"features": self.identity, "rows": [block.start, block.stop]}

    def _take(self, block: range, rows: Tensor, unreadable: Sequence[tuple[int, str]]) -> None:
        self.rows[block.start : block.stop] = rows
        for place, reason in unreadable:
            self.part.readable[block.start + place] = False
            self.report.add_unreadable(self.part.images.name(block.start + place), reason)


def _fill(
    entries: Sequence[_Entry],
    encode_images: Callable[[Tensor], Tensor],
    *,
    workers: int,
    batch_size: int,
    device: torch.device,
    world: World,
    progress: bool,
    refresh: bool,
) -> None:
    """Read all entries, encoding what is missing: every process the blocks whose turn is its own."""
    keys = hashlib.sha256("".join(entry.key for entry in entries).encode()).hexdigest()
    check_equal(keys, "images, encoder and views", world, device)
    turn = count()
    own = [{block for block in entry.blocks if next(turn) % world.size == world.rank} for entry in entries]
    missing = [
        [block for block in entry.blocks if block in mine and (refresh or not entry.read(block))]
        for entry, mine in zip(entries, own, strict=True)
    ]
    views = [
        sum(map(len, blocks)) * entry.rows.shape[1] for entry, blocks in zip(entries, missing, strict=True)
    ]
    if any(views):
        _check_room(entries[0].folder.parent, 2 * sum(views) * entries[0].rows.shape[2] * world.size)
    with _reporting(sum(views), progress) as report:
        for entry, mine, blocks in zip(entries, own, missing, strict=True):
            if blocks:
                entry.sweep()
                _encode(entry, blocks, encode_images, workers, batch_size, device, report)
            # wait for the blocks of the others
            check_equal(entry.key, "images, encoder and views", world, device)
            for block in entry.blocks:
                if block not in mine and not entry.read(block):
                    raise CacheError(
                        f"{entry.folder}: expected what the other processes encoded, got no block {block.start // BLOCK};"
                        f" set {CACHE_VARIABLE} to a folder that all of them have"
                    )


def _encode(
    entry: _Entry,
    blocks: Sequence[range],
    encode_images: Callable[[Tensor], Tensor],
    workers: int,
    batch_size: int,
    device: torch.device,
    report: Callable[[int], None],
) -> None:
    several, size = entry.rows.shape[1], entry.views.described["size"]
    step = max(batch_size // several, 1)
    views = view_batches(
        entry.part.images,
        entry.views.draw,
        [
            range(start, min(start + step, block.stop))
            for block in blocks
            for start in range(block.start, block.stop, step)
        ],
        shape=(several, 3, size, size),
        workers=workers,
        device=device,
        at_least=entry.views.at_least,
    )

    def written() -> Iterator[Future]:
        for block in blocks:
            features, errors = [], []
            while len(errors) < len(block):
                images, unreadable = next(views)
                features.append(encode_images(images.flatten(0, 1)))
                errors += unreadable
                report(len(features[-1]))
            yield writer.submit(entry.write, block, torch.cat(features), errors)

    # a disk takes its time to say that a block is on it; an error here waits for that
    with closing(views), ThreadPoolExecutor(1) as writer:
        for block in ahead(written(), 1):
            block.result()


def _without_unreadable(
    tower: Tower,
    data: ImageData,
    templates: Sequence[str] | None,
    parts: dict[str, _Part],
    features: dict[str, Tensor],
) -> FeatureData:
    """The record of what could be read; `features` [K, n, V, D] are changed in place, to hold them once."""
    keep = {name: part.readable for name, part in parts.items()}
    for name, readable in keep.items():
        if len(readable) and not readable.any():
            raise ValueError(
                f"{name} images must be readable, at least one of them, got {len(readable)} unreadable:"
                f" {shortened([parts[name].images.name(place) for place in range(len(readable))])}"
            )
    images = replace(
        data,
        labelled=data.labelled[keep["labelled"]],
        labels=data.labels[keep["labelled"]],
        unlabelled=data.unlabelled[keep["unlabelled"]],
        unlabelled_truth=data.unlabelled_truth[keep["unlabelled"]],
        test=ChosenImages(data.test, np.flatnonzero(keep["test"])),
        test_labels=data.test_labels[keep["test"]],
    )
    if data.validation is not None:
        images = replace(
            images,
            validation=ChosenImages(data.validation, np.flatnonzero(keep["validation"])),
            validation_labels=data.validation_labels[keep["validation"]],
        )
    keep["weak"] = keep["strong"] = keep["unlabelled"]
    for name, rows in features.items():
        if not keep[name].all():
            features[name] = rows[:, torch.from_numpy(keep[name])]
    centre = None
    if tower.centred:
        alone = torch.from_numpy(~np.isin(images.labelled, images.unlabelled))
        each = (features["labelled"][:, alone], features["weak"])
        total = sum(rows.sum((0, 1, 2), dtype=torch.float64) for rows in each)
        centre = (total / sum(rows.shape[0] * rows.shape[1] for rows in each)).float()
    for rows in features.values():
        if centre is not None:
            rows -= centre
        unit_(rows)
    labelled, labels = features["labelled"].squeeze(2), torch.from_numpy(images.labels)
    if tower.has_text:
        prototypes = tower.text_prototypes(data.class_names, templates).cpu()
    else:
        prototypes = class_means(labelled, labels, data.class_names)
    counts, validation = images.unlabelled_counts, features.get("validation")
    return FeatureData(
        labelled=labelled,
        labels=labels,
        weak=features["weak"].squeeze(2),
        strong=features["strong"].squeeze(2),
        unlabelled_truth=torch.from_numpy(images.unlabelled_truth),
        test=features["test"][0],
        test_labels=torch.from_numpy(images.test_labels),
        validation=None if validation is None else validation[0],
        validation_labels=None if validation is None else torch.from_numpy(images.validation_labels),
        prototypes=prototypes,
        class_names=images.class_names,
        labelled_counts=torch.from_numpy(images.labelled_counts),
        unlabelled_counts=None if counts is None else torch.from_numpy(counts),
        unlabelled_is_labelled=torch.from_numpy(images.unlabelled_is_labelled),
        centre=centre,
        images=images,
    )


def _check_room(root: Path, octets: int) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise CacheError(
            f"{root}: expected a writable folder, got: {error}; set {CACHE_VARIABLE} to another folder"
        ) from error
    if octets > free:
        raise CacheError(
            f"{root}: expected room for {octets / 1e6:.1f} MB, got {free / 1e6:.1f} MB free; free some or set"
            f" {CACHE_VARIABLE} to another folder"
        )


@contextmanager
def _reporting(total: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of views that were encoded; without `progress` it does nothing."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    began = said = time.monotonic()
    done = 0
    bar = tqdm(
        total=total,
        desc="encoding",
        unit=" views",
        disable=not (progress and total and terminal),
        leave=False,
    )

    def report(views: int) -> None:
        nonlocal done, said
        done += views
        bar.update(views)
        now = time.monotonic()
        if progress and not terminal and (done == views or now - said >= _LINE_SECONDS):
            said = now
            left = tqdm.format_interval((now - began) / done * (total - done))
            LOGGER.info("encoding: %d of %d views, about %s to go", done, total, left)

    with bar:
        yield report
