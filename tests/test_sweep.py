"""Random calls of every op, extreme rows among them, against the reference in float64: one rule for all back ends."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tolerances import BAND, seeded

from ulfine_fast import dual_cross_entropy, head_loss, orthogonality, proto_fit, proto_logits, pseudo_label
from ulfine_fast.ops.pseudo_label import dual_logits_reference, fuse_logits_reference

# The emulator runs one thread after the other.
CALLS = {"reference": 40, "cpp": 40, "cuda": 10}
pytestmark = pytest.mark.parametrize("backend", CALLS)
NORMS = (0.0, 1e-20, 1e-5, 0.3, 1.0, 1.0, 7.0, 1e15, 1e18)
SCALE = 25.0


class Draw:
    """One call's random choices."""

    def __init__(self, *seed: int) -> None:
        self.generator = seeded(*seed)
        self.of = random.Random(str(seed)).choice
        self.rows, self.classes, self.dim = (
            self.of((0, 1, 7, 40)),
            self.of((1, 2, 5, 19)),
            self.of((0, 1, 3, 17)),
        )

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator)

    def features(self, rows: int) -> torch.Tensor:
        made = self.normal(rows, self.dim) * torch.tensor([self.of(NORMS) for _ in range(rows)])[:, None]
        if rows > 1 and self.dim and self.of((True, False)):
            made[self.of(range(rows)), self.of(range(self.dim))] = self.of((math.nan, math.inf, -math.inf))
        return made

    def bank(self) -> torch.Tensor:
        norms = torch.tensor([self.of((0.5, 1.0, 1.0, 2.0)) for _ in range(self.classes)])
        norms[0] = self.of(NORMS)
        return self.normal(self.classes, self.dim) * norms[:, None]

    def adjustment(self) -> torch.Tensor | None:
        made = self.normal(self.classes)
        left_out = self.of((0.0, 0.3, 1.0))
        made[torch.rand(self.classes, generator=self.generator) < left_out] = -math.inf
        return self.of((None, made, made))

    def targets(self, rows: int) -> torch.Tensor:
        return torch.randint(-1, self.classes, (rows,), generator=self.generator)

    def fusion(self) -> dict[str, float]:
        return {"eta": self.of((0.0, 0.3, 0.999, 1.0)), "align": self.of((0.0, 1.0, 3.0))}


def draws(backend: str, op: int) -> list[Draw]:
    return [Draw(op, number) for number in range(CALLS[backend])]


def wide(value: object) -> object:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def called(function, learned: dict, fixed: dict, backend: str) -> tuple[torch.Tensor, ...]:
    """Value and gradients for what is learned."""
    learned = {name: value.detach().clone().requires_grad_() for name, value in learned.items()}
    out = function(**learned, **fixed, backend=backend)
    value = out[0] if isinstance(out, tuple) else out
    return value.detach(), *torch.autograd.grad(value.sum(), learned.values())


def assert_follows(function, learned: dict, fixed: dict, backend: str, size: float) -> None:
    """Hold value and gradients to the reference in float64; `size` is that of the terms that they sum."""
    got = called(function, learned, fixed, backend)
    exact = called(
        function, *({k: wide(v) for k, v in given.items()} for given in (learned, fixed)), "reference"
    )
    close = {"rtol": 1e-3, "atol": 2e-6 * size, "equal_nan": True}
    torch.testing.assert_close(got[0].double(), exact[0], **close)
    for one, other, rows in zip(got[1:], exact[1:], learned.values(), strict=True):
        # The gradient of a row has one over its norm.
        norm = rows.double().norm(dim=-1, keepdim=True)
        norm = torch.where(norm.isfinite() & (norm > 0), norm, 1.0)
        torch.testing.assert_close(one.double() * norm, other * norm, **close)


def test_proto_logits(backend) -> None:
    for draw in draws(backend, 1):
        learned = {"features": draw.features(draw.rows), "prototypes": draw.bank()}
        assert_follows(proto_logits, learned, {}, backend, SCALE * max(draw.rows, draw.classes))


def test_orthogonality(backend) -> None:
    for draw in draws(backend, 2):
        rows = draw.of((draw.bank(), draw.features(draw.classes)))
        assert_follows(orthogonality, {"prototypes": rows}, {}, backend, 1.0)


def test_dual_cross_entropy(backend) -> None:
    for draw in draws(backend, 3):
        rows, adjustment = draw.rows, draw.adjustment()
        weights = torch.rand(rows, generator=draw.generator)
        weights[::3] = 0.0
        fixed = {
            "targets": draw.targets(rows),
            "prototypes": draw.bank(),
            "weights": weights,
            "adjustment": adjustment,
            "loss_on": draw.of(("branches", "fused")),
        } | draw.fusion()
        if adjustment is not None and draw.of((True, False)):
            fixed["adjustment"] = torch.stack([adjustment, draw.normal(draw.classes)])
            fixed["group"] = torch.randint(-1, 2, (rows,), generator=draw.generator)
        learned = {"features": draw.features(rows), "linear": draw.bank()}
        assert_follows(dual_cross_entropy, learned, fixed, backend, 4 * SCALE * max(rows, 1))


