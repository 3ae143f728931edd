"""Benchmark image sets by name: the subset of Fashion-MNIST that ships with the package, and what torchvision has.

Fashion-MNIST: Xiao, Rasul and Vollgraf, 2017, MIT licence, Zalando SE; 28 x 28 grey, light item on black. The
others are downloaded from their makers, whose terms hold.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ulfine_fast.assets import asset
from ulfine_fast.cache import default_cache_dir
from ulfine_fast.image_data import UNKNOWN, ImageData, absent_classes
from ulfine_fast.images import (
    ChosenImages,
    ImageArray,
    ImageFiles,
    ImageSource,
    JoinedImages,
    ReadReport,
    check_pixels,
)
from ulfine_fast.options import one_of
from ulfine_fast.splits import ClassOrder, Protocol, Unlabelled, make_split

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION_MNIST_VARIABLE = "ULFINE_FASHION_MNIST"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

_IDX_NAMES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class ImageSet:
    """Images with their classes.

    images: uint8 [N, H, W] (grey) or [N, H, W, 3] (RGB). labels: int64 [N] in 0..C-1. class_names: C
    non-empty, distinct names. invert: the items are light on dark, and an encoder trained on photographs
    should see 255 - x. Raises ValueError when a field breaks this contract.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    invert: bool = False

    def __post_init__(self) -> None:
        for name in ("images", "labels"):
            if not isinstance(getattr(self, name), np.ndarray):
                raise ValueError(
                    f"ImageSet {self.name}: {name} must be a numpy array, got {type(getattr(self, name)).__name__}"
                )
        check_pixels(f"ImageSet {self.name}", self.images)
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"ImageSet {self.name}: labels must be int64 [{len(self.images)}],"
                f" got {self.labels.dtype} {self.labels.shape}"
            )
        if not self.class_names or not all(name.strip() for name in self.class_names):
            raise ValueError(f"ImageSet {self.name}: class names must not be empty, got {self.class_names}")
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"ImageSet {self.name}: class names must be distinct, got {self.class_names}")
        if self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(
                f"ImageSet {self.name}: labels must be in 0..{len(self.class_names) - 1},"
                f" got {self.labels.min()}..{self.labels.max()}"
            )


def load_dataset(name: str) -> tuple[ImageSet, ImageSet]:
    """The training and the test set called `name`, in memory; see `DATASETS` for the names.

    "fashion-mnist-subset": 4,000 training and 2,000 test images, balanced, from the package itself.
    "fashion-mnist": 60,000 and 10,000 images, from the first of: the folder of idx files that the environment
    variable ULFINE_FASHION_MNIST names; the Debian package dataset-fashion-mnist; torchvision's downloader.
    "cifar10", "cifar100", "svhn": torchvision's. Its downloads go into the folder "datasets" of the cache
    directory.

    Raises ValueError for an unknown name or a damaged idx file, FileNotFoundError when no source has the
    data, ImportError when a package of the extra [images] is missing.
    """
    if name not in DATASETS:
        raise ValueError(f"data set must be {one_of(DATASETS, name)}")
    return DATASETS[name]()


