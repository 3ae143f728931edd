"""Presets and the checks of the configuration records."""

from __future__ import annotations

import inspect
import math
from dataclasses import FrozenInstanceError, fields

import pytest

from ulfine_fast.config import METHODS, Data, Method, Schedule, method
from ulfine_fast.features import load_features
from ulfine_fast.head import DualHead


def test_presets_are_named_and_described():
    assert list(METHODS) == [
        "zero_shot",
        "linear_probe",
        "linear_probe_la",
        "fixmatch",
        "fixmatch_la",
        "lift",
        "ulfine",
        "ulfine_plus",
    ]
    assert all(preset.summary for preset in METHODS.values())
    assert len({preset.summary for preset in METHODS.values()}) == len(METHODS)
    assert method("ulfine") is METHODS["ulfine"]


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match="method must be one of zero_shot, .*, ulfine_plus, got 'mixmatch'; did you mean fixmatch?",
    ):
        method("mixmatch")


def test_only_methods_with_unlabelled_data_use_it():
    with_unlabelled = {name for name, preset in METHODS.items() if preset.unlabelled_weight > 0}
    assert with_unlabelled == {"fixmatch", "fixmatch_la", "ulfine", "ulfine_plus"}
    assert not METHODS["zero_shot"].trained
    assert METHODS["zero_shot"].eta == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_init": "zeros"}, "linear_init must be text or random, got 'zeros'"),
        (
            {"adjust_unlabelled": "yes"},
            "adjust_unlabelled must be one of none, labelled, kept, both, got 'yes'",
        ),
        ({"orthogonality_weight": -1.0}, "orthogonality_weight must be at least 0, got -1"),
        ({"unlabelled_weight": -0.5}, "unlabelled_weight must be at least 0, got -0.5"),
        ({"scale_rows": -1}, "scale_rows must be at least 0, got -1"),
        ({"loss_on": "both"}, "loss_on must be branches or fused, got 'both'"),
        ({"eta_folds": 1}, "eta_folds must be 0 or at least 2, got 1"),
        ({"eta_folds": -1}, "eta_folds must be at least 0, got -1"),
        ({"eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
        ({"mu": math.nan}, r"mu must be in \[0, 1\], got nan"),
        ({"gamma": 2.0}, r"gamma must be in \[0, 1\], got 2.0"),
        ({"proto_scale": 0.0}, "proto_scale must be above 0, got 0.0"),
        ({"temperature": math.inf}, "temperature must be finite, got inf"),
    ],
)
def test_method_says_what_it_expected(change, message):
    with pytest.raises(ValueError, match=message):
        Method("mine", **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"labelled_batch": 0}, "labelled_batch must be above 0, got 0"),
        ({"unlabelled_batch": -1}, "unlabelled_batch must be at least 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"weight_decay": -1e-4}, "weight_decay must be at least 0, got -0.0001"),
        ({"log_every": 0}, "log_every must be above 0, got 0"),
        ({"optimizer": "adam"}, "optimizer must be sgd or adamw, got 'adam'"),
        ({"learning_rate": math.nan}, "learning_rate must be finite, got nan"),
    ],
)
def test_schedule_says_what_it_expected(change, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imbalance": 0.5}, "imbalance must be at least 1, got 0.5"),
        ({"imbalance": math.inf}, "imbalance must be finite, got inf"),
        ({"seed": 2**32}, r"seed must be below 2\*\*32, got 4294967296"),
        ({"size": 100}, "size must be a positive multiple of 32, got 100"),
        ({"weak_copies": 0}, "weak_copies must be at least 1, got 0"),
    ],
)
def test_data_says_what_it_expected(change, message):
    with pytest.raises(ValueError, match=message):
        Data(**change)


def test_records_are_frozen():
    for record, name in ((METHODS["ulfine"], "mu"), (Schedule(), "steps"), (Data(), "seed")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, 1)


def test_fields_are_those_of_what_they_configure():
    options = inspect.signature(load_features).parameters
    assert {field.name for field in fields(Data)} - {"dataset"} <= set(options)
    head = inspect.signature(DualHead).parameters
    shared = {"eta", "linear_scale", "proto_scale", "normalize_linear", "loss_on"}
    assert shared <= {field.name for field in fields(Method)} & set(head)
