"""Labelled image sets: Fashion-MNIST whole, and the subset of it that ships with the package.

Fashion-MNIST: Xiao, Rasul and Vollgraf, 2017, MIT licence, Zalando SE; 28 x 28 grey, light item on black.
"""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ulfine_fast.assets import asset
from ulfine_fast.cache import default_cache_dir

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
        shape = self.images.shape
        if self.images.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            raise ValueError(
                f"ImageSet {self.name}: images must be uint8 [N, H, W] or [N, H, W, 3],"
                f" got {self.images.dtype} {shape}"
            )
        if self.labels.dtype != np.int64 or self.labels.shape != shape[:1]:
            raise ValueError(
                f"ImageSet {self.name}: labels must be int64 [{shape[0]}],"
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
    """The training and the test set called `name`; see `DATASETS` for the names.

    "fashion-mnist-subset": 4,000 training and 2,000 test images, balanced, from the package itself.
    "fashion-mnist": 60,000 and 10,000 images, from the first of: the folder of idx files that the environment
    variable ULFINE_FASHION_MNIST names; the Debian package dataset-fashion-mnist; torchvision's downloader,
    into the cache directory.

    Raises ValueError for an unknown name or a damaged idx file, FileNotFoundError when no source has the
    data.
    """
    if name not in DATASETS:
        raise ValueError(f"load_dataset: name must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name]()


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
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise FileNotFoundError(
            f"fashion-mnist: expected its idx files in {DEBIAN_FASHION_MNIST}, got none; install the Debian package"
            f" dataset-fashion-mnist, set {FASHION_MNIST_VARIABLE} to their folder, or pip install torchvision"
        ) from error
    root = default_cache_dir() / "datasets"
    sets = {part: FashionMNIST(str(root), train=part == "train", download=True) for part in _IDX_NAMES}
    return {part: (data.data.numpy(), data.targets.numpy()) for part, data in sets.items()}


DATASETS: dict[str, Callable[[], tuple[ImageSet, ImageSet]]] = {
    "fashion-mnist-subset": _fashion_mnist_subset,
    "fashion-mnist": _fashion_mnist,
}
