"""The estimator: scikit-learn's rules, unlabelled rows, and what it is for."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.base import clone, is_classifier
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from ulfine_fast import LongTailClassifier
from ulfine_fast.config import PRESETS

QUICK = {"steps": 60, "settings": {"eta": 0.5}}
FAILED = {"check_classifiers_classes": "one of its classes is called -1, which marks rows without a label"}


@parametrize_with_checks([LongTailClassifier(**QUICK)], expected_failed_checks=lambda _: FAILED)
# of checks that are skipped, and of rows that scikit-learn itself divides
@pytest.mark.filterwarnings("ignore")
def test_the_rules_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    """Training rows, their labels, 60 to 3 of a class and -1 for the rest, and test rows with theirs."""
    rows, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(0)
    test, rest = np.split(random.permutation(len(rows)), [600])
    known = np.full(len(rest), -1)
    for label, count in zip(random.permutation(10), np.geomspace(60, 3, 10).round().astype(int), strict=True):
        known[np.flatnonzero(labels[rest] == label)[:count]] = label
    return rows[rest], known, rows[test], labels[test]


def test_digits_with_three_labels_of_a_class(digits):
    rows, labels, test, truth = digits
    labelled = labels >= 0
    plain = LogisticRegression(max_iter=2000).fit(rows[labelled] / 16, labels[labelled])
    ours = LongTailClassifier().fit(rows, labels)
    assert balanced_accuracy_score(truth, plain.predict(test / 16)) < 0.84
    assert balanced_accuracy_score(truth, ours.predict(test)) > 0.87


def blobs(rows=90, classes=3, seed=0):
    random = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    return 3 * np.eye(classes, 8)[labels] + random.normal(0, 0.5, (rows, 8)) + 5, labels


def test_labels_of_any_kind_beside_unlabelled_rows():
    rows, labels = blobs()
    names = np.array(["ant", "bee", "cat"])[labels]
    some = np.where(np.arange(len(rows)) < 12, names.astype(object), -1)
    numbers = np.where(np.arange(len(rows)) < 12, labels, -1)
    by_name, by_number = (LongTailClassifier(**QUICK).fit(rows, y) for y in (some, numbers))
    assert by_name.classes_.tolist() == ["ant", "bee", "cat"]
    assert by_name.score(rows, names) == by_number.score(rows, labels) == 1
    assert np.array_equal(by_name.predict_proba(rows), by_number.predict_proba(rows))
    logits = by_name.decision_function(rows)
    assert np.allclose(torch.tensor(logits).softmax(-1).numpy(), by_name.predict_proba(rows))
    assert by_name.n_features_in_ == 8


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_learns(method):
    rows, labels = blobs(classes=2)
    known = np.where(np.arange(len(rows)) < 12, labels, -1)
    fitted = LongTailClassifier(method, steps=0 if method == "zero_shot" else 40).fit(rows, known)
    assert fitted.score(rows, labels) == 1
    assert ((fitted.decision_function(rows) > 0) == (labels == 1)).all()


def test_a_fitted_estimator_is_cloned_pickled_and_searched():
    rows, labels = blobs()
    fitted = LongTailClassifier(random_state=3, strong_noise=0.2, **QUICK).fit(rows, labels)
    again = clone(fitted).fit(rows, labels)
    kept = pickle.loads(pickle.dumps(fitted))
    for other in (again, kept):
        assert np.array_equal(other.predict_proba(rows), fitted.predict_proba(rows))
    assert is_classifier(fitted)
    assert cross_val_score(LongTailClassifier(**QUICK), rows, labels, cv=3).min() == 1


def test_prototypes_and_centre_are_as_given():
    rows, labels = blobs()
    prototypes = np.eye(3, 8)
    at_start = LongTailClassifier("zero_shot", prototypes=prototypes, centre=False, steps=0).fit(rows, labels)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.array_equal(at_start.predict(rows), (unit @ prototypes.T).argmax(1))
    assert not at_start.centre_.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ulfin"}, "method must be one of .*, got 'ulfin'; did you mean ulfine"),
        ({"settings": {"muu": 1}}, "settings must be among the fields of ulfine_plus: one of .*, got 'muu'"),
        ({"strong_noise": -1.0}, "strong_noise must be at least 0, got -1.0"),
        ({"prototypes": np.eye(3)}, r"prototypes must be \[C, D\] = \[3, 8\], got \[3, 3\]"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        LongTailClassifier(**options).fit(*blobs())


def test_one_class_is_no_classification():
    rows, labels = blobs()
    with pytest.raises(ValueError, match="y must have labels of at least two classes, got 1 class"):
        LongTailClassifier().fit(rows, np.where(labels == 0, 0, -1))