def test_head_loss(backend) -> None:
    for draw in draws(backend, 4):
        labelled, unlabelled = draw.of((0, 1, 7)), draw.rows
        views = draw.of((1, 2)) if unlabelled else 0
        banks = draw.normal(2, draw.classes, draw.dim)
        learned = {
            "features": draw.features(labelled + views * unlabelled),
            "linear": banks[0],
            "prototypes": banks[1],
        }
        fixed = {
            "weak": draw.features(unlabelled),
            "targets": draw.targets(labelled),
            "threshold": draw.of((0.0, 1.0)),
            "adjustment": draw.adjustment(),
            # The label is never a near tie, where rounding would choose.
            "weak_adjustment": 4.0 * torch.arange(draw.classes),
            "strong_adjustment": draw.adjustment(),
            "loss_on": draw.of(("branches", "fused")),
            "linear_scale": 1.0,
            "proto_scale": 1.0,
            "eta": 0.5,
        }
        assert_follows(head_loss, learned, fixed, backend, 4.0)


def test_pseudo_label(backend) -> None:
    for draw in draws(backend, 5):
        threshold = draw.of((0.0, 0.5, torch.rand(draw.classes, generator=draw.generator)))
        adjustment, fusion = draw.adjustment(), draw.fusion()
        arguments = draw.features(draw.rows), draw.bank(), draw.bank(), threshold
        options = fusion | {"temperature": draw.of((0.5, 1.0)), "scale_rows": draw.of((None, 3))}
        got = pseudo_label(*arguments, adjustment=adjustment, **options, backend=backend)
        exact = pseudo_label(
            *map(wide, arguments), adjustment=wide(adjustment), **options, backend="reference"
        )
        branches = dual_logits_reference(*map(wide, arguments[:3]), SCALE, SCALE, True)
        logits = fuse_logits_reference(*branches, fusion["eta"], torch.tensor(fusion["align"]))
        logits = logits if adjustment is None else logits + adjustment
        ranked = logits.sort(-1, descending=True).values
        sure = torch.ones(draw.rows, dtype=torch.bool)
        if draw.classes > 1:
            # All logits of a row without direction are the same number.
            empty = arguments[0].double().norm(dim=-1) <= 1e-6
            sure = ~(ranked[:, 0] - ranked[:, 1] < BAND) | empty
        assert torch.equal(got.label[sure], exact.label[sure])
        torch.testing.assert_close(got.confidence.double(), exact.confidence, rtol=1e-3, atol=1e-6)
        limit = (
            wide(threshold)[exact.label.clamp_min(0)] if isinstance(threshold, torch.Tensor) else threshold
        )
        sure &= (
            ((exact.confidence - limit).abs() > BAND) | (exact.confidence == 0) | (exact.confidence == limit)
        )
        assert torch.equal(got.keep[sure], exact.keep[sure])
        for counts, rows in ((got.histogram, got.label >= 0), (got.kept_histogram, got.keep)):
            assert torch.equal(counts, torch.bincount(got.label[rows], minlength=draw.classes))
        torch.testing.assert_close(got.branch_scale.double(), exact.branch_scale, rtol=1e-4, atol=1e-5)


def test_proto_fit(backend) -> None:
    for draw in draws(backend, 6):
        classes, dim = draw.classes, draw.dim
        seen = torch.rand(classes, generator=draw.generator) < 0.5
        batch = (
            draw.features(draw.rows),
            draw.targets(draw.rows),
            draw.of((0.0, 1e-35, 1.0, 9.0)) * draw.normal(classes).abs(),
        )
        state = (
            draw.normal(classes, dim),
            draw.normal(classes, dim) * seen[:, None],
            seen,
            draw.of((0.0, 1.0)) * draw.normal(classes).abs(),
        )
        rates = {
            "mu": draw.of((0.0, 0.3)),
            "beta": draw.of((0.0, 0.9, 0.9999)),
            "gamma": draw.of((0.5, 0.9999)),
        }
        got = proto_fit(*batch, *state, **rates, backend=backend)
        # A histogram is counted in float32.
        exact = proto_fit(wide(batch[0]), *batch[1:], *map(wide, state), **rates, backend="reference")
        for one, other in zip(got, exact, strict=True):
            torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-4, atol=1e-5, equal_nan=True)
