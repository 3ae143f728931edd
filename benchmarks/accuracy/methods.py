"""The methods of the study: for each the configurations that development chooses among.

A name in `SWEEPS` is a row of the final table. A configuration is a classifier of `closed.py` by name with its
options, or a preset with the changes that make a `Recipe`. "Style" means: the idea of the paper inside this engine,
on one frozen feature space, with the head and the logit adjustment that all share.
"""

from __future__ import annotations

from itertools import product
from typing import Any

Configuration = dict[str, Any]


def grid(preset: str, fixed: Configuration | None = None, **choices: list[Any]) -> list[Configuration]:
    """Every combination of `choices` on top of `fixed`."""
    return [
        {"preset": preset, **(fixed or {}), **dict(zip(choices, values, strict=True))}
        for values in product(*choices.values())
    ]


# Pseudo-labels on a text-initialised, logit-adjusted cosine head: what the semi-supervised baselines share.
SEMI = {"unlabelled_weight": 1.0}
RATES = [0.003, 0.01, 0.03]

BASELINES: dict[str, list[Configuration]] = {
    "zero_shot": grid("zero_shot"),
    "linear_probe_la": grid("linear_probe_la", learning_rate=RATES, adjust_labelled=[1.0, 1.5]),
    "lift": grid("lift", learning_rate=RATES, linear_scale=[15.0, 25.0, 40.0]),
    "lift_tte": grid("lift_tte", learning_rate=RATES, linear_scale=[15.0, 25.0]),
    "tip_adapter": grid("tip_adapter", alpha=[1.0, 3.0, 10.0], beta=[1.0, 5.0]),
    "discriminant": grid("discriminant", shrinkage=[1.0, 3.0, 10.0], alpha=[0.0, 1.0, 3.0]),
    "gla": grid("gla", scale=[12.5, 25.0, 50.0], linear_scale=[15.0, 25.0]),
    "fixmatch_la": grid("lift", SEMI, threshold=[0.7, 0.95], adjust_unlabelled=["none", "labelled", "kept"]),
    "freematch": grid("lift", {**SEMI, "thresholds": "class"}, adjust_unlabelled=["none", "kept"], linear_scale=[15.0, 25.0]),
    "daso_style": grid("lift", {**SEMI, "semantic": True}, threshold=[0.7, 0.95], adjust_unlabelled=["none", "kept"]),
    "acr_style": grid("lift", {**SEMI, "adjust_unlabelled": "kept"}, threshold=[0.6, 0.8], unlabelled_weight=[0.5, 1.0, 2.0]),
    "ccl_style": grid("lift", {**SEMI, "prior_shift": 1.0, "soft_prior": True, "adjust_unlabelled": "kept"}, threshold=[0.7, 0.95], smooth_rejected=[0.0, 0.3]),
    "finessl_style": grid("lift", {**SEMI, "soft": True, "threshold": 0.0}, adjust_unlabelled=["none", "kept"], temperature=[0.5, 1.0]),
    "loft_style": grid("lift", {**SEMI, "smooth_rejected": 1.0}, threshold=[0.7, 0.95], adjust_unlabelled=["none", "kept"]),
}  # fmt: skip
PLUS = {"fitting": "posterior", "orthogonality_weight": 0.0, "eta_folds": 3}
CHOSEN = {"preset": "ulfine", **PLUS, "adjust_unlabelled": "both", "threshold": 0.8}
ADJUSTMENTS = ["both", "labelled", "kept"]
OURS: dict[str, list[Configuration]] = {
    "ulfine": grid("ulfine", threshold=[0.7, 0.95], mu=[0.002, 0.05, 0.2]),
    "ulfine_plus": grid("ulfine", PLUS, prior_shift=[0.0, 1.0], adjust_unlabelled=ADJUSTMENTS, threshold=[0.7, 0.8])
    + grid("ulfine", {**PLUS, "adjust_unlabelled": "both"}, strength=[4.0, 64.0]),
    # What development chose, tested on three views.
    "ulfine_plus_tte": [{**CHOSEN, "preset": "ulfine_tte"}],
}  # fmt: skip
SWEEPS = {**BASELINES, **OURS}

