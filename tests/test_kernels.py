"""GPU kernels: Triton in its interpreter on every machine, Triton and CUDA C++ on a device where there is one."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_no_worse, seeded

from ulfine_fast.ops import proto_logits

SHAPES = [(1, 1, 1), (5, 3, 7), (33, 10, 65), (40, 34, 100), (64, 32, 32)]


def inputs(b, c, d, dtype, device):
    g = seeded(b, c, d)
    return tuple(torch.randn(rows, d, generator=g).to(device, dtype) for rows in (b, c))


def check(backend, shape, dtype, device):
    x, p = inputs(*shape, dtype, device)
    exact = proto_logits(x.double(), p.double(), 20.0, backend="reference")
    eager = proto_logits(x, p, 20.0, backend="reference")
    assert_no_worse(proto_logits(x, p, 20.0, backend=backend), eager, exact, scale=20.0)


@pytest.fixture
def interpreter():
    from triton import knobs

    if not knobs.runtime.interpret:
        pytest.skip("a CUDA device runs the kernels: the interpreter is off")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_in_the_interpreter_is_no_less_accurate_than_eager(interpreter, shape, dtype):
    check("triton", shape, dtype, "cpu")


def test_triton_gives_zero_for_a_zero_row_and_nan_for_a_nan_row(interpreter):
    x, p = inputs(3, 4, 40, torch.float32, "cpu")
    x[1] = 0.0
    x[2, 5] = float("nan")
    logits = proto_logits(x, p, backend="triton")
    assert not logits[1].any()
    assert logits[2].isnan().all()
    assert logits[0].isfinite().all()


def test_triton_without_rows_launches_nothing(interpreter):
    x, p = inputs(0, 4, 8, torch.float32, "cpu")
    assert proto_logits(x, p, backend="triton").shape == (0, 4)


def test_triton_has_the_gradient_of_the_reference(interpreter):
    grads = []
    for backend in ("triton", "reference"):
        x, p = (t.requires_grad_() for t in inputs(6, 5, 9, torch.float32, "cpu"))
        proto_logits(x, p, backend=backend).square().sum().backward()
        grads.append((x.grad, p.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (480, 1000, 513)])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_on_a_device_no_less_accurate_than_eager(backend, shape, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    check(backend, shape, dtype, "cuda")
