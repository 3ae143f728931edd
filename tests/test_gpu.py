"""The GPU back ends on a device, where there is one: as accurate as eager PyTorch there, on the stream that is
current, without a wait, and graph-capturable.
"""

from __future__ import annotations

import pytest
import torch
from gpu_checks import tf32
from tolerances import assert_no_worse, assert_same_bits, never_waits, seeded

from ulfine_fast.backend import COMPOSED, OPS
from ulfine_fast.head_loss import head_loss
from ulfine_fast.ops import dual_cross_entropy, orthogonality, proto_fit, proto_logits, pseudo_label

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1, 1), (33, 10, 65), (64, 32, 32), (480, 1000, 513), (257, 5003, 384)]
SCALE = 25.0


def inputs(b, c, d, dtype=torch.float32):
    """Features, targets, linear probe and prototypes on the device."""
    g = seeded(b, c, d)
    x, w, t = (torch.randn(rows, d, generator=g).to("cuda", dtype) for rows in (b, c, c))
    return x, torch.randint(c, (b,), generator=g).cuda(), w, t


def with_gradients(function, *leaves):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def state(t):
    c = len(t)
    share = torch.full((c,), 1 / c, dtype=t.dtype, device=t.device)
    seen = torch.arange(c, device=t.device) % 2 == 0
    return torch.arange(c, device=t.device), t, t.flip(0), seen, share


RUN = {
    "proto_logits": lambda x, y, w, t, name: with_gradients(
        lambda x, t: proto_logits(x, t, SCALE, backend=name), x, t
    ),
    "pseudo_label": lambda x, y, w, t, name: pseudo_label(x, w, t, 0.5, backend=name)[1::4],
    "dual_cross_entropy": lambda x, y, w, t, name: with_gradients(
        lambda x, w: dual_cross_entropy(x, y, w, t, backend=name), x, w
    ),
    "proto_fit": lambda x, y, w, t, name: proto_fit(x, y, *state(t), backend=name)[::3],
    "orthogonality": lambda x, y, w, t, name: with_gradients(lambda t: orthogonality(t, backend=name), t),
    # Every strong row is kept, or rounding would decide which are.
    "head_loss": lambda x, y, w, t, name: with_gradients(
        lambda x, w, t: head_loss(torch.cat([x, x.flip(0)]), x, y, w, t, 0.0, backend=name)[0], x, w, t
    ),
}
PAIRS = [(op, name) for op in (*OPS, *COMPOSED) for name in ("triton", "cuda")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_on_a_device_no_less_accurate_than_eager(op, name, shape, dtype):
    x, y, w, t = inputs(*shape, dtype)
    t = t.float() if op == "proto_fit" else t
    got, eager = (RUN[op](x, y, w, t, backend) for backend in (name, "reference"))
    exact = RUN[op](x.double(), y, w.double(), t.double(), "reference")
    for one in zip(got, eager, exact, strict=True):
        assert_no_worse(*one, scale=SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_with_tf32_no_less_accurate_than_eager_with_tf32(op, name, dtype):
    x, y, w, t = inputs(480, 1000, 512, dtype)
    t = t.float() if op == "proto_fit" else t
    # A product of rows of length 1 is off by 2^-11 at most, whatever the order of its sum.
    bound = 2 * SCALE * 2**-11
    exact = RUN[op](x.double(), y, w.double(), t.double(), "reference")
    with tf32(True):
        got, eager = (RUN[op](x, y, w, t, backend) for backend in (name, "reference"))
    for one, other, true in zip(got, eager, exact, strict=True):
        size = max(1.0, true.abs().max().item())
        error, eager_error = ((value - true).abs().max().item() for value in (one, other))
        assert error <= 2 * eager_error + bound * size


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_on_another_stream_without_a_wait(op, name):
    x, y, w, t = inputs(96, 100, 64)
    expected = [tensor.clone() for tensor in RUN[op](x.flip(0), y, w, t, name)]
    aside = torch.cuda.Stream()
    torch.cuda.synchronize()
    with never_waits(), torch.cuda.stream(aside):
        # Whoever computes elsewhere, or copies early, does not see what comes after the pause.
        torch.cuda._sleep(20_000_000)
        x.copy_(x.flip(0))
        got = RUN[op](x, y, w, t, name)
    aside.synchronize()
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_autocast_changes_no_bit(op, name):
    x, y, w, t = inputs(96, 100, 64)
    plain = RUN[op](x, y, w, t, name)
    with torch.autocast("cuda", torch.bfloat16):
        for one, other in zip(RUN[op](x, y, w, t, name), plain, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("loss_on", ["branches", "fused"])
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_captured_step_replays_on_new_data_with_the_bits_of_a_plain_one(name, loss_on):
    x, y, w, t = inputs(96, 100, 64)

    def step():
        loss, pseudo = head_loss(
            torch.cat([x, x]), x, y, leaf, t, 0.1, align=align, loss_on=loss_on, backend=name
        )
        return loss.detach(), torch.autograd.grad(loss, leaf)[0], *pseudo

    leaf, align = w.requires_grad_(), torch.ones((), device="cuda")
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(x.flip(0))
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert_same_bits(one, other)
