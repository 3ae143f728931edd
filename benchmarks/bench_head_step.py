"""The whole head step, forward, backward and state update, against both families of baselines."""

from __future__ import annotations

import pytest
import torch
from baselines import steps
from shapes import ALIGN, ETA, SHAPES, step_inputs

from ulfine_fast.ops import pseudo_label


@pytest.mark.parametrize("loss_on", ["fused", "branches"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_head_step(compare, shape, loss_on):
    torch.compiler.reset()
    start = step_inputs(shape)
    inputs = {name: step_inputs(shape) for name in steps()}
    state = ("textual", "visual", "seen", "distribution")

    def reset(name):
        # A step moves the prototypes, and with them the share of kept rows.
        with torch.no_grad():
            for field in state:
                getattr(inputs[name], field).copy_(getattr(start, field))
            for field in ("rows", "linear", "textual"):
                getattr(inputs[name], field).grad = None

    def provider(name, step):
        def run():
            s = inputs[name]
            loss = step(s, loss_on)
            return loss, s.rows.grad, s.linear.grad, s.textual.grad, *(getattr(s, field) for field in state)

        return run

    kept = pseudo_label(start.weak, start.linear, start.textual, start.threshold, align=ALIGN, eta=ETA).keep
    assert 0.45 < kept.float().mean() < 0.55
    providers = {name: provider(name, step) for name, step in steps().items()}
    compare("head step", shape, providers, reset, loss_on=loss_on, keep_rate=f"{kept.float().mean():.0%}")
