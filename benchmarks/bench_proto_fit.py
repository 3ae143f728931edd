"""`proto_fit_`, the update of all prototypes and of P_u in place."""

from __future__ import annotations

import pytest
import torch
from baselines import update
from shapes import BETA, GAMMA, MU, SHAPES, step_inputs

from ulfine_fast.ops import proto_fit_


def fused(features, targets, histogram, textual, visual, seen, distribution):
    proto_fit_(
        features, targets, histogram, textual, visual, seen, distribution, mu=MU, beta=BETA, gamma=GAMMA
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_proto_fit(compare, shape):
    torch.compiler.reset()
    providers = {}
    for name, function in {
        "fused": fused,
        "eager": update,
        "compiled": torch.compile(update, fullgraph=True),
    }.items():
        s = step_inputs(shape)
        state = [t.detach().clone() for t in (s.textual, s.visual, s.seen, s.distribution)]
        features, histogram = s.rows.detach()[: s.labelled], torch.ones(shape.classes)
        providers[name] = lambda f=function, a=(features, s.targets, histogram, *state): f(*a)
    compare("proto_fit", shape, providers, rows=shape.labelled)
