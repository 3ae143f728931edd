"""Presets and the checks of the configuration records."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest

from ulfine_fast.config import (
    CACHED,
    LABELLED_LOSSES,
    METHODS,
    PRESETS,
    Images,
    Method,
    Training,
    training_of,
)
from ulfine_fast.losses import LOSSES


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
def test_training_says_what_it_expected(change, message):
    with pytest.raises(ValueError, match=message):
        Training(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imbalance": 0.5}, "imbalance must be at least 1, got 0.5"),
        ({"imbalance": math.inf}, "imbalance must be finite, got inf"),
        ({"seed": 2**32}, r"seed must be below 2\*\*32, got 4294967296"),
        ({"labelled": "photos"}, "got a data set and folders"),
        ({"root": "photos"}, "root must be None with a data set, got 'photos'"),
    ],
)
def test_images_say_what_it_expected(change, message):
    with pytest.raises(ValueError, match=message):
        Images(**{"dataset": "cifar10", **change})


def test_records_are_frozen():
    for record, name in (
        (METHODS["ulfine"], "mu"),
        (Training(), "steps"),
        (Images(features="mine.npz"), "seed"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, 1)


def test_labelled_losses_are_those_that_there_are():
    assert tuple(LOSSES) == LABELLED_LOSSES


def test_what_is_given_goes_before_the_preset_and_a_frozen_encoder_has_one_setting():
    assert training_of("lift_plus", {}) == Training(**PRESETS["lift_plus"].training)
    assert training_of("lift_plus", {"learning_rate": 0.5}).learning_rate == 0.5
    assert training_of("lift_plus", {"tuning": "none"}) == Training(**CACHED)
    assert training_of("lift_plus", {"tuning": "none", "steps": 7}).steps == 7
    assert training_of("zero_shot", {"tuning": "none"}).steps == 0
