"""`dual_cross_entropy`, forward and backward to features and linear bank, half of the strong rows kept."""

from __future__ import annotations

import pytest
import torch
from shapes import ALIGN, ETA, SCALE, SHAPES, step_inputs
from torch.nn import functional as F

from ulfine_fast.ops import dual_cross_entropy


def plain(features, linear, textual, targets, weights, loss_on):
    x, t = F.normalize(features, dim=-1), F.normalize(textual, dim=-1)
    zl, zt = SCALE * F.linear(x, F.normalize(linear, dim=-1)), SCALE * F.linear(x, t)
    z = (ETA * zl + (1 - ETA) * ALIGN * zt,) if loss_on == "fused" else (zl, zt)
    return sum((F.cross_entropy(b, targets, reduction="none") * weights).sum() for b in z)


def folded(features, linear, textual, targets, weights, loss_on):
    x, w, t = (F.normalize(rows, dim=-1) for rows in (features, linear, textual))
    if loss_on == "fused":
        z = F.linear(x, ETA * SCALE * w + (1 - ETA) * ALIGN * SCALE * t)
        return (F.cross_entropy(z, targets, reduction="none") * weights).sum()
    z = SCALE * F.linear(x, torch.cat([w, t])).view(2 * len(x), len(w))
    rows = F.cross_entropy(z, targets.repeat_interleave(2), reduction="none").view(-1, 2).sum(-1)
    return (rows * weights).sum()


def dropped(features, linear, textual, targets, weights, loss_on):
    used = weights.nonzero().squeeze(-1)
    return folded(features[used], linear, textual, targets[used], weights[used], loss_on)


def fused(features, linear, textual, targets, weights, loss_on):
    return dual_cross_entropy(
        features, targets, linear, textual, weights, align=ALIGN, eta=ETA, linear_scale=SCALE,
        proto_scale=SCALE, loss_on=loss_on,
    )  # fmt: skip


@pytest.mark.parametrize("loss_on", ["fused", "branches"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_dual_cross_entropy(compare, shape, loss_on):
    torch.compiler.reset()
    s = step_inputs(shape)
    generator = torch.Generator().manual_seed(1)
    rows = len(s.rows)
    targets = torch.randint(shape.classes, (rows,), generator=generator)
    keep = torch.arange(shape.unlabelled) % 2
    weights = torch.cat([torch.full((shape.labelled,), 1 / shape.labelled), keep / shape.unlabelled])
    textual = s.textual.detach()

    def both(function):
        def run():
            s.rows.grad = s.linear.grad = None
            loss = function(s.rows, s.linear, textual, targets, weights, loss_on)
            loss.backward()
            return loss, s.rows.grad, s.linear.grad

        return run

    compare(
        "dual_cross_entropy",
        shape,
        {
            "fused": both(fused),
            "naive eager": both(plain),
            "naive compiled": both(torch.compile(plain, fullgraph=True)),
            "smart eager": both(dropped),
            "smart compiled": both(torch.compile(folded, fullgraph=True)),
        },
        loss_on=loss_on,
        keep_rate="50%",
    )