def dataset_data(
    name: str,
    *,
    labelled_largest: int,
    imbalance: float,
    unlabelled_largest: int | None = None,
    unlabelled_imbalance: float | None = None,
    unlabelled: Unlabelled = "consistent",
    protocol: Protocol = "acr",
    seed: int = 0,
    class_order: ClassOrder = "index",
    validation_per_class: int | None = None,
) -> ImageData:
    """A long-tailed semi-supervised split of the data set `name`, one of `IMAGE_DATASETS`.

    The arguments are those of `splits.make_split`. The field's settings (labelled_largest, unlabelled_largest,
    imbalance): cifar10 (1500, 3000, 100) and (500, 4000, 100), cifar100 (150, 300, 10) and (50, 400, 10), stl10
    (150 or 450, -, 10 or 20). food101 has no published one; the two sizes add up to 750 at most.

    "stl10" comes with 100,000 unlabelled images of unknown classes: they are the unlabelled part, whatever the
    protocol, and the arguments of that part must be left alone. Elsewhere unlabelled_largest is needed.

    Raises the errors of `load_dataset` and `make_split`, and ValueError for an argument that does not fit.
    """
    if name not in IMAGE_DATASETS:
        raise ValueError(f"data set must be {one_of(IMAGE_DATASETS, name)}")
    if name == "stl10":
        if (unlabelled_largest, unlabelled_imbalance, unlabelled) != (None, None, "consistent"):
            raise ValueError(
                "unlabelled_largest, unlabelled_imbalance and unlabelled must be left out for stl10,"
                f" got {unlabelled_largest}, {unlabelled_imbalance} and {unlabelled}"
            )
        unlabelled_largest = 0
    elif unlabelled_largest is None:
        raise ValueError(f"unlabelled_largest must be given for {name}, got None")
    data = IMAGE_DATASETS[name]()
    split = make_split(
        data.labels,
        protocol=protocol,
        labelled_largest=labelled_largest,
        unlabelled_largest=unlabelled_largest,
        imbalance=imbalance,
        unlabelled_imbalance=unlabelled_imbalance,
        unlabelled=unlabelled,
        seed=seed,
        class_order=class_order,
        validation_per_class=validation_per_class,
    )
    rows, truth = split.unlabelled, data.labels[split.unlabelled]
    if name == "stl10":
        rows = np.arange(len(data.labels), len(data.train))
        truth = np.full(len(rows), UNKNOWN)
    held_out = len(split.validation) > 0
    return ImageData(
        train=data.train,
        labelled=split.labelled,
        labels=data.labels[split.labelled],
        unlabelled=rows,
        unlabelled_truth=truth,
        test=data.test,
        test_labels=data.test_labels,
        class_names=data.class_names,
        validation=ChosenImages(data.train, split.validation) if held_out else None,
        validation_labels=data.labels[split.validation] if held_out else None,
        notes=tuple(absent_classes("labelled", data.labels[split.labelled], data.class_names)),
        report=data.report,
    )


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, gzipped when its name ends in .gz.

    Returns a uint8 array of the shape in the header. Raises ValueError when the header is not that of a uint8
    idx file or the length does not fit it. Source: the file format of the MNIST database, LeCun et al.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path}: expected an idx file of unsigned bytes (00 00 08), got {content[:4].hex(' ')}"
        )
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start].ljust(start - 4, b"\0"))
    if len(content) - start != int(np.prod(shape)):
        raise ValueError(f"{path}: expected {int(np.prod(shape))} bytes of data, got {len(content) - start}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()


def _fashion_mnist_subset() -> tuple[ImageSet, ImageSet]:
    with np.load(asset("fashion_mnist_subset.npz"), allow_pickle=False) as file:
        return tuple(
            ImageSet(
                name=f"fashion-mnist-subset/{part}",
                images=file[f"{part}_images"],
                labels=file[f"{part}_labels"].astype(np.int64),
                class_names=FASHION_MNIST_CLASSES,
                invert=True,
            )
            for part in ("train", "test")
        )


def _fashion_mnist() -> tuple[ImageSet, ImageSet]:
    # a folder named by the user is never replaced by another source
    named = os.environ.get(FASHION_MNIST_VARIABLE)
    if named or DEBIAN_FASHION_MNIST.is_dir():
        parts = _idx_folder(Path(named) if named else DEBIAN_FASHION_MNIST)
    else:
        parts = _torchvision_fashion_mnist()
    return tuple(
        ImageSet(f"fashion-mnist/{part}", images, labels.astype(np.int64), FASHION_MNIST_CLASSES, invert=True)
        for part, (images, labels) in parts.items()
    )


def _idx_folder(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    def read(stem: str) -> np.ndarray:
        for path in (folder / f"{stem}.gz", folder / stem):
            if path.is_file():
                return read_idx(path)
        raise FileNotFoundError(f"fashion-mnist: expected {stem}.gz or {stem} in {folder}, got neither")

    return {
        part: (read(f"{prefix}-images-idx3-ubyte"), read(f"{prefix}-labels-idx1-ubyte"))
        for part, prefix in _IDX_NAMES.items()
    }


def _torchvision_fashion_mnist() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    try:
        sets = {
            part: _torchvision("FashionMNIST", "its idx files", train=part == "train") for part in _IDX_NAMES
        }
    except (ImportError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"fashion-mnist: expected its idx files in {DEBIAN_FASHION_MNIST}, got none; install the Debian package"
            f" dataset-fashion-mnist or set {FASHION_MNIST_VARIABLE} to their folder; or else: {error}"
        ) from error
    return {part: (data.data.numpy(), data.targets.numpy()) for part, data in sets.items()}


def _torchvision(kind: str, archive: str, **arguments: Any) -> Any:
    """torchvision's data set of the class `kind`, downloaded when it is not there; archive: what that fetches."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError("torchvision is missing: pip install 'ulfine-fast[images]'") from error
    folder = _download_folder()
    try:
        return getattr(datasets, kind)(folder, download=True, **arguments)
    # no network is an OSError, a file with another checksum a RuntimeError
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{kind}: expected {archive} in {folder}, got none, nor by download ({reason}); put it there"
        ) from error


def _download_folder() -> Path:
    return default_cache_dir() / "datasets"


def _spaced(class_names: list[str]) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in class_names)


def _cifar(classes: int) -> tuple[ImageSet, ImageSet]:
    parts = {
        part: _torchvision(f"CIFAR{classes}", f"cifar-{classes}-python.tar.gz", train=part == "train")
        for part in ("train", "test")
    }
    return tuple(
        ImageSet(f"cifar{classes}/{part}", data.data, np.array(data.targets), _spaced(data.classes))
        for part, data in parts.items()
    )


def _svhn() -> tuple[ImageSet, ImageSet]:
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("scipy, which reads svhn, is missing: pip install 'ulfine-fast[images]'")
    parts = {part: _torchvision("SVHN", f"{part}_32x32.mat", split=part) for part in ("train", "test")}
    digits = tuple("0123456789")
    return tuple(
        ImageSet(f"svhn/{part}", data.data.transpose(0, 2, 3, 1), data.labels, digits)
        for part, data in parts.items()
    )


class _Benchmark(NamedTuple):
    """Sources of a data set. labels int64: classes of the first images of `train`; the rest have none."""

    train: ImageSource
    labels: np.ndarray
    test: ImageSource
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    report: ReadReport


def _in_memory(load: Callable[[], tuple[ImageSet, ImageSet]]) -> _Benchmark:
    train, test = load()
    sources = (ImageArray(part.images, part.name, part.invert) for part in (train, test))
    return _Benchmark(
        next(sources), train.labels, next(sources), test.labels, train.class_names, ReadReport()
    )


def _stl10() -> _Benchmark:
    data = _torchvision("STL10", "stl10_binary.tar.gz", split="test")
    folder = _download_folder() / data.base_folder

    def images(part: str) -> ImageArray:
        # mapped, not read: the unlabelled images are 2.8 GB; they are stored as [colour, column, row]
        pixels = np.memmap(folder / f"{part}_X.bin", np.uint8, "r").reshape(-1, 3, 96, 96)
        return ImageArray(pixels.transpose(0, 3, 2, 1), f"stl10/{part}")

    def labels(part: str) -> np.ndarray:
        return np.fromfile(folder / f"{part}_y.bin", np.uint8).astype(np.int64) - 1

    return _Benchmark(
        JoinedImages([images("train"), images("unlabeled")]),
        labels("train"),
        images("test"),
        labels("test"),
        _spaced(data.classes),
        ReadReport(),
    )


def _food101() -> _Benchmark:
    data = _torchvision("Food101", "food-101.tar.gz", split="test")
    folder = _download_folder() / "food-101"
    report = ReadReport()

    def part(name: str) -> tuple[ImageFiles, np.ndarray]:
        listed = json.loads((folder / "meta" / f"{name}.json").read_text())
        rows = [(image, k) for k, kind in enumerate(data.classes) for image in listed[kind]]
        files = ImageFiles([folder / "images" / f"{image}.jpg" for image, _ in rows], report=report)
        return files, np.array([k for _, k in rows])

    return _Benchmark(*part("train"), *part("test"), _spaced(data.classes), report)


# in memory, for heads on cached features too
DATASETS: dict[str, Callable[[], tuple[ImageSet, ImageSet]]] = {
    "fashion-mnist-subset": _fashion_mnist_subset,
    "fashion-mnist": _fashion_mnist,
    "cifar10": partial(_cifar, 10),
    "cifar100": partial(_cifar, 100),
    "svhn": _svhn,
}
IMAGE_DATASETS: dict[str, Callable[[], _Benchmark]] = {
    **{name: partial(_in_memory, load) for name, load in DATASETS.items()},
    "stl10": _stl10,
    "food101": _food101,
}
