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
    providers, losses, grads = {}, {}, {}
    for name, step in steps().items():
        inputs = step_inputs(shape)
        learned = inputs.rows, inputs.linear, inputs.textual

        def run(step=step, inputs=inputs, learned=learned):
            for tensor in learned:
                tensor.grad = None
            return step(inputs, loss_on)

        losses[name] = run().item()
        grads[name] = [tensor.grad.clone() for tensor in learned]
        providers[name] = run
    for name in providers:
        # What is faster must be the same function.
        assert losses[name] == pytest.approx(losses["fused"], rel=1e-4)
        for ours, theirs in zip(grads["fused"], grads[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4 * float(ours.abs().max()))
    inputs = step_inputs(shape)
    kept = pseudo_label(
        inputs.weak, inputs.linear, inputs.textual, inputs.threshold, align=ALIGN, eta=ETA
    ).keep
    compare("head step", shape, providers, loss_on=loss_on, keep_rate=f"{kept.float().mean():.0%}")
