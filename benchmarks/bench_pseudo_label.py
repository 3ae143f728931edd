"""`pseudo_label` of the weak rows: two branches as the formulas stand, folded by hand, and fused."""

from __future__ import annotations

import pytest
import torch
from shapes import ALIGN, ETA, SCALE, SCALE_ROWS, SHAPES, step_inputs
from torch.nn import functional as F

from ulfine_fast.ops import pseudo_label


def _labels(z, threshold):
    top, label = z.max(-1)
    confidence = (top - z.logsumexp(-1)).exp()
    ones = torch.ones(len(z), device=z.device)
    histogram = torch.zeros(z.shape[1], device=z.device).index_add_(0, label, ones)
    return label, confidence, confidence >= threshold, histogram


def naive(weak, linear, textual, threshold, scale=SCALE):
    x = F.normalize(weak, dim=-1)
    zl, zt = (scale * F.linear(x, F.normalize(bank, dim=-1)) for bank in (linear, textual))
    scales = torch.stack([z[:SCALE_ROWS].std(-1, correction=0).mean() for z in (zl, zt)])
    return *_labels(ETA * zl + (1 - ETA) * ALIGN * zt, threshold), scales


def smart(weak, linear, textual, threshold):
    x, w, t = (F.normalize(rows, dim=-1) for rows in (weak, linear, textual))
    z = F.linear(x, ETA * SCALE * w + (1 - ETA) * ALIGN * SCALE * t)
    scales = torch.stack(
        [(SCALE * F.linear(x[:SCALE_ROWS], bank)).std(-1, correction=0).mean() for bank in (w, t)]
    )
    return *_labels(z, threshold), scales


def fused(weak, linear, textual, threshold):
    pseudo = pseudo_label(
        weak, linear, textual, threshold, align=ALIGN, eta=ETA, linear_scale=SCALE, proto_scale=SCALE,
        scale_rows=SCALE_ROWS,
    )  # fmt: skip
    return pseudo.label, pseudo.confidence, pseudo.keep, pseudo.histogram, pseudo.branch_scale


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_pseudo_label(compare, shape):
    torch.compiler.reset()
    s = step_inputs(shape)
    arguments = s.weak, s.linear.detach(), s.textual.detach(), s.threshold
    functions = {
        "fused": fused,
        "naive eager": naive,
        "naive compiled": torch.compile(naive, fullgraph=True),
        "smart eager": smart,
        "smart compiled": torch.compile(smart, fullgraph=True),
    }
    with torch.no_grad():
        compare(
            "pseudo_label",
            shape,
            {name: lambda f=f: f(*arguments) for name, f in functions.items()},
            rows=len(s.weak),
        )
