import os
from dataclasses import replace

import numpy as np
import pytest

from ulfine_fast.image_data import ImageData, absent_classes, class_name, repeated_names, shortened
from ulfine_fast.images import ImageArray


def numbered(count: int, name: str) -> ImageArray:
    return ImageArray(np.zeros((count, 2, 2), dtype=np.uint8), name)


def rows(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


DATA = ImageData(
    train=numbered(6, "toy/train"),
    labelled=rows(0, 1, 2),
    labels=rows(0, 0, 2),
    unlabelled=rows(2, 3, 4, 5),
    unlabelled_truth=rows(2, 1, 1, 0),
    test=numbered(2, "toy/test"),
    test_labels=rows(0, 2),
    class_names=("a", "b", "c"),
)


def test_counts() -> None:
    assert DATA.labelled_counts.tolist() == [2, 0, 1]
    assert DATA.unlabelled_is_labelled.tolist() == [True, False, False, False]
    assert DATA.unlabelled_counts.tolist() == [1, 2, 0]
    assert replace(DATA, unlabelled_truth=rows(2, 1, 1, -1)).unlabelled_counts is None
    assert replace(DATA, unlabelled_truth=rows(-1, 1, 1, 0)).unlabelled_counts.tolist() == [1, 2, 0]
    assert replace(DATA, unlabelled=rows(), unlabelled_truth=rows()).unlabelled_counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelled": rows(0, 1, 6)}, r"labelled must be in 0\.\.5, got 0\.\.6"),
        ({"labelled": rows(0, 1, 1)}, "labelled must have every row once"),
        ({"unlabelled": rows(2, 2, 4, 5)}, "unlabelled must have every row once"),
        ({"labels": rows(0, 0, 3)}, r"labels must be in 0\.\.2, got 0\.\.3"),
        ({"labels": rows(0, 0, -1)}, r"labels must be in 0\.\.2, got -1\.\.0"),
        ({"labels": rows(0, 0)}, "labels must be of length 3, got 2"),
        ({"labels": np.zeros(3, np.int32)}, r"labels must be a numpy array of int64 .* got int32 \(3,\)"),
        ({"labels": [0, 0, 2]}, "labels must be a numpy array of int64 in one dimension, got list"),
        ({"unlabelled_truth": rows(2, 1, 1, -2)}, r"unlabelled_truth must be in -1\.\.2, got -2\.\.2"),
        ({"unlabelled_truth": rows(2)}, "unlabelled_truth must be of length 4, got 1"),
        ({"test_labels": rows(0, 3)}, r"test_labels must be in 0\.\.2, got 0\.\.3"),
        ({"test_labels": rows(0)}, "test_labels must be of length 2, got 1"),
        ({"validation": numbered(1, "x")}, "must be both given or both None"),
        (
            {"validation": numbered(1, "x"), "validation_labels": rows(3)},
            r"validation_labels must be in 0\.\.2",
        ),
    ],
)
def test_image_data_checks_its_fields(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^ImageData: .*{message}"):
        replace(DATA, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelled": rows(), "labels": rows()}, "labelled must have at least one image, got none"),
        ({"test": numbered(0, "x"), "test_labels": rows()}, "test must have at least one image, got none"),
        ({"class_names": ("a",)}, "classes must be at least two, got a"),
        ({"class_names": ("a", "b", " ")}, "class names must not be empty, got ' ' for class 2"),
    ],
)
def test_errors_about_the_data_of_people_name_nothing_internal(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(DATA, **changes)


def test_classes_of_one_name_are_told_apart_by_number() -> None:
    assert replace(DATA, class_names=("a", "b", "a")).labelled_counts.tolist() == [2, 0, 1]
    names = ["missile", "tree", "missile", "sunglasses", "missile", "sunglasses"]
    assert repeated_names(names) == [
        "classes: several have one name and are told apart by number: missile (0, 2, 4), sunglasses (3, 5)"
    ]
    assert repeated_names("abc") == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("sea_lion", "sea lion"),
        ("cafe\u0301", "caf\u00e9"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        (" two\nlines\u2028three ", "two\\nlines\\u2028three"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("[/b] $x$ {} \u732b", "[/b] $x$ {} \u732b"),
        ("_", "_"),
    ],
)
def test_a_name_is_one_whatever_the_bytes_it_is_written_with(text: str, name: str) -> None:
    assert class_name(text) == name
    assert class_name(name) == name


def test_identity() -> None:
    assert replace(DATA).identity == DATA.identity
    moved = replace(DATA, train=numbered(6, "elsewhere/train"), test=numbered(2, "elsewhere/test"))
    assert moved.identity == DATA.identity
    assert replace(DATA, notes=("note",)).identity == DATA.identity
    others = [
        replace(DATA, class_names=("a", "b", "d")),
        replace(DATA, labels=rows(0, 1, 2)),
        replace(DATA, labelled=rows(1, 0, 2)),
        replace(DATA, unlabelled=rows(1, 3, 4, 5)),
        replace(DATA, test_labels=rows(0, 1)),
        replace(DATA, train=numbered(6, "toy/t"), test=numbered(2, "toy/test")),
        replace(DATA, train=numbered(7, "toy/train")),
    ]
    assert len({DATA.identity, *(other.identity for other in others)}) == 1 + len(others)


def test_notes_are_short() -> None:
    assert shortened("abc") == "a, b, c"
    assert shortened("abc", 2) == "a, b, ... (3 in all)"
    assert shortened([]) == "none"
    assert shortened(["a\nb", os.fsdecode(b"\xff")]) == "a\\nb, \\xff"
    assert absent_classes("test", rows(1, 1), ("a", "b", "c")) == ["test: no image of 2 classes: a, c"]
    assert absent_classes("test", rows(1, 0), ("a", "b")) == []
