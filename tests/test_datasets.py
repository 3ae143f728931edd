import gzip
import hashlib
import json
import pickle
import struct
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ulfine_fast import assets, datasets
from ulfine_fast.datasets import (
    DATASETS,
    FASHION_MNIST_CLASSES,
    IMAGE_DATASETS,
    ImageSet,
    dataset_data,
    load_dataset,
    read_idx,
)

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
        way in message
        for way in ("dataset-fashion-mnist", "ULFINE_FASHION_MNIST", "pip install 'ulfine-fast[images]'")
    )
    assert "\n" not in message


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="must be one of fashion-mnist-subset, .*, svhn, got 'cifar'"):
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


# three images of each class, in no order
LABELS = np.random.RandomState(0).permutation(np.repeat(np.arange(10), 3))
SPLIT = {"labelled_largest": 2, "unlabelled_largest": 1, "imbalance": 2.0}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torchvision's files go; there is no network."""

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no\nnetwork")

    monkeypatch.setenv("ULFINE_CACHE", str(tmp_path))
    monkeypatch.delenv(datasets.FASHION_MNIST_VARIABLE, raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    (tmp_path / "datasets").mkdir()
    return tmp_path / "datasets"


def pixels(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, height, width, 3), dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_pickle(path: Path, content: dict) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return md5(path)


def planar(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


@pytest.fixture
def cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    kind = pytest.importorskip("torchvision.datasets").CIFAR10
    images = pixels(30, 32, 32)
    files = {}
    for batch in range(5):
        part = slice(6 * batch, 6 * batch + 6)
        content = {"data": planar(images[part]), "labels": LABELS[part].tolist()}
        files[f"data_batch_{batch + 1}"] = write_pickle(
            folder / kind.base_folder / f"data_batch_{batch + 1}", content
        )
    test = {"data": planar(images[:10]), "labels": LABELS[:10].tolist()}
    sum_of_test = write_pickle(folder / kind.base_folder / "test_batch", test)
    names = [f"kind_{k}" for k in range(10)]
    sum_of_meta = write_pickle(folder / kind.base_folder / "batches.meta", {"label_names": names})
    monkeypatch.setattr(kind, "train_list", list(files.items()))
    monkeypatch.setattr(kind, "test_list", [("test_batch", sum_of_test)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sum_of_meta})
    return images


def test_cifar10_in_the_protocol_of_acr(cifar10: np.ndarray) -> None:
    data = dataset_data("cifar10", **SPLIT)
    # 2 and 1 times 2 ** (-k / 9), rounded down
    assert data.labelled_counts.tolist() == [2] + [1] * 9
    assert data.unlabelled_counts.tolist() == [1] + [0] * 9
    for k in range(10):
        rows = np.flatnonzero(k == LABELS)
        assert data.labelled[data.labels == k].tolist() == rows[: 2 if k == 0 else 1].tolist()
    assert np.array_equal(data.unlabelled_truth, LABELS[data.unlabelled])
    assert data.unlabelled_is_labelled.sum() == 11
    assert data.class_names[3] == "kind 3"
    assert data.train.name(17) == "cifar10/train[17]"
    assert np.array_equal(data.train.read(17), cifar10[17])
    assert np.array_equal(data.test_labels, LABELS[:10])
    assert np.array_equal(data.test.read(9), cifar10[9])
    assert data.validation is None


def test_the_other_protocols(cifar10: np.ndarray) -> None:
    data = dataset_data("cifar10", **SPLIT | {"labelled_largest": 1}, protocol="daso", validation_per_class=1)
    assert np.array_equal(data.validation_labels, np.arange(10))
    held_out = {data.validation.name(i) for i in range(10)}
    training = {data.train.name(int(row)) for row in (*data.labelled, *data.unlabelled)}
    assert not held_out & training
    row = int(data.validation.name(4).split("[")[1][:-1])
    assert LABELS[row] == 4
    assert np.array_equal(data.validation.read(4), cifar10[row])
    splits = [dataset_data("cifar10", **SPLIT, protocol="usb", seed=seed) for seed in (0, 0, 1)]
    assert not splits[0].unlabelled_is_labelled.any()
    assert splits[0].identity == splits[1].identity != splits[2].identity


def test_cifar100(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = pytest.importorskip("torchvision.datasets").CIFAR100
    images = pixels(30, 32, 32)
    content = {"data": planar(images), "fine_labels": LABELS.tolist(), "coarse_labels": [0] * 30}
    files = [(name, write_pickle(folder / kind.base_folder / name, content)) for name in ("train", "test")]
    names = ["aquarium_fish", *(f"kind {k}" for k in range(9))]
    meta = write_pickle(folder / kind.base_folder / "meta", {"fine_label_names": names})
    monkeypatch.setattr(kind, "train_list", files[:1])
    monkeypatch.setattr(kind, "test_list", files[1:])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta})
    train, test = load_dataset("cifar100")
    assert train.class_names[0] == "aquarium fish"
    assert np.array_equal(train.labels, LABELS)
    assert np.array_equal(test.images, images)
    assert dataset_data("cifar100", **SPLIT).test.name(2) == "cifar100/test[2]"


@pytest.fixture
def stl10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    kind = pytest.importorskip("torchvision.datasets").STL10
    home = folder / kind.base_folder
    home.mkdir()
    images = pixels(35, 96, 96)
    # column after column, classes from 1
    for part, rows in (("train", slice(30)), ("unlabeled", slice(30, 35)), ("test", slice(10))):
        (home / f"{part}_X.bin").write_bytes(images[rows].transpose(0, 3, 2, 1).tobytes())
    (home / "train_y.bin").write_bytes((LABELS + 1).astype(np.uint8).tobytes())
    (home / "test_y.bin").write_bytes((LABELS[:10] + 1).astype(np.uint8).tobytes())
    (home / "class_names.txt").write_text("".join(f"kind {k}\n" for k in range(10)))
    monkeypatch.setattr(kind, "train_list", [(name, md5(home / name)) for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [(name, md5(home / name)) for name, _ in kind.test_list])
    return images


def test_stl10_has_its_own_unlabelled_images(stl10: np.ndarray) -> None:
    data = dataset_data("stl10", labelled_largest=2, imbalance=2.0)
    assert data.labelled_counts.tolist() == [2] + [1] * 9
    assert np.array_equal(data.labels, LABELS[data.labelled])
    assert data.unlabelled.tolist() == [30, 31, 32, 33, 34]
    assert data.unlabelled_truth.tolist() == [-1] * 5
    assert data.unlabelled_counts is None
    assert data.train.name(31) == "stl10/unlabeled[1]"
    for row in (0, 29, 30, 34):
        assert np.array_equal(data.train.read(row), stl10[row])
    assert np.array_equal(data.test.read(9), stl10[9])
    assert np.array_equal(data.test_labels, LABELS[:10])
    assert data.class_names[1] == "kind 1"


def test_stl10_in_the_protocol_of_daso(stl10: np.ndarray) -> None:
    data = dataset_data(
        "stl10", labelled_largest=2, imbalance=2.0, protocol="daso", validation_per_class=1, seed=1
    )
    assert len(data.validation) == 10
    assert len(data.unlabelled) == 5


@pytest.mark.parametrize(
    "argument", [{"unlabelled_largest": 1}, {"unlabelled_imbalance": 2.0}, {"unlabelled": "uniform"}]
)
def test_stl10_takes_no_unlabelled_split(argument: dict) -> None:
    with pytest.raises(ValueError, match="must be left out for stl10, got"):
        dataset_data("stl10", labelled_largest=2, imbalance=2.0, **argument)


def test_svhn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    kind = pytest.importorskip("torchvision.datasets").SVHN
    images = pixels(30, 32, 32)
    parts = dict(kind.split_list)
    for part in ("train", "test"):
        path = folder / f"{part}_32x32.mat"
        # images last, and the digit 0 has the label 10
        labels = np.where(LABELS == 0, 10, LABELS).astype(np.uint8)[:, None]
        scipy_io.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": labels})
        parts[part] = [parts[part][0], path.name, md5(path)]
    monkeypatch.setattr(kind, "split_list", parts)
    data = dataset_data("svhn", **SPLIT)
    assert np.array_equal(data.test_labels, LABELS)
    assert np.array_equal(data.train.read(4), images[4])
    assert data.class_names == tuple("0123456789")


def test_svhn_needs_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda _: None)
    message = r"^scipy, which reads svhn, is missing: pip install 'ulfine-fast\[images\]'$"
    with pytest.raises(ImportError, match=message):
        load_dataset("svhn")


def test_food101(folder: Path) -> None:
    pytest.importorskip("torchvision")
    home = folder / "food-101"
    (home / "meta").mkdir(parents=True)
    names = [f"dish_{letter}" for letter in "abcdefghij"]
    for part, count in (("train", 3), ("test", 1)):
        listed = {name: [f"{name}/{part}{i}" for i in range(count)] for name in reversed(names)}
        (home / "meta" / f"{part}.json").write_text(json.dumps(listed))
        for paths in listed.values():
            for path in paths:
                (home / "images" / path).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 6)).save(home / "images" / f"{path}.jpg")
    data = dataset_data("food101", **SPLIT)
    assert data.class_names[2] == "dish c"
    assert data.labelled_counts.tolist() == [2] + [1] * 9
    assert data.train.name(int(data.labelled[0])) == str(home / "images/dish_a/train0.jpg")
    assert data.train.read(29).size == (8, 6)
    assert data.test.name(9) == str(home / "images/dish_j/test0.jpg")
    assert data.test_labels.tolist() == list(range(10))
    assert data.train.report is data.test.report is data.report


