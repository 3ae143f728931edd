"""Half features where torch allows TF32: operands of products are float16, and nothing else is.

Same-dtype eager rounds operands to TF32 there, whose 11 significant bits float16 has too; what is gained is told next
to autocast eager, which is what people run on half features.
"""

from __future__ import annotations

import pytest
import torch
from gpu_bench import accuracy
from shapes import SCALE, Shape, step_inputs
from tolerances import FLOOR, assert_same_bits

from ulfine_fast import _cuda
from ulfine_fast.head_loss import head_loss

HALF = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.parametrize("kernel", ["cuda"])


@pytest.fixture
def operands(monkeypatch):
    """Types of the operands of every product, in their order."""
    product, types = _cuda._product, []
    monkeypatch.setattr(
        _cuda, "_product", lambda a, b: types.append(torch.promote_types(a.dtype, b.dtype)) or product(a, b)
    )
    return types


def step(s, kernel, dtype=torch.bfloat16, operands_of=torch.float32, **options):
    """Loss, gradients and pseudo-labels of one step on features that half types hold; the banks are parameters."""
    features = s.rows.detach().to(dtype).to(operands_of).requires_grad_()
    kind = torch.promote_types(operands_of, torch.float32)
    banks = [bank.detach().to(kind, copy=True).requires_grad_() for bank in (s.linear, s.textual)]
    weak = s.weak.to(dtype).to(operands_of)
    loss, pseudo = head_loss(features, weak, s.targets, *banks, s.threshold, backend=kernel, **options)
    loss.backward()
    return loss.detach(), features.grad, *(bank.grad for bank in banks), *pseudo


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("classes", [100, 1000])
def test_pseudo_labels_are_far_closer_than_those_of_autocast_eager(tf32, operands, kernel, dtype, classes):
    start = step_inputs(Shape(8, 2000, classes, 256)).to("cpu", dtype)
    found = accuracy(start, kernel)
    assert operands == [torch.float16, torch.float16]
    assert 0 < found["confidence_error"] <= found["autocast_confidence_error"] / 5
    assert found["argmax_flips"] <= max(found["autocast_argmax_flips"], 1e-3) <= 0.02


@pytest.mark.parametrize("options", [{}, {"unlabelled_weight": 1e-2, "linear_scale": 3.0}])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("loss_on", ["branches", "fused"])
def test_a_step_is_as_close_as_with_tf32(tf32, operands, kernel, dtype, loss_on, options):
    s = step_inputs(Shape(32, 224, 100, 256))
    got = step(s, kernel, dtype, dtype, loss_on=loss_on, **options)
    # The Gram matrix of the prototypes and its gradient stay as they are.
    assert operands.count(torch.float32) == 2 and set(operands) == {torch.float16, torch.float32}
    exact = step(s, "reference", dtype, torch.float64, loss_on=loss_on, **options)
    plain = step(s, kernel, dtype, loss_on=loss_on, **options)
    assert torch.equal(got[6], exact[6])
    for one, true in zip((got[0], *got[2:4]), (exact[0], *exact[2:4]), strict=True):
        assert (one - true).abs().max() <= 1e-3 * true.abs().max()
    # Every row, also one of little weight: its gradient is off by as much as its logits, and rounded to its dtype.
    off, size = (t.abs().amax(-1) for t in (got[1].double() - exact[1], exact[1]))
    kind = torch.finfo(dtype)
    rounding = FLOOR * size.max() + kind.tiny * kind.eps
    assert (off <= (2 * SCALE * 2**-11 + kind.eps) * size + rounding).all()
    torch.testing.assert_close(got[3], plain[3], rtol=1e-5, atol=1e-7)
    assert not torch.equal(got[2], plain[2])


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32, "operands_of": torch.float32},
        {"normalize_linear": False},
    ],
)
def test_what_is_not_half_or_has_no_bound_keeps_float32(tf32, operands, kernel, change):
    step(step_inputs(Shape(4, 6, 7, 5)), kernel, **{"operands_of": torch.bfloat16} | change)
    assert set(operands) == {torch.float32}


def test_torch_has_the_switch(operands, kernel):
    step(step_inputs(Shape(4, 6, 7, 5)), kernel, operands_of=torch.bfloat16)
    assert set(operands) == {torch.float32}


def test_both_kinds_of_rows_have_to_be_half(tf32, operands, kernel):
    s = step_inputs(Shape(4, 6, 7, 5))
    for rows, weak in ((s.rows.detach().half(), s.weak), (s.rows.detach(), s.weak.half())):
        head_loss(rows, weak, s.targets, s.linear, s.textual, backend=kernel)
    assert set(operands) == {torch.float32}


@pytest.mark.parametrize("loss_on", ["branches", "fused"])
def test_a_small_weight_costs_no_digits(tf32, kernel, loss_on):
    s = step_inputs(Shape(4, 6, 7, 5))
    one, small = (
        step(s, kernel, operands_of=torch.bfloat16, loss_on=loss_on, unlabelled_weight=weight)[1][4:].float()
        for weight in (1.0, 1e-5)
    )
    assert one.any()
    torch.testing.assert_close(1e5 * small, one, rtol=2 * 2**-7, atol=1e-3 * one.abs().max().item())


@pytest.mark.parametrize("align", [1.0, 100.0, 1e6])
@pytest.mark.parametrize("loss_on", ["branches", "fused"])
def test_any_scale_fits(tf32, operands, kernel, loss_on, align):
    s = step_inputs(Shape(4, 6, 7, 5))
    # A device number, of which nothing is known.
    scales = {"linear_scale": 512.0, "proto_scale": 900.0, "align": torch.tensor(align), "eta": 0.25}
    found = step(s, kernel, operands_of=torch.bfloat16, loss_on=loss_on, **scales)
    assert torch.float16 in operands
    exact = step(s, "reference", operands_of=torch.float64, loss_on=loss_on, **scales)
    assert torch.equal(found[4], exact[4])
    for one, true in zip(found[:4], exact[:4], strict=True):
        torch.testing.assert_close(one.double(), true, rtol=2e-2, atol=2e-2 * true.abs().max().item())


@pytest.mark.parametrize("loss_on", ["branches", "fused"])
@pytest.mark.parametrize("classes", [37, 300])
def test_a_rejected_image_may_be_anything(tf32, kernel, loss_on, classes):
    s = step_inputs(Shape(9, 21, classes, 19))
    s.weak[[0, 20]] = torch.nan
    with torch.no_grad():
        s.rows[[9, 29]] = torch.nan
    loss, d_rows, *gradients = step(s, kernel, operands_of=torch.bfloat16, loss_on=loss_on)[:4]
    assert not d_rows[[9, 29]].any()
    assert all(value.isfinite().all() for value in (loss, d_rows, *gradients))


def test_memory_that_is_not_written_is_not_read(tf32, kernel, poisoned):
    s = step_inputs(Shape(9, 21, 37, 19))
    for loss_on in ("branches", "fused"):
        plain = step(s, kernel, operands_of=torch.bfloat16, loss_on=loss_on)
        again = poisoned(lambda mode=loss_on: step(s, kernel, operands_of=torch.bfloat16, loss_on=mode))
        for one, other in zip(again, plain, strict=True):
            assert_same_bits(one, other)
