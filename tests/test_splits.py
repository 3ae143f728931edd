import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulfine_fast.splits import (
    class_counts,
    first_per_class,
    groups_by_count,
    groups_by_rank,
    make_split,
    split_table,
)

SIZES = {"labelled_largest": 50, "unlabelled_largest": 100, "imbalance": 10}


def balanced_labels(classes: int = 10, per_class: int = 200) -> np.ndarray:
    return np.random.RandomState(7).permutation(np.repeat(np.arange(classes), per_class))


def test_class_counts_cifar10() -> None:
    assert class_counts(500, 100, 10).tolist() == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]


@pytest.mark.parametrize(
    ("largest", "imbalance", "classes", "total"),
    [
        (500, 100, 10, 1236),
        (4000, 100, 10, 9922),
        (1500, 100, 10, 3720),
        (3000, 100, 10, 7443),
        (500, 150, 10, 1162),
        (4000, 150, 10, 9329),
        (1500, 150, 10, 3496),
        (3000, 150, 10, 6996),
        (50, 10, 100, 1911),
        (400, 10, 100, 15651),
        (150, 10, 100, 5835),
        (300, 10, 100, 11720),
        (50, 20, 100, 1545),
        (400, 20, 100, 12719),
        (150, 20, 100, 4741),
        (300, 20, 100, 9527),
        (150, 10, 10, 609),
        (150, 20, 10, 507),
        (450, 10, 10, 1835),
        (450, 20, 10, 1528),
        (500, 100, 100, 10847),
        (500, 50, 100, 12608),
        (500, 10, 100, 19573),
    ],
)
def test_class_counts_totals_of_the_published_settings(
    largest: int, imbalance: int, classes: int, total: int
) -> None:
    assert class_counts(largest, imbalance, classes).sum() == total


@given(
    largest=st.integers(0, 5000),
    imbalance=st.floats(1, 500, allow_nan=False),
    classes=st.integers(1, 200),
)
def test_class_counts_fall_from_head_to_tail(largest: int, imbalance: float, classes: int) -> None:
    counts = class_counts(largest, imbalance, classes)
    assert counts.dtype == np.int64
    assert counts.shape == (classes,)
    assert counts[0] == largest
    assert (np.diff(counts) <= 0).all()
    assert counts[-1] >= 0


