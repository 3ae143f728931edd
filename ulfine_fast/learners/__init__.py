"""Methods of long-tailed semi-supervised learning, beside the encoder: `LEARNERS` by name, `build_learner`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ulfine_fast.config import METHODS, PRESETS, Method
from ulfine_fast.learners.acr import Acr, AcrConfig
from ulfine_fast.learners.ccl import Ccl, CclConfig
from ulfine_fast.learners.daso import Daso, DasoConfig
from ulfine_fast.learners.dual import Dual
from ulfine_fast.learners.finessl import FineSsl, FineSslConfig
from ulfine_fast.learners.freematch import FreeMatch, FreeMatchConfig
from ulfine_fast.learners.learner import Config, Learner, Pseudo
from ulfine_fast.learners.loft import Loft, LoftConfig
from ulfine_fast.ops import _checks
from ulfine_fast.options import one_of, options_of

__all__ = ["LEARNERS", "Config", "Learner", "Pseudo", "build_learner", "changed_method"]

LEARNERS: dict[str, Method | Config] = {
    **METHODS,
    "freematch": FreeMatchConfig(),
    "daso": DasoConfig(),
    "acr": AcrConfig(),
    "ccl": CclConfig(),
    "finessl": FineSslConfig(),
    "loft": LoftConfig(),
}

_LEARNER_OF: dict[type, type[Learner]] = {
    Method: Dual,
    FreeMatchConfig: FreeMatch,
    DasoConfig: Daso,
    AcrConfig: Acr,
    CclConfig: Ccl,
    FineSslConfig: FineSsl,
    LoftConfig: Loft,
}


def changed_method(name: str, settings: Mapping[str, Any]) -> Method | Config:
    """The method of the preset `name` with other settings, values by field; given an eta, none is chosen.

    Raises ValueError for an unknown preset or field, and for a value that does not fit.
    """
    if name not in PRESETS:
        raise ValueError(f"method must be {one_of(PRESETS, name)}")
    config = LEARNERS[PRESETS[name].learner]
    known = options_of(type(config))
    for field in settings:
        if field not in known:
            raise ValueError(f"settings must be among the fields of {name}: {one_of(known, field)}")
    chosen = {"eta_folds": 0} if "eta" in settings and "eta_folds" in known else {}
    return replace(config, **{**chosen, **settings})


def build_learner(
    method: str | Method | Config, prototypes: Tensor, labelled_counts: Tensor, *, seed: int
) -> Learner:
    """The learner of a method, on the device of the prototypes.

    Args:
        method: a name of `LEARNERS`, or a config such as `dataclasses.replace` makes of one.
        prototypes: [C, D] float text features of the classes, of any norm; heads start from them.
        labelled_counts: [C] int64 labelled images of each class in the training set, not all 0.
        seed: of a random start, where the method has one.

    Raises ValueError or TypeError for an argument that is not as said, or an eta that is still to be chosen.
    """
    if isinstance(method, str):
        if method not in LEARNERS:
            raise ValueError(f"build_learner: method must be {one_of(LEARNERS, method)}")
        method = LEARNERS[method]
    _checks.matrix("build_learner", "prototypes", prototypes)
    _checks.vector("build_learner", "labelled_counts", labelled_counts, len(prototypes), (torch.int64,))
    if bool((labelled_counts < 0).any()) or not bool(labelled_counts.any()):
        raise ValueError(
            "build_learner: labelled_counts must be at least 0 and not all 0, "
            f"got a smallest of {int(labelled_counts.min())} and a sum of {int(labelled_counts.sum())}"
        )
    if type(method) not in _LEARNER_OF:
        raise TypeError(
            f"build_learner: method must be a name or a learner's config, got {type(method).__name__}"
        )
    learner = _LEARNER_OF[type(method)](method, prototypes, labelled_counts.to(prototypes.device), seed=seed)
    return learner.to(prototypes.device)
