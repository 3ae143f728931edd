"""Features of one's own from a file."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.nn import functional as F

from ulfine_fast.feature_file import read_features

WIDTH, CLASSES = 6, 3
NAMES = ("heron", "ibis", "stork")


def contents(**changed) -> dict[str, np.ndarray]:
    """Everything that a file may hold; None in `changed` leaves a tensor out."""
    random = np.random.default_rng(0)

    def rows(*shape) -> np.ndarray:
        return random.normal(2, 3, (*shape, WIDTH)).astype(np.float32)

    whole = {
        "labelled": rows(2, 7),
        "labels": np.array([0, 0, 0, 1, 1, 2, 2]),
        "weak": rows(2, 5),
        "strong": rows(3, 5),
        "test": rows(4),
        "test_labels": np.array([0, 1, 2, 0]),
        "prototypes": rows(CLASSES),
        "unlabelled_truth": np.array([0, -1, 2, 2, 1]),
        "unlabelled_is_labelled": np.array([False, True, False, False, False]),
    }
    return {name: array for name, array in (whole | changed).items() if array is not None}


def write(folder, suffix=".npz", names=NAMES, **changed):
    path = folder / f"features{suffix}"
    arrays = contents(**changed)
    if suffix == ".npz":
        np.savez(path, **arrays, **({} if names is None else {"class_names": np.array(names)}))
    else:
        metadata = None if names is None else {"class_names": json.dumps(names)}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata)
    return path


def unit(rows) -> torch.Tensor:
    return F.normalize(torch.from_numpy(rows).double(), dim=-1).float()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_everything_in_a_file_is_in_the_record(tmp_path, suffix):
    features, whole = read_features(write(tmp_path, suffix)), contents()
    for name in ("labelled", "weak", "strong", "prototypes"):
        torch.testing.assert_close(getattr(features, name), unit(whole[name]))
    torch.testing.assert_close(features.test, unit(whole["test"])[:, None])
    for name in ("labels", "test_labels", "unlabelled_truth"):
        assert getattr(features, name).dtype == torch.int64
        assert getattr(features, name).tolist() == whole[name].tolist()
    assert features.class_names == NAMES
    assert features.labelled_counts.tolist() == [3, 2, 2]
    # the image whose class is unknown is a labelled one too
    assert features.unlabelled_counts.tolist() == [1, 1, 2]
    assert features.unlabelled_is_labelled.tolist() == [False, True, False, False, False]
    assert features.validation is features.centre is features.split is features.images is None


def test_what_may_be_left_out(tmp_path):
    left_out = ("weak", "strong", "prototypes", "unlabelled_truth", "unlabelled_is_labelled")
    features = read_features(write(tmp_path, names=None, **dict.fromkeys(left_out)))
    assert features.weak.shape == features.strong.shape == (1, 0, WIDTH)
    assert features.unlabelled_counts.tolist() == [0, 0, 0]
    assert features.class_names == ("0", "1", "2")
    for k in range(CLASSES):
        mean = features.labelled[:, features.labels == k].sum((0, 1))
        torch.testing.assert_close(features.prototypes[k], F.normalize(mean, dim=0))
    features = read_features(write(tmp_path, unlabelled_truth=None, unlabelled_is_labelled=None))
    assert features.unlabelled_truth.tolist() == [-1] * 5
    assert features.unlabelled_counts is None
    assert not features.unlabelled_is_labelled.any()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_rows_may_be_of_any_floating_dtype_and_of_one_copy(tmp_path, dtype):
    whole = contents()
    one = {name: whole[name][0].astype(dtype) for name in ("labelled", "weak", "strong")}
    features = read_features(write(tmp_path, labels=whole["labels"].astype(np.uint8), **one))
    for name, rows in one.items():
        torch.testing.assert_close(getattr(features, name), unit(rows.astype(np.float64))[None])
    assert features.labels.tolist() == whole["labels"].tolist()


def test_several_views_of_a_test_image_and_a_zero_row(tmp_path):
    test = contents()["weak"].transpose(1, 0, 2)[:4].copy()
    test[1, 0] = 0
    features = read_features(write(tmp_path, test=test))
    torch.testing.assert_close(features.test, unit(test))
    assert not features.test[1, 0].any()


NAN = np.full((4, WIDTH), np.nan, dtype=np.float32)
NAN[0] = 1
FAULTS = [
    ({"labels": None}, "tensors labelled, labels, test, test_labels, got no labels"),
    ({"test": None}, "tensors labelled, labels, test, test_labels, got no test"),
    ({"lables": np.zeros(7)}, "tensors among labelled, .*, unlabelled_is_labelled, got lables"),
    ({"strong": None}, "weak and strong, or neither, got weak alone"),
    ({"weak": None}, "weak and strong, or neither, got strong alone"),
    (
        {"labelled": np.zeros(7, np.float32)},
        r"labelled of a floating dtype, \[n_l, D\] or \[K, n_l, D\], got float32 \[7\]",
    ),
    ({"labelled": np.zeros((7, WIDTH), np.int32)}, r"labelled of a floating dtype, .*, got int32 \[7, 6\]"),
    ({"labelled": np.zeros((0, WIDTH), np.float32)}, r"labelled of .*, got float32 \[0, 6\]"),
    (
        {"test": np.zeros((1, 1, 1, WIDTH), np.float32)},
        r"test of .*\[n_t, V, D\], got float32 \[1, 1, 1, 6\]",
    ),
    ({"test": np.zeros((4, 5), np.float32)}, "test of width 6, as labelled, got 5"),
    ({"prototypes": np.zeros((3, 9), np.float32)}, "prototypes of width 6, as labelled, got 9"),
    ({"prototypes": np.zeros((2, WIDTH), np.float32)}, "3 prototypes, one for each of class_names, got 2"),
    (
        {"strong": np.ones((4, WIDTH), np.float32)},
        "strong views of the 5 images of weak, got 4",
    ),
    ({"test": NAN}, "test to be rows of finite length in float32, got 3 rows that are not"),
    (
        {"test": np.full((4, WIDTH), 1e300)},
        "test to be rows of finite length in float32, got 4 rows that are not",
    ),
    (
        {"test": np.full((4, WIDTH), 1e30)},
        "test to be rows of finite length in float32, got 4 rows that are not",
    ),
    ({"labels": np.zeros(6, np.int64)}, r"labels of whole numbers, \[7\], got int64 \[6\]"),
    ({"labels": np.zeros(7)}, r"labels of whole numbers, \[7\], got float64 \[7\]"),
    ({"labels": np.zeros(7, bool)}, r"labels of whole numbers, \[7\], got bool \[7\]"),
    ({"labels": np.array([0, 1, 2, 3, 0, 0, 0])}, r"labels in 0..2, got 3"),
    ({"labels": np.array([0, 1, 2, -1, 0, 0, 0])}, r"labels in 0..2, got -1"),
    ({"test_labels": np.array([0, 1, 7, 0])}, r"test_labels in 0..2, got 7"),
    ({"unlabelled_truth": np.array([0, 1, -2, 0, 0])}, r"unlabelled_truth in -1..2, got -2"),
    (
        {"unlabelled_truth": np.zeros(4, np.int64)},
        r"unlabelled_truth of whole numbers, \[5\], got int64 \[4\]",
    ),
    (
        {"unlabelled_is_labelled": np.zeros(5, np.int64)},
        r"unlabelled_is_labelled bool \[5\], got int64 \[5\]",
    ),
    (
        {"labels": np.zeros(7, np.int64), "prototypes": None},
        "prototypes, or labelled rows of every class, got none of 'ibis'",
    ),
    (
        {"labels": np.zeros(7, np.int64), "test_labels": np.zeros(4, np.int64), "names": None}
        | dict.fromkeys(("weak", "strong", "prototypes", "unlabelled_truth", "unlabelled_is_labelled")),
        "at least two classes, got 1",
    ),
    ({"names": ("a", " ", "c")}, r"class_names that are not empty, got \('a', ' ', 'c'\)"),
    ({"names": ("a", "b")}, "2 prototypes, one for each of class_names, got 3"),
]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("changed", "message"), FAULTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_faults_are_named(tmp_path, suffix, changed, message):
    path = write(tmp_path, suffix, **changed)
    with pytest.raises(ValueError, match=f"features{suffix}: expected {message}$") as raised:
        read_features(path)
    assert "\n" not in str(raised.value)


class Explosive:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def pickled_names(path) -> None:
    np.savez(path, **contents(), class_names=np.array([Explosive()] * 3, dtype=object))


def zipped_text(path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labelled", "no array")


def one_array(path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    path.write_bytes(buffer.getvalue())


def truncated(path) -> None:
    np.savez(path, **contents())
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path) -> None:
    np.savez(path, **contents())
    octets = bytearray(path.read_bytes())
    octets[300] ^= 255
    path.write_bytes(octets)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled_names, "an .npz file without pickled objects, got Object arrays cannot be loaded"),
        (
            lambda path: path.write_bytes(pickle.dumps(Explosive())),
            "an .npz file without pickled objects, got",
        ),
        (zipped_text, "an .npz file of arrays alone, got labelled"),
        (one_array, "an .npz file without pickled objects, got"),
        (truncated, "an .npz file without pickled objects, got"),
        (flipped, "an .npz file without pickled objects, got Bad CRC-32"),
        (lambda path: path.write_bytes(b""), "an .npz file without pickled objects, got"),
        (
            lambda path: np.savez(path, **contents(), class_names=np.arange(3)),
            r"class_names to be an array \[C\] of text, got int64 \[3\]",
        ),
        (
            lambda path: np.savez(path, **contents(labels=np.array(["a"] * 7))),
            "labels to be of numbers, got <U1",
        ),
        (
            lambda path: np.savez(path, **contents(test=np.zeros((4, WIDTH), complex))),
            "test to be of numbers, got complex128",
        ),
    ],
)
def test_an_npz_file_that_is_none_is_refused_and_never_run(tmp_path, damage, message):
    path = tmp_path / "features.npz"
    damage(path)
    with pytest.raises(ValueError, match=f"features.npz: expected {message}"):
        read_features(path)


@pytest.mark.parametrize("names", ["heron", '"heron"', "[1, 2, 3]", "{}"])
def test_class_names_of_a_safetensors_file_are_a_list_of_texts(tmp_path, names):
    path = tmp_path / "features.safetensors"
    save_file(contents(), path, {"class_names": names})
    with pytest.raises(
        ValueError, match="expected class_names in the metadata to be a JSON list of texts, got"
    ):
        read_features(path)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "features.safetensors"
    path.write_bytes(b"no tensors at all, but long enough for a header")
    with pytest.raises(ValueError, match="features.safetensors: expected a safetensors file, got"):
        read_features(path)
    with pytest.raises(
        ValueError, match=r"expected a file that ends in .safetensors or .npz, got features.pt"
    ):
        read_features(tmp_path / "features.pt")
    for suffix in (".npz", ".safetensors"):
        with pytest.raises(FileNotFoundError, match=f"missing{suffix}"):
            read_features(tmp_path / f"missing{suffix}")
