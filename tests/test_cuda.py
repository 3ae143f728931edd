"""CUDA: what its emulator notices, what nvcc makes of the kernels, how often each op launches, whole steps."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import emulator
import pytest
import torch
from tolerances import seeded
from torch.utils._python_dispatch import TorchDispatchMode

from ulfine_fast import _cuda
from ulfine_fast.head_loss import head_loss
from ulfine_fast.ops import dual_cross_entropy, orthogonality, proto_fit, proto_logits, pseudo_label
from ulfine_fast.ops._handover import hand_over

# The emulator


@pytest.fixture(scope="module")
def faults(request):
    """`faults(number, out)` runs a kernel of faults.cu; None, or the text of the error."""
    folder = request.config.cache.mkdir("emulator")
    run = ctypes.CDLL(str(emulator.build(folder, emulator.HERE / "faults.cu"))).run
    run.argtypes, run.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_char_p
    return lambda number, out: run(number, out.data_ptr())


def test_the_emulator_runs_a_kernel_without_a_fault(faults):
    for _ in range(10):
        out = torch.zeros(256)
        assert faults(0, out) is None
        assert (out == 255 * 128).all()


@pytest.mark.parametrize("number", [1, 2])
def test_the_emulator_notices_a_barrier_or_shuffle_that_some_threads_miss(faults, number):
    assert b"not every thread" in faults(number, torch.zeros(256))
    # The next kernel runs as if nothing had happened.
    assert faults(0, torch.zeros(256)) is None


def test_the_emulator_fills_shared_memory_with_nan(faults):
    out = torch.zeros(256)
    assert faults(3, out) is None
    assert out.isnan().all()


def test_the_emulator_shows_a_race_as_different_results(faults):
    results = []
    for _ in range(10):
        results.append(torch.arange(256.0))
        faults(4, results[-1])
    assert any(not torch.equal(results[0], other) for other in results)


def test_a_launcher_counts_its_fields(emulated_kernels):
    with pytest.raises(TypeError, match="expected 16 values, got 2"):
        emulated_kernels.proto_fit((0, 0), 0)


# What nvcc makes of it

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", emulator.KERNELS, ids=lambda path: path.stem)
def test_kernels_neither_spill_nor_use_a_stack(source, architecture):
    command = [
        "nvcc",
        "-std=c++17",
        f"-arch={architecture}",
        "-Xptxas=-v",
        "-Werror=all-warnings",
        "-Xcompiler=-Wall,-Wextra",
    ]
    done = subprocess.run([*command, "-c", source, "-o", "/dev/null"], capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert frames and set(frames) == {("0", "0", "0")}, report
    # With 80 a multiprocessor holds three blocks of 256 threads.
    assert max(int(count) for count in re.findall(r"Used (\d+) registers", report)) <= 80
    assert all(int(size) <= 1024 for size in re.findall(r"(\d+) bytes smem", report))


# Launches


def inputs(b=40, c=10, d=17):
    generator = seeded(b, c, d)
    features, linear, prototypes = (torch.randn(rows, d, generator=generator) for rows in (b, c, c))
    return features, linear, prototypes


class Launches(TorchDispatchMode):
    """The operators of torch that start a kernel, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().removeprefix("aten::")
        if not (name.startswith("empty") or operator.is_view):
            self.names.append(name)
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def launches(emulated_kernels, monkeypatch):
    """`launches(function)`: our launches and torch's, in their order."""

    def run(function):
        def launch(name, *fields):
            started.names.append(name)
            plain(name, *fields)

        started = Launches()
        monkeypatch.setattr(_cuda, "_launch", launch)
        with started:
            function()
        return started.names

    plain = _cuda._launch
    monkeypatch.setattr(_cuda, "kernels", emulated_kernels)
    return run


