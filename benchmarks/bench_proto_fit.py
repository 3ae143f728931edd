"""`proto_fit_`, the update of all prototypes and of P_u in place."""

from __future__ import annotations

import pytest
import torch
from baselines import fused_update, sparse_update, update
from shapes import SHAPES, step_inputs


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_proto_fit(compare, shape):
    torch.compiler.reset()
    functions = {
        "fused": fused_update,
        "naive eager": update,
        "naive compiled": torch.compile(update, fullgraph=True),
        "smart eager": sparse_update,
    }
    s = step_inputs(shape)
    start = [t.detach().clone() for t in (s.textual, s.visual, s.seen, s.distribution)]
    states = {name: [t.clone() for t in start] for name in functions}
    features, histogram = s.rows.detach()[: s.labelled], torch.ones(shape.classes)

    def reset(name):
        for tensor, value in zip(states[name], start, strict=True):
            tensor.copy_(value)

    def provider(name, function):
        def run():
            function(features, s.targets, histogram, *states[name])
            return states[name]

        return run

    providers = {name: provider(name, function) for name, function in functions.items()}
    compare("proto_fit", shape, providers, reset, rows=shape.labelled)
