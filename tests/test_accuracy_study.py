"""The study's engine against the library's trainer: two implementations of the same presets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from synthetic import cached_run, small_data

from ulfine_fast.config import METHODS, Training
from ulfine_fast.validation import choose_eta, settle_eta

STUDY = Path(__file__).parents[1] / "benchmarks" / "accuracy"


@pytest.fixture
def engine(monkeypatch):
    """The module `engine` of the study, whose folder is not a package."""
    monkeypatch.syspath_prepend(str(STUDY))
    before = set(sys.modules)
    import engine

    yield engine
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == STUDY:
            del sys.modules[name]


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_gives_the_same_logits_as_in_the_trainer(engine, name):
    data = small_data()
    schedule = Training(steps=30, labelled_batch=16, unlabelled_batch=24, log_every=30, seed=3)
    method = settle_eta(data.labelled, data.labels, data.prototypes, METHODS[name], schedule)
    head = cached_run(method, schedule, data)[0].head
    got = engine.train(data, engine.recipe(name), schedule).logits
    expected = head(data.test)
    assert head.linear.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_both_choose_eta_by_the_same_losses(engine):
    data, schedule = small_data(), Training(labelled_batch=16, seed=3)
    expected = choose_eta(data.labelled, data.labels, data.prototypes, METHODS["ulfine_plus"], schedule)
    assert engine.held_out_losses(data, engine.recipe("ulfine_plus"), schedule) == pytest.approx(
        expected, rel=1e-4
    )


def test_a_recipe_without_changes_is_the_preset(engine):
    for name, method in METHODS.items():
        recipe = engine.recipe(name)
        for field in (
            "eta",
            "threshold",
            "eta_folds",
            "fitting",
            "mu",
            "prior_shift",
            "orthogonality_weight",
        ):
            assert getattr(recipe, field) == getattr(method, field)