X, W, T = inputs()
TARGETS = torch.arange(40) % 10
ALIGN, LIMIT, WEIGHTS = torch.tensor(1.3), torch.tensor([0.3]), torch.full((40,), 1 / 40)
SCALES = 0.5, 25.0, 25.0


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: _cuda.proto_logits(X, T, 25.0), "unit_rows addmm.out"),
        (
            lambda: _cuda.proto_logits_backward(X @ T.T, X, T, 25.0, True, True),
            "unit_rows mm.out mm.out finish",
        ),
        (
            lambda: _cuda.pseudo_label(X, W, T, LIMIT, ALIGN, None, *SCALES, 1.0, True, 8),
            "unit_rows mm.out mm.out pseudo_label finish",
        ),
        (
            lambda: _cuda.dual_cross_entropy(
                X, TARGETS, W, T, WEIGHTS, None, None, ALIGN, *SCALES, True, True, True, True
            ),
            "unit_rows mm.out dual_cross_entropy mm.out mm.out finish",
        ),
        (
            lambda: _cuda.proto_fit_(
                X,
                TARGETS,
                torch.ones(10),
                T.clone(),
                W.clone(),
                TARGETS[:10] > 3,
                torch.ones(10),
                0.1,
                0.9,
                0.9,
            ),
            "proto_fit",
        ),
        (lambda: _cuda.orthogonality(T), "unit_rows mm.out orthogonality mm.out finish"),
        (lambda: step(False, 0.0), "unit_rows mm.out head_loss mm.out finish"),
        (lambda: step(True, 0.0), "unit_rows mm.out mm.out head_loss mm.out finish"),
        (
            lambda: step(False, 1.0),
            "unit_rows mm.out head_loss mm.out mm.out orthogonality mm.out finish",
        ),
    ],
)
def test_launches(launches, call, expected):
    started = launches(call)
    # What the lambdas make themselves comes before the first launch.
    assert started[started.index(expected.split()[0]) :] == expected.split()


def test_all_gradients_are_handed_over_in_one_launch():
    gradients = [torch.ones(3, 2), torch.ones(0), torch.ones(5)]
    ctx = SimpleNamespace(compiled=False, gradients=gradients)
    with Launches() as started:
        handed = hand_over(ctx, torch.tensor(3.0), None)
    assert started.names == ["_local_scalar_dense", "_foreach_mul_.Tensor"]
    assert [one.sum().item() for one in handed] == [18.0, 0.0, 15.0]


def step(fused, orthogonality_weight):
    """One `head_loss` of 8 labelled and 32 strong rows with cached features."""
    return _cuda.head_loss(
        X, X[8:], TARGETS[:8], W, T, LIMIT, ALIGN, None, None, None, *SCALES, 1.0, True, 8, fused, 1.0,
        orthogonality_weight, False, True, True,
    )  # fmt: skip


def test_everything_runs_on_the_current_stream_of_the_device_of_the_tensors(monkeypatch):
    entered, streams = [], []

    @contextmanager
    def device(of):
        entered.append(of)
        yield

    class Kernels:
        def __getattr__(self, name):
            return lambda fields, stream: streams.append(stream)

    monkeypatch.setattr(_cuda, "emulated", lambda: False)
    monkeypatch.setattr(_cuda, "kernels", Kernels())
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    step(True, 1.0)
    assert entered == [X.device]
    assert set(streams) == {77}


def test_the_emulator_alone_takes_tensors_of_the_cpu():
    with pytest.raises(RuntimeError, match="proto_logits: cuda .*"):
        proto_logits(X, T, backend="cuda")


# Whole steps


def head(kernel, mode, views, classes, dim, *, bad=(), **options):
    """Everything that `head_loss` returns and the gradients, for 9 labelled rows and 21 images."""
    generator = seeded(views, classes, dim)
    prototypes = torch.randn(classes, dim, generator=generator)
    truth = torch.randint(classes, (21,), generator=generator)
    targets = torch.randint(classes, (9,), generator=generator)
    targets[4] = -1

    def around(of):
        return prototypes[of] + 1.4 * torch.randn(len(of), dim, generator=generator)

    weak = around(truth)
    features = torch.cat([around(targets.clamp_min(0)), *[around(truth) for _ in range(views)]])
    linear = prototypes + 0.3 * torch.randn(classes, dim, generator=generator)
    shifts = torch.randn(3, classes, generator=generator)
    for row in bad:
        weak[row] = torch.nan
        features[9 + row] = torch.nan
    fusion = options | {"align": 0.8, "eta": 0.4}
    labels = pseudo_label(weak, linear, prototypes, adjustment=shifts[0], backend="reference", **fusion)
    leaves = [t.requires_grad_() for t in (features, linear, prototypes)]
    loss, pseudo = head_loss(
        leaves[0], weak, targets, leaves[1], leaves[2], labels.confidence.mean(), loss_on=mode,
        weak_adjustment=shifts[0], adjustment=shifts[1], strong_adjustment=shifts[2], backend=kernel, **fusion,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves), *pseudo


