import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from ulfine_fast.image_data import ImageData
from ulfine_fast.imagenet127 import TEST_BATCH, TRAIN_BATCHES, imagenet127_data

SIZE = 4
# sizes of three classes: 5, 40, 20; a batch holds 7 images at most
LABELS = np.random.RandomState(0).permutation([0] * 5 + [1] * 40 + [2] * 20)
TEST_LABELS = [0, 1, 1, 2]


def planar(count: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, 3 * SIZE * SIZE), dtype=np.uint8)


def write(folder: Path, labels: np.ndarray, test_labels: list[int], protocol: int = 2) -> list[np.ndarray]:
    parts = np.array_split(labels, len(TRAIN_BATCHES))
    pixels = [planar(len(part), seed) for seed, part in enumerate(parts)]
    for name, data, part in zip(TRAIN_BATCHES, pixels, parts, strict=True):
        batch = {"data": data, "labels": part.tolist(), "mean": data.mean(axis=0)}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    # a list of numpy numbers, as some copies have
    test = {"data": planar(len(test_labels), 99), "labels": list(np.array(test_labels))}
    (folder / TEST_BATCH).write_bytes(pickle.dumps(test, protocol))
    return pixels


def check(data: ImageData, pixels: list[np.ndarray]) -> None:
    # of classes 1, 2, 0 by falling count: 20 % of 40, 20, 5
    assert data.labelled_counts.tolist() == [8, 4, 1]
    new = np.array([2, 0, 1])[LABELS]
    assert np.array_equal(data.unlabelled_truth, new)
    assert data.test_labels.tolist() == [2, 0, 0, 1]
    for k, count in enumerate([8, 4, 1]):
        assert np.array_equal(data.labelled[data.labels == k], np.flatnonzero(new == k)[:count])
    assert np.array_equal(data.unlabelled, np.arange(65))
    assert data.unlabelled_is_labelled.sum() == 13
    assert data.train.name(8) == "imagenet127/train_data_batch_2[1]"
    expected = np.concatenate(pixels)[8].reshape(3, SIZE, SIZE).transpose(1, 2, 0)
    assert np.array_equal(data.train.read(8), expected)
    assert data.test.name(3) == "imagenet127/val_data[3]"


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("first", [0, 1])
def test_superclasses_as_labels(protocol: int, first: int, tmp_path: Path) -> None:
    pixels = write(tmp_path, LABELS + first, [label + first for label in TEST_LABELS], protocol)
    (tmp_path / "names").write_text("sea lion\nbus\ncat\n")
    data = imagenet127_data(tmp_path, labelled_share=0.2, class_names=tmp_path / "names")
    check(data, pixels)
    assert data.class_names == ("bus", "cat", "sea lion")
    assert data.notes == ()


def test_labels_of_imagenet(tmp_path: Path) -> None:
    # ImageNet's classes 0 and 3 are one superclass
    fine = np.where((LABELS == 1) & (np.arange(65) % 2 == 0), 3, LABELS)
    pixels = write(tmp_path, fine + 1, [1, 2, 4, 3])
    (tmp_path / "map").write_text("sea lion\nbus\ncat\nbus\n")
    data = imagenet127_data(tmp_path, labelled_share=0.2, superclasses=tmp_path / "map")
    check(data, pixels)
    assert data.class_names == ("bus", "cat", "sea lion")


def test_labelled_counts_round_half_to_even(tmp_path: Path) -> None:
    write(tmp_path, LABELS, TEST_LABELS)
    (tmp_path / "names").write_text("a\nb\nc\n")
    data = imagenet127_data(tmp_path, labelled_share=0.1, class_names=tmp_path / "names")
    assert data.labelled_counts.tolist() == [4, 2, 0]
    assert data.notes == ("labelled: no image of 1 classes: a",)
    nameless = imagenet127_data(tmp_path, labelled_share=0.1)
    assert len(nameless.class_names) == 127
    assert nameless.class_names[:3] == ("1", "2", "0")
    assert nameless.notes[0] == "classes are called by their number; text prototypes need names"


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("was_here",)


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, LABELS, TEST_LABELS)
    for payload in (Malicious(), {"data": planar(1, 0), "labels": [Malicious()]}):
        (tmp_path / TRAIN_BATCHES[0]).write_bytes(pickle.dumps(payload))
        with pytest.raises(ValueError, match=r"train_data_batch_1: .*got posix\.mkdir, which is refused$"):
            imagenet127_data(tmp_path, labelled_share=0.1)
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a pickle of arrays, got"),
        (b"\x80\x02garbage", "expected a pickle of arrays, got"),
        (pickle.dumps([1, 2]), "expected a dict with data and labels"),
        (pickle.dumps({"data": planar(1, 0)}), "expected a dict with data and labels"),
        (pickle.dumps({"data": planar(1, 0), "labels": ["cat"]}), "expected a dict with data and labels"),
        (
            pickle.dumps({"data": planar(2, 0), "labels": [0]}),
            r"expected data uint8 \[1, 3 \* 4 \* 4\], got uint8",
        ),
        (pickle.dumps({"data": planar(1, 0)[:, 1:], "labels": [0]}), r"got uint8 \(1, 47\)"),
        (pickle.dumps({"data": planar(1, 0).astype(float), "labels": [0]}), r"got float64 \(1, 48\)"),
        (pickle.dumps({"data": "text", "labels": [0]}), "got str"),
        (pickle.dumps({"data": planar(1, 0), "labels": [[0, 0]]}), r"got uint8 \(1, 48\)"),
    ],
)
def test_damaged_batches(content: bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path, LABELS, TEST_LABELS)
    (tmp_path / TRAIN_BATCHES[3]).write_bytes(content)
    with pytest.raises(ValueError, match=f"train_data_batch_4: .*{message}"):
        imagenet127_data(tmp_path, labelled_share=0.1)


def test_other_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="val_data"):
        imagenet127_data(tmp_path, labelled_share=0.1)
    with pytest.raises(ValueError, match=r"labelled_share must be in \(0, 1\], got 0$"):
        imagenet127_data(tmp_path, labelled_share=0)
    write(tmp_path, LABELS + 2, TEST_LABELS)
    with pytest.raises(ValueError, match=f"^{tmp_path}: expected labels from 0 or from 1, got 2$"):
        imagenet127_data(tmp_path, labelled_share=0.1)
    write(tmp_path, np.where(LABELS == 2, 999, LABELS), TEST_LABELS)
    with pytest.raises(ValueError, match=r"labels of 127 classes, got 0\.\.999 .*give superclasses"):
        imagenet127_data(tmp_path, labelled_share=0.1)
    (tmp_path / "map").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"labels of 2 classes, got 0\.\.999 .*the lines of .*map say so"):
        imagenet127_data(tmp_path, labelled_share=0.1, superclasses=tmp_path / "map")
    write(tmp_path, LABELS + 1, [0, 1])
    with pytest.raises(ValueError, match=r"got -1\.\.2"):
        imagenet127_data(tmp_path, labelled_share=0.1)
