import gzip
import hashlib
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from ulfine_fast import assets, datasets
from ulfine_fast.datasets import FASHION_MNIST_CLASSES, ImageSet, load_dataset, read_idx

IMAGES = np.zeros((2, 4, 4), dtype=np.uint8)
LABELS = np.array([0, 1])


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_subset_is_balanced_and_described() -> None:
    train, test = load_dataset("fashion-mnist-subset")
    for part, per_class in ((train, 400), (test, 200)):
        assert part.images.shape == (per_class * 10, 28, 28)
        assert np.bincount(part.labels).tolist() == [per_class] * 10
        assert part.class_names == FASHION_MNIST_CLASSES
        assert part.invert
    assert len(np.unique(train.images.reshape(4000, -1), axis=0)) == 4000


@pytest.mark.skipif(
    not datasets.DEBIAN_FASHION_MNIST.is_dir(), reason="package dataset-fashion-mnist not installed"
)
def test_subset_is_a_subset_of_the_full_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(datasets.FASHION_MNIST_VARIABLE, raising=False)
    with np.load(assets.asset("fashion_mnist_subset.npz")) as file:
        for part, full in zip(("train", "test"), load_dataset("fashion-mnist"), strict=True):
            indices = file[f"{part}_indices"]
            assert np.array_equal(file[f"{part}_images"], full.images[indices])
            assert np.array_equal(file[f"{part}_labels"], full.labels[indices])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_full_set_from_the_named_folder(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.RandomState(0).randint(0, 256, (5, 28, 28))
    for stem in ("train", "t10k"):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte{suffix}", np.array([9, 0, 1, 2, 3]))
    monkeypatch.setenv(datasets.FASHION_MNIST_VARIABLE, str(tmp_path))
    train, test = load_dataset("fashion-mnist")
    assert np.array_equal(train.images, images)
    assert np.array_equal(test.labels, [9, 0, 1, 2, 3])
    assert train.labels.dtype == np.int64


def test_a_named_folder_without_files_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(datasets.FASHION_MNIST_VARIABLE, str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"expected train-images-idx3-ubyte\.gz or train-images-idx3-ubyte in"
    ):
        load_dataset("fashion-mnist")


def test_no_source_names_the_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(datasets.FASHION_MNIST_VARIABLE, raising=False)
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(FileNotFoundError) as raised:
        load_dataset("fashion-mnist")
    message = str(raised.value)
    assert all(
        way in message for way in ("dataset-fashion-mnist", "ULFINE_FASHION_MNIST", "pip install torchvision")
    )
    assert "\n" not in message


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="must be one of fashion-mnist-subset, fashion-mnist, got 'cifar'"):
        load_dataset("cifar")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an idx file of unsigned bytes"),
        (
            b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00",
            r"expected an idx file of unsigned bytes \(00 00 08\), got 00 00 0d",
        ),
        (b"\x00\x00\x08\x01\x00\x00\x00\x03\x00", "expected 3 bytes of data, got 1"),
        (b"\x00\x00\x08\x02\x00\x00", "bytes of data"),
    ],
)
def test_damaged_idx(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "idx").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "idx")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((IMAGES.astype(np.float32), LABELS, ("a", "b")), r"images must be uint8 .* got float32 \(2, 4, 4\)"),
        ((IMAGES[..., None], LABELS, ("a", "b")), r"images must be uint8 .* got uint8 \(2, 4, 4, 1\)"),
        ((IMAGES, LABELS[:1], ("a", "b")), r"labels must be int64 \[2\], got int64 \(1,\)"),
        ((IMAGES, LABELS.astype(np.int32), ("a", "b")), r"labels must be int64 \[2\], got int32 \(2,\)"),
        ((IMAGES.tolist(), LABELS, ("a", "b")), "images must be a numpy array, got list"),
        ((IMAGES, LABELS.tolist(), ("a", "b")), "labels must be a numpy array, got list"),
        ((IMAGES, LABELS, ("a", "")), "class names must not be empty"),
        ((IMAGES, LABELS, ()), "class names must not be empty"),
        ((IMAGES, LABELS, ("a", "a")), "class names must be distinct"),
        ((IMAGES, LABELS, ("a",)), r"labels must be in 0\.\.0, got 0\.\.1"),
    ],
)
def test_image_set_checks_its_fields(fields: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSet("toy", *fields)


def test_assets_match_their_checksums() -> None:
    for name, sha256 in assets.SHA256.items():
        assert hashlib.sha256(assets.asset(name).read_bytes()).hexdigest() == sha256
    assert assets.asset("fashion_mnist_subset.npz").stat().st_size <= 3_000_000


def test_asset_errors(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"name must be one of fashion_mnist_subset\.npz, lite_clip_text\.npz, got 'x'"
    ):
        assets.asset("x")
    with pytest.raises(ValueError, match="expected a data file, got nothing"):
        assets.verified(tmp_path / "absent", "00")
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(ValueError, match="expected sha256 00, got d9298a10"):
        assets.verified(tmp_path / "other", "00")