STEPS = {"preset": "ulfine", "adjust_unlabelled": "kept"}
# One choice changed at a time. The first group starts from `ulfine_plus`, the second from `ulfine` with strong rows
# adjusted by the prior of the kept pseudo-labels; the third are bounds, which see the truth.
ABLATIONS: dict[str, Configuration] = {
    "ulfine_plus": CHOSEN,
    "eta .1": {**CHOSEN, "eta_folds": 0, "eta": 0.1},
    "eta .3": {**CHOSEN, "eta_folds": 0, "eta": 0.3},
    "eta .5": {**CHOSEN, "eta_folds": 0, "eta": 0.5},
    "eta .7": {**CHOSEN, "eta_folds": 0, "eta": 0.7},
    "eta .9": {**CHOSEN, "eta_folds": 0, "eta": 0.9},
    "linear branch alone": {**CHOSEN, "eta_folds": 0, "eta": 1.0},
    "fitting: steps of mu .05": {**CHOSEN, "fitting": "compounding", "mu": 0.05},
    "fitting: none, static text": {**CHOSEN, "fitting": "compounding", "mu": 0.0},
    "fitting: labelled means alone": {**CHOSEN, "unlabelled_mass": 0.0},
    "fitting: exact class means": {**CHOSEN, "exact_means": True},
    "fitting: text worth 4": {**CHOSEN, "strength": 4.0},
    "fitting: text worth 64": {**CHOSEN, "strength": 64.0},
    "prior of weak rows: estimated": {**CHOSEN, "prior_shift": 1.0},
    "prior of weak rows: half": {**CHOSEN, "prior_shift": 0.5},
    "prior of weak rows: mean softmax": {**CHOSEN, "prior_shift": 1.0, "soft_prior": True},
    "strong rows: not adjusted": {**CHOSEN, "adjust_unlabelled": "none"},
    "strong rows: kept prior": {**CHOSEN, "adjust_unlabelled": "kept"},
    "strong rows: labelled prior": {**CHOSEN, "adjust_unlabelled": "labelled"},
    "loss on the branches": {**CHOSEN, "loss_on": "branches"},
    "predict by the prototypes": {**CHOSEN, "predict_eta": 0.0},
    "predict by the linear branch": {**CHOSEN, "predict_eta": 1.0},
    "fusion by class": {**CHOSEN, "fusion": "class"},
    "fusion by entropy": {**CHOSEN, "fusion": "entropy"},
    "no alignment": {**CHOSEN, "alignment": "none"},
    "alignment of every row": {**CHOSEN, "alignment": "row"},
    "weak view: mean of two": {**CHOSEN, "weak_view": "mean"},
    "soft targets": {**CHOSEN, "soft": True},
    "thresholds by class": {**CHOSEN, "thresholds": "class"},
    "threshold .5": {**CHOSEN, "threshold": 0.5},
    "threshold .7": {**CHOSEN, "threshold": 0.7},
    "threshold .95": {**CHOSEN, "threshold": 0.95},
    "temperature .5": {**CHOSEN, "temperature": 0.5},
    "temperature 2": {**CHOSEN, "temperature": 2.0},
    "unlabelled weight .5": {**CHOSEN, "unlabelled_weight": 0.5},
    "unlabelled weight 2": {**CHOSEN, "unlabelled_weight": 2.0},
    "ramp over half the steps": {**CHOSEN, "ramp": 0.5},
    "warm-up of a quarter": {**CHOSEN, "warm_up": 0.25},
    "start from posterior means": {**CHOSEN, "start": "posterior"},
    "no unlabelled loss": {**CHOSEN, "unlabelled_weight": 0.0},
    "tested on three views": {**CHOSEN, "preset": "ulfine_tte"},
    "ulfine, adjusted": STEPS,
    "alpha: constant": {**STEPS, "confidence": "constant"},
    "alpha: kept": {**STEPS, "estimate": "kept"},
    "alpha: mean softmax": {**STEPS, "estimate": "probabilities"},
    "anchored to the text": {**STEPS, "anchored": True, "mu": 0.5},
    "mu .05": {**STEPS, "mu": 0.05},
    "mu .002": {**STEPS, "mu": 0.002},
    "orthogonality 0": {**STEPS, "orthogonality_weight": 0.0},
    "orthogonality 10": {**STEPS, "orthogonality_weight": 10.0},
    "orthogonality: distance from I": {**STEPS, "orthogonality": "frobenius"},
    "true prior of weak rows": {**CHOSEN, "prior_shift": 1.0, "estimate": "truth"},
    "true labels of kept rows": {**CHOSEN, "oracle": True},
    "true labels, all kept": {**CHOSEN, "oracle": True, "threshold": 0.0},
}