def test_fashion_mnist_by_torchvision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", folder / "absent")
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in ("train", "t10k"):
        images = bytes([0, 0, 8, 3]) + struct.pack(">3I", 30, 28, 28) + bytes(30 * 28 * 28)
        labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 30) + LABELS.astype(np.uint8).tobytes()
        for name, content in (("images-idx3", images), ("labels-idx1", labels)):
            (raw / f"{stem}-{name}-ubyte").write_bytes(content)
            (raw / f"{stem}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    data = dataset_data("fashion-mnist", **SPLIT)
    # inverted: the items are light on dark
    assert data.train.read(3).getpixel((5, 5)) == (255, 255, 255)
    assert np.array_equal(data.test_labels, LABELS)


def test_the_subset_in_the_package() -> None:
    data = dataset_data("fashion-mnist-subset", labelled_largest=100, unlabelled_largest=300, imbalance=50)
    assert (data.labelled_counts[0], data.labelled_counts[9]) == (100, 2)
    assert len(data.test) == 2000
    assert np.array_equal(
        data.train.read(7).getchannel(0), 255 - load_dataset("fashion-mnist-subset")[0].images[7]
    )


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("stl10", "stl10_binary.tar.gz"),
        ("svhn", "train_32x32.mat"),
        ("food101", "food-101.tar.gz"),
        ("fashion-mnist", "its idx files"),
    ],
)
def test_without_network_the_error_names_folder_and_archive(
    name: str, archive: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", folder / "absent")
    if name == "svhn":
        pytest.importorskip("scipy")
    with pytest.raises(FileNotFoundError) as raised:
        IMAGE_DATASETS[name]()
    message = str(raised.value)
    assert f"expected {archive} in {folder}, got none, nor by download (" in message
    assert "no network" in message
    assert "\n" not in message


def test_a_damaged_archive_is_not_used(cifar10: np.ndarray, folder: Path) -> None:
    (folder / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match=r"expected cifar-10-python\.tar\.gz in"):
        load_dataset("cifar10")


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"^torchvision is missing: pip install 'ulfine-fast\[images\]'$"):
        load_dataset("cifar10")


def test_arguments() -> None:
    assert list(IMAGE_DATASETS) == [*DATASETS, "stl10", "food101"]
    with pytest.raises(
        ValueError, match="^data set must be one of fashion-mnist-subset, .*, food101, got 'mnist'"
    ):
        dataset_data("mnist", **SPLIT)
    with pytest.raises(ValueError, match="^unlabelled_largest must be given for cifar10, got None"):
        dataset_data("cifar10", labelled_largest=2, imbalance=2.0)