@pytest.mark.parametrize("imbalance", [1, 2, 7, 10, 49, 100, 343])
def test_class_counts_keep_whole_numbers(imbalance: int) -> None:
    assert class_counts(imbalance * 3, imbalance, 10)[-1] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 10, 10), "largest must be >= 0, got -1"),
        ((3.5, 10, 10), "largest must be a whole number, got 3.5"),
        ((10, 0.5, 10), "imbalance must be finite and >= 1, got 0.5"),
        ((10, float("nan"), 10), "imbalance must be finite and >= 1, got nan"),
        ((10, 10, 0), "classes must be >= 1, got 0"),
    ],
)
def test_class_counts_errors(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_counts(*arguments)


def test_acr_takes_the_first_images_and_ignores_the_seed() -> None:
    labels = balanced_labels()
    split = make_split(labels, protocol="acr", seed=0, **SIZES)
    other = make_split(labels, protocol="acr", seed=5, **SIZES)
    assert np.array_equal(split.labelled, other.labelled) and np.array_equal(
        split.unlabelled, other.unlabelled
    )
    for k in range(10):
        of_class = np.flatnonzero(labels == k)
        n, m = split.labelled_counts[k], split.unlabelled_counts[k]
        assert np.array_equal(split.labelled[labels[split.labelled] == k], of_class[:n])
        assert np.array_equal(split.unlabelled[labels[split.unlabelled] == k], of_class[: n + m])
    assert np.isin(split.labelled, split.unlabelled).all()
    assert split.unlabelled_is_labelled.sum() == len(split.labelled)
    assert np.array_equal(np.sort(split.unlabelled[split.unlabelled_is_labelled]), np.sort(split.labelled))
    assert split.validation.size == 0


@pytest.mark.parametrize(("protocol", "held_out"), [("daso", 20), ("usb", 0)])
def test_disjoint_protocols(protocol: str, held_out: int) -> None:
    labels = balanced_labels()
    split = make_split(labels, protocol=protocol, seed=3, **SIZES)
    everything = np.concatenate([split.labelled, split.unlabelled, split.validation])
    assert len(np.unique(everything)) == len(everything)
    assert not split.unlabelled_is_labelled.any()
    assert np.bincount(labels[split.validation], minlength=10).tolist() == [held_out] * 10
    assert not np.array_equal(split.labelled, make_split(labels, protocol=protocol, seed=4, **SIZES).labelled)


@settings(max_examples=40, deadline=None)
@given(
    protocol=st.sampled_from(["acr", "daso", "usb"]),
    unlabelled=st.sampled_from(["consistent", "uniform", "reversed"]),
    class_order=st.sampled_from(["index", "shuffled"]),
    classes=st.integers(1, 12),
    labelled_largest=st.integers(1, 30),
    unlabelled_largest=st.integers(0, 60),
    imbalance=st.floats(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_split_properties(
    protocol: str,
    unlabelled: str,
    class_order: str,
    classes: int,
    labelled_largest: int,
    unlabelled_largest: int,
    imbalance: float,
    seed: int,
) -> None:
    labels = balanced_labels(classes, 100)
    arguments = {
        "protocol": protocol,
        "unlabelled": unlabelled,
        "class_order": class_order,
        "labelled_largest": labelled_largest,
        "unlabelled_largest": unlabelled_largest,
        "imbalance": imbalance,
        "seed": seed,
    }
    split, again = make_split(labels, **arguments), make_split(labels, **arguments)
    for part in ("labelled", "unlabelled", "validation", "class_order"):
        assert np.array_equal(getattr(split, part), getattr(again, part))
        assert getattr(split, part).dtype == np.int64
    assert sorted(split.class_order) == list(range(classes))
    assert np.array_equal(np.bincount(labels[split.labelled], minlength=classes), split.labelled_counts)
    fresh = split.unlabelled[~split.unlabelled_is_labelled]
    assert np.array_equal(np.bincount(labels[fresh], minlength=classes), split.unlabelled_counts)
    assert np.array_equal(
        split.labelled_counts[split.class_order], class_counts(labelled_largest, imbalance, classes)
    )
    by_rank = split.unlabelled_counts[split.class_order]
    expected = class_counts(unlabelled_largest, 1 if unlabelled == "uniform" else imbalance, classes)
    assert np.array_equal(by_rank, expected[::-1] if unlabelled == "reversed" else expected)
    assert not np.isin(split.validation, np.concatenate([split.labelled, split.unlabelled])).any()


def test_unlabelled_has_its_own_imbalance() -> None:
    split = make_split(balanced_labels(), unlabelled_imbalance=2, **SIZES)
    assert split.unlabelled_counts.tolist() == class_counts(100, 2, 10).tolist()


def test_shuffled_class_order_follows_the_seed() -> None:
    labels = balanced_labels()
    orders = {
        tuple(make_split(labels, seed=seed, class_order="shuffled", **SIZES).class_order) for seed in range(5)
    }
    assert len(orders) == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"protocol": "crest"}, "protocol must be one of acr, daso, usb, got 'crest'"),
        (
            {"unlabelled": "u-shaped"},
            "unlabelled must be one of consistent, uniform, reversed, got 'u-shaped'",
        ),
        ({"class_order": "size"}, "class_order must be one of index, shuffled, got 'size'"),
        (
            {"labelled_largest": 150},
            r"class 0 needs 250 images \(150 labelled \+ 100 unlabelled \+ 0 validation\), got 200",
        ),
        ({"validation_per_class": 5}, "validation_per_class needs protocol daso, got 5 with protocol acr"),
        ({"protocol": "daso", "validation_per_class": -1}, "validation_per_class must be >= 0, got -1"),
        (
            {"unlabelled": "uniform", "unlabelled_imbalance": 3},
            "must be 1 or None with unlabelled uniform, got 3",
        ),
    ],
)
def test_make_split_errors(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_split(balanced_labels(), **{**SIZES, **changed})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((3, 2), dtype=np.int64), r"1-d integer array, got int64 of shape \(3, 2\)"),
        (np.zeros(3), r"1-d integer array, got float64 of shape \(3,\)"),
        (np.array([0, -1]), "labels must be >= 0, got -1"),
        (np.array([0, 2]), r"every class 0..2 must have images, got none of class 1"),
    ],
)
def test_make_split_refuses_bad_labels(labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_split(labels, **SIZES)


def test_groups() -> None:
    assert groups_by_count(np.array([101, 100, 20, 19, 0])).tolist() == [
        "many",
        "medium",
        "medium",
        "few",
        "few",
    ]
    counts = class_counts(500, 100, 10)
    thirds = ["many"] * 3 + ["medium"] * 4 + ["few"] * 3
    assert groups_by_rank(counts).tolist() == thirds
    assert groups_by_rank(counts[::-1]).tolist() == thirds[::-1]
    assert groups_by_rank(np.full(10, 5)).tolist() == thirds
    assert groups_by_rank(np.array([4])).tolist() == ["medium"]


def test_split_table_lists_the_head_first() -> None:
    labels = balanced_labels()
    names = [f"class {k}" for k in range(10)]
    split = make_split(labels, class_order="shuffled", seed=1, **SIZES)
    rows = split_table(split, labels, names)
    assert [row.name for row in rows] == [names[k] for k in split.class_order]
    assert rows[0] == (split.class_order[0], names[split.class_order[0]], 50, 150, "many")
    assert [row.group for row in rows] == ["many"] * 3 + ["medium"] * 4 + ["few"] * 3
    with pytest.raises(ValueError, match="expected 10 class names, got 3"):
        split_table(split, labels, names[:3])


def test_first_per_class() -> None:
    labels = np.array([2, 0, 2, 0, 0, 2, 4])
    found = first_per_class(labels, np.array([2, 5, 1, 0, 3]))
    assert found.tolist() == [1, 3, 0, 6]
    assert found.dtype == np.int64
    assert first_per_class(labels[:0], np.array([1, 1])).tolist() == []


def test_first_per_class_is_the_labelled_part_of_acr() -> None:
    labels = balanced_labels()
    split = make_split(labels, **SIZES)
    assert np.array_equal(first_per_class(labels, split.labelled_counts), split.labelled)
