"""`orthogonality`, value and gradient: the C x C Gram matrix of the paper, the smaller one, and fused."""

from __future__ import annotations

import pytest
import torch
from shapes import SHAPES, step_inputs
from torch.nn import functional as F

from ulfine_fast.ops import orthogonality


def naive(prototypes):
    unit = F.normalize(prototypes, dim=-1)
    gram = unit @ unit.T
    classes = len(unit)
    return (gram.square().sum() - gram.diagonal().square().sum()) / (classes * (classes - 1))


def smart(prototypes):
    unit = F.normalize(prototypes, dim=-1)
    classes, dim = unit.shape
    gram = unit @ unit.T if classes <= dim else unit.T @ unit
    return (gram.square().sum() - classes) / (classes * (classes - 1))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_orthogonality(compare, shape):
    torch.compiler.reset()
    prototypes = step_inputs(shape).textual

    def both(function):
        def run():
            prototypes.grad = None
            value = function(prototypes)
            value.backward()
            return value, prototypes.grad

        return run

    compare(
        "orthogonality",
        shape,
        {
            "fused": both(orthogonality),
            "naive eager": both(naive),
            "naive compiled": both(torch.compile(naive, fullgraph=True)),
            "smart eager": both(smart),
            "smart compiled": both(torch.compile(smart, fullgraph=True)),
        },
    )
