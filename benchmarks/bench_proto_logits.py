"""`proto_logits`, forward and backward, against the same formula in PyTorch."""

from __future__ import annotations

import pytest
import torch
from shapes import SCALE, SHAPES, step_inputs
from torch.nn import functional as F

from ulfine_fast.ops import proto_logits


def plain(features, prototypes):
    return SCALE * F.linear(F.normalize(features, dim=-1), F.normalize(prototypes, dim=-1))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_proto_logits(compare, shape):
    torch.compiler.reset()
    inputs = step_inputs(shape)
    grad = torch.randn(len(inputs.rows), shape.classes)

    def both(function):
        def run():
            inputs.rows.grad = inputs.textual.grad = None
            logits = function(inputs.rows, inputs.textual)
            logits.backward(grad)
            return logits, inputs.rows.grad, inputs.textual.grad

        return run

    compare(
        "proto_logits",
        shape,
        {
            "fused": both(lambda features, prototypes: proto_logits(features, prototypes, SCALE)),
            "eager": both(plain),
            "compiled": both(torch.compile(plain, fullgraph=True)),
        },
        rows=len(inputs.rows),
    )