@pytest.mark.parametrize("kernel", ["cuda"])
@pytest.mark.parametrize("mode", ["branches", "fused"])
@pytest.mark.parametrize(("views", "classes", "dim"), [(1, 37, 19), (2, 128, 33), (2, 129, 33), (1, 300, 17)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_linear": False, "linear_scale": 3.0, "scale_rows": 5},
        {"temperature": 2.0, "scale_rows": 0},
    ],
)
def test_a_step_follows_the_reference(kernel, mode, views, classes, dim, options):
    got, expected = (head(name, mode, views, classes, dim, **options) for name in (kernel, "reference"))
    keep = expected[6]
    assert keep.any() and not keep.all()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", ["cuda"])
@pytest.mark.parametrize("mode", ["branches", "fused"])
@pytest.mark.parametrize("classes", [37, 300])
def test_a_rejected_image_may_be_anything(kernel, mode, classes):
    got, expected = (head(name, mode, 1, classes, 19, bad=(0, 20)) for name in (kernel, "reference"))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert not got[1][[9, 29]].any()


@pytest.mark.parametrize("kernel", ["cuda"])
@pytest.mark.parametrize("mode", ["branches", "fused"])
@pytest.mark.parametrize("classes", [37, 300])
def test_a_step_has_the_same_bits_in_every_run(kernel, mode, classes):
    first = head(kernel, mode, 2, classes, 33)
    for _ in range(3):
        assert all(
            torch.equal(one, other)
            for one, other in zip(head(kernel, mode, 2, classes, 33), first, strict=True)
        )


# What an accuracy test cannot see


@pytest.mark.parametrize("kernel", ["cuda"])
@pytest.mark.parametrize(("c", "d"), [(5, 9), (9, 5), (200, 300), (300, 200)])
def test_a_row_of_the_gram_matrix_leaves_itself_out(kernel, c, d):
    # Rows of any norm: that of unit rows hides which power of it is taken off.
    rows = torch.randn(c, d, generator=seeded(c, d))
    gram, squares = _cuda._gram(rows)
    products = rows.double() @ rows.double().T
    expected = products.square().sum() - products.diagonal().square().sum()
    torch.testing.assert_close(squares.sum(), expected, rtol=1e-5, atol=0)
    assert c > d or not gram.diagonal().any()


@pytest.mark.parametrize("kernel", ["cuda"])
def test_the_largest_share_may_be_anywhere(kernel):
    features, linear, prototypes = inputs(40, 600, 9)
    seen = torch.zeros(600, dtype=torch.bool)
    for largest in (0, 3, 255, 256, 599):
        share = torch.rand(600, generator=seeded(largest))
        share[largest] = 3.0
        state = prototypes, linear, seen, share
        got, expected = (
            proto_fit(features, torch.arange(40), torch.ones(600), *state, mu=1.0, backend=name)
            for name in (kernel, "reference")
        )
        torch.testing.assert_close(got.textual, expected.textual, rtol=1e-5, atol=1e-6)


# On a device


def results(of, name):
    """What an op gives on the device, gradients included."""
    x, w, t = (tensor.cuda().requires_grad_() for tensor in inputs(70, of, 65))
    rows, state = (torch.arange(n, device="cuda") for n in (70, of))
    targets = (rows % of).where(rows % 5 != 0, -1)
    found = []
    for loss in (
        proto_logits(x, t, backend=name).square().sum(),
        dual_cross_entropy(x, targets, w, t.detach(), loss_on="branches", backend=name),
        dual_cross_entropy(x, targets, w, t.detach(), loss_on="fused", backend=name),
        orthogonality(t, backend=name),
        head_loss(x, x[10:].detach(), targets[:10], w, t, 0.2, backend=name)[0],
    ):
        found += [loss, *torch.autograd.grad(loss, (x, w, t), allow_unused=True)]
    found += pseudo_label(x, w, t, 0.2, backend=name)
    found += proto_fit(x, targets, state % 7, t, w, state % 2 == 0, state / of**2, backend=name)
    return [one.detach() for one in found if one is not None]


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [37, 1000])
def test_on_a_device_every_op_follows_the_reference(classes):
    for one, other in zip(results(classes, "cuda"), results(classes, "reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_on_a_device_a_step_can_be_captured():
    x, w, t = (tensor.cuda() for tensor in inputs())
    w.requires_grad_()
    targets, align, limit = TARGETS[:8].cuda(), ALIGN.cuda(), LIMIT.cuda()

    def captured():
        loss = head_loss(x, x[8:], targets, w, t, limit, align=align, backend="cuda")[0]
        return loss, *torch.autograd.grad(loss, w)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        expected = captured()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = captured()
    graph.replay()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
