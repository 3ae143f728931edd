import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tolerances import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_no_worse,
    assert_same_bits,
    compiled,
    on_threads,
    seeded,
    unchanged,
)

from ulfine_fast import proto_logits, use_backend
from ulfine_fast.ops.proto_logits import proto_logits_reference

SCALE = 25.0


def inputs(b: int, c: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, D] and prototypes [C, D] of many norms."""
    generator = seeded(b, c, d)
    features = torch.randn(b, d, generator=generator) * torch.logspace(-1, 1, b)[:, None]
    prototypes = torch.randn(c, d, generator=generator) * torch.logspace(1, -1, c)[:, None]
    return features.to(dtype), prototypes.to(dtype)


def run(features, prototypes, grad=None, scale=SCALE, function=proto_logits, **options):
    """Logits and, for an upstream gradient, both gradients."""
    features = features.detach().requires_grad_()
    prototypes = prototypes.detach().requires_grad_()
    logits = function(features, prototypes, scale, **options)
    grad = torch.ones_like(logits) if grad is None else grad.to(logits.dtype)
    return logits, *torch.autograd.grad(logits, [features, prototypes], grad)


def naive(features, prototypes, scale):
    def cosine(x, p):
        dot = sum(a * b for a, b in zip(x, p, strict=True))
        return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in p))

    return [[scale * cosine(x, p) for p in prototypes.tolist()] for x in features.tolist()]


def assert_accurate(kernel, features, prototypes, grad):
    got = run(features, prototypes, grad, backend=kernel)
    eager = run(features, prototypes, grad, function=proto_logits_reference)
    exact = run(features.double(), prototypes.double(), grad, function=proto_logits_reference)
    # A gradient loses its part along the row, so what is summed is larger than what remains.
    on_features = SCALE * math.sqrt(len(prototypes)) / smallest_norm(features)
    on_prototypes = SCALE * math.sqrt(len(features)) / smallest_norm(prototypes)
    for one, scale in zip(
        zip(got, eager, exact, strict=True), (SCALE, on_features, on_prototypes), strict=True
    ):
        assert_no_worse(*one, scale=scale)


def smallest_norm(rows):
    norms = rows.double().norm(dim=-1)
    return min(norms[norms > 0].tolist(), default=1.0)


@pytest.mark.parametrize(("b", "c", "d"), [(1, 1, 1), (5, 2, 3), (4, 10, 17)])
def test_logits_are_scaled_cosines(backend, b, c, d) -> None:
    features, prototypes = inputs(b, c, d)
    logits = proto_logits(features, prototypes, 7.5, backend=backend)
    expected = torch.tensor(naive(features.double(), prototypes.double(), 7.5), dtype=torch.float64)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)


def test_float64_reference_is_exact() -> None:
    features, prototypes = inputs(6, 9, 31, torch.float64)
    expected = torch.tensor(naive(features, prototypes, SCALE), dtype=torch.float64)
    logits = proto_logits(features, prototypes, SCALE, backend="reference")
    torch.testing.assert_close(logits, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("b", "c", "d"), SHAPES)
def test_no_less_accurate_than_eager(kernel, b, c, d, dtype) -> None:
    features, prototypes = inputs(b, c, d, dtype)
    grad = torch.randn(b, c, generator=seeded(b, c, d, 1)).to(dtype)
    assert_accurate(kernel, features, prototypes, grad)


def test_no_less_accurate_in_the_tiles_of_tf32(kernel, tf32) -> None:
    assert_accurate(kernel, *inputs(70, 130, 40), torch.randn(70, 130, generator=seeded(1)))


@given(
    b=st.integers(0, 40),
    c=st.integers(1, 40),
    d=st.integers(1, 70),
    exponent=st.integers(-3, 6),
    zeros=st.booleans(),
)
def test_any_shape_and_magnitude_is_no_less_accurate_than_eager(kernel, b, c, d, exponent, zeros) -> None:
    features, prototypes = inputs(b, c, d)
    features = features * 10.0**exponent
    if zeros:
        features[::3], prototypes[::2] = 0, 0
    assert_accurate(kernel, features, prototypes, torch.randn(b, c, generator=seeded(b, c, d, 1)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout_gives_the_same_bits(backend, layout) -> None:
    features, prototypes = inputs(37, 19, 29)
    grad = torch.randn(37, 19, generator=seeded(1))
    change = LAYOUTS[layout]
    # The reference multiplies by BLAS, which may sum another layout in another order.
    exact = backend != "reference"
    for one, other in zip(
        run(change(features), change(prototypes), change(grad), backend=backend),
        run(features, prototypes, grad, backend=backend),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


def test_expanded_features_and_gradient(backend) -> None:
    features, prototypes = inputs(1, 10, 17)
    one = run(features, prototypes, torch.ones(1, 10), backend=backend)
    many = run(features.expand(8, 17), prototypes, torch.ones(()).expand(8, 10), backend=backend)
    torch.testing.assert_close(many[0], one[0].expand(8, 10))
    torch.testing.assert_close(many[1], one[1].expand(8, 17))
    torch.testing.assert_close(many[2], one[2] * 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_have_the_dtype_of_the_features(backend, dtype) -> None:
    features, prototypes = inputs(5, 10, 17)
    logits, d_features, d_prototypes = run(features.to(dtype), prototypes, backend=backend)
    assert logits.dtype == d_features.dtype == dtype
    assert d_prototypes.dtype == torch.float32


def test_autocast_does_not_lower_the_arithmetic(backend) -> None:
    features, prototypes = inputs(37, 10, 64)
    plain = proto_logits(features, prototypes, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        logits = proto_logits(features, prototypes, backend=backend)
    assert_same_bits(logits, plain)


def test_the_default_dtype_does_not_matter(backend) -> None:
    features, prototypes = inputs(5, 10, 17)
    plain = run(features, prototypes, torch.ones(5, 10), backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        wide = run(features, prototypes, torch.ones(5, 10), backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(wide, plain, strict=True):
        assert_same_bits(one, other)


# Gradients and transformations


def test_gradcheck() -> None:
    features, prototypes = (t.requires_grad_() for t in inputs(4, 3, 5, torch.float64))
    assert torch.autograd.gradcheck(lambda x, p: proto_logits(x, p, 3.0), (features, prototypes))


@pytest.mark.parametrize("wanted", ["features", "prototypes"])
def test_gradient_of_one_input_alone(backend, wanted) -> None:
    features, prototypes = inputs(37, 10, 17)
    both = dict(zip(("features", "prototypes"), run(features, prototypes, backend=backend)[1:], strict=True))
    leaf = {"features": features, "prototypes": prototypes}[wanted].requires_grad_()
    proto_logits(features, prototypes, SCALE, backend=backend).sum().backward()
    torch.testing.assert_close(leaf.grad, both[wanted])
    assert (features.grad is None) != (prototypes.grad is None)


def test_gradient_is_orthogonal_to_the_feature(backend) -> None:
    features, prototypes = inputs(5, 10, 17)
    grad = torch.randn(5, 10, generator=seeded(2))
    d_features = run(features, prototypes, grad, backend=backend)[1]
    along = (d_features * features).sum(-1)
    torch.testing.assert_close(along, torch.zeros(5), rtol=0, atol=1e-4)
    assert (d_features.norm(dim=-1) > 0.1).all()


def test_no_gradient_without_a_leaf(backend) -> None:
    assert not proto_logits(*inputs(5, 10, 17), backend=backend).requires_grad


def test_a_kernel_refuses_a_second_derivative(kernel) -> None:
    features, prototypes = (t.requires_grad_() for t in inputs(5, 10, 17))
    logits = proto_logits(features, prototypes, backend=kernel)
    (first,) = torch.autograd.grad(logits.sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="proto_logits: kernels have no second derivative"):
        torch.autograd.grad(logits.sum() + first.square().sum(), prototypes)


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_opcheck_forward(kernel, layout) -> None:
    change = LAYOUTS.get(layout, torch.clone)
    features, prototypes = map(change, inputs(5, 10, 17))
    torch.library.opcheck(torch.ops.ulfine._proto_logits.default, (features, prototypes, SCALE, kernel))


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_opcheck_backward(kernel, layout, need) -> None:
    change = LAYOUTS.get(layout, torch.clone)
    features, prototypes = map(change, inputs(5, 10, 17, torch.bfloat16))
    arguments = (change(torch.ones(5, 10)).to(torch.bfloat16), features, prototypes, SCALE, *need, kernel)
    torch.library.opcheck(torch.ops.ulfine._proto_logits_backward.default, arguments)


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(kernel, engine) -> None:
    features, prototypes = inputs(5, 10, 17)
    grad = torch.randn(5, 10, generator=seeded(2))
    function = compiled(proto_logits, backend=engine)
    got = run(features, prototypes, grad, function=lambda *a: function(*a, backend=kernel))
    for one, other in zip(got, run(features, prototypes, grad, backend=kernel), strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_once_for_every_batch_size(kernel) -> None:
    function = compiled(proto_logits, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9):
            features, prototypes = inputs(rows, 10, 17)
            got = run(features, prototypes, function=lambda *a: function(*a, backend=kernel))
            for one, other in zip(got, run(features, prototypes, backend=kernel), strict=True):
                torch.testing.assert_close(one, other)


# Memory, threads, arguments


@example(b=0, c=3, d=5, threads=1)
@example(b=1, c=1, d=1, threads=2)
@example(b=300, c=101, d=67, threads=3)
@given(
    b=st.integers(0, 300), c=st.integers(1, 130), d=st.integers(1, 130), threads=st.sampled_from([1, 2, 3])
)
def test_every_output_is_written_and_nothing_else(poisoned, kernel, b, c, d, threads) -> None:
    features, prototypes = inputs(b, c, d)
    grad = torch.randn(b, c, generator=seeded(3))
    expected = run(features, prototypes, grad, backend=kernel)
    got = on_threads(threads, lambda: poisoned(lambda: run(features, prototypes, grad, backend=kernel)))
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize(("b", "c", "d"), [(130, 100, 64), (700, 11, 33)])
def test_same_bits_in_every_run_and_for_every_thread_count(kernel, b, c, d) -> None:
    features, prototypes = inputs(b, c, d)
    grad = torch.randn(b, c, generator=seeded(3))
    first = run(features, prototypes, grad, backend=kernel)
    for threads in (1, 2, 3):
        again = on_threads(threads, lambda: run(features, prototypes, grad, backend=kernel))
        for one, other in zip(again, first, strict=True):
            assert_same_bits(one, other)


def test_a_row_does_not_depend_on_the_rest_of_the_batch(kernel) -> None:
    features, prototypes = inputs(300, 19, 29)
    whole = proto_logits(features, prototypes, backend=kernel)
    # Cuda multiplies by a library, which may take another way for another number of rows.
    same = torch.testing.assert_close if kernel == "cuda" else assert_same_bits
    same(proto_logits(features[256:300], prototypes, backend=kernel), whole[256:300])


def test_arguments_are_unchanged(backend) -> None:
    features, prototypes = inputs(37, 10, 17)
    with unchanged(features, prototypes):
        run(features, prototypes, backend=backend)


# Degenerate rows


def test_a_zero_feature_has_logits_and_gradient_zero(backend) -> None:
    features, prototypes = inputs(5, 10, 17)
    features[2] = 0
    logits, d_features, d_prototypes = run(features, prototypes, backend=backend)
    assert (logits[2] == 0).all() and (d_features[2] == 0).all()
    assert d_features[3].any() and d_prototypes.isfinite().all()


def test_a_zero_prototype_has_logits_and_gradient_zero(backend) -> None:
    features, prototypes = inputs(5, 10, 17)
    prototypes[4] = 0
    logits, d_features, d_prototypes = run(features, prototypes, backend=backend)
    assert (logits[:, 4] == 0).all() and (d_prototypes[4] == 0).all()
    assert d_prototypes[5].any() and d_features.isfinite().all()


@pytest.mark.parametrize(("norm", "directed"), [(0.9e-6, False), (1.1e-6, True)])
def test_a_norm_of_1e_6_is_the_smallest_with_a_direction(backend, norm, directed) -> None:
    features = torch.tensor([[0.0, norm, 0.0]])
    logits = proto_logits(features, torch.eye(3), 2.0, backend=backend)
    torch.testing.assert_close(logits, torch.tensor([[0.0, 2.0 if directed else 0.0, 0.0]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_nan_in_that_row_alone(backend, bad) -> None:
    features, prototypes = inputs(5, 10, 17)
    plain = proto_logits(features, prototypes, backend=backend)
    features[1, 3] = bad
    logits = proto_logits(features, prototypes, backend=backend)
    assert logits[1].isnan().all()
    keep = [0, 2, 3, 4]
    assert_same_bits(logits[keep], plain[keep])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_feature_that_is_not_finite_gets_such_a_gradient_and_no_other_does(backend, bad) -> None:
    features, prototypes = inputs(5, 10, 17)
    features[1, 3] = bad
    d_features = run(features, prototypes, backend=backend)[1]
    assert d_features.isnan().all(-1).tolist() == [False, True, False, False, False]
    assert d_features[[0, 2, 3, 4]].isfinite().all()


def test_a_zero_feature_gets_no_gradient_whatever_comes_back(backend) -> None:
    features, prototypes = inputs(5, 10, 17)
    features[2] = 0
    grad = torch.ones(5, 10)
    grad[2] = math.nan
    assert not run(features, prototypes, grad, backend=backend)[1][2].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_prototype_that_is_not_finite_gives_nan_in_that_class_alone(backend, bad) -> None:
    features, prototypes = inputs(5, 10, 17)
    prototypes[6, 0] = bad
    logits = proto_logits(features, prototypes, backend=backend)
    assert logits[:, 6].isnan().all()
    assert logits[:, [0, 1, 2, 3, 4, 5, 7, 8, 9]].isfinite().all()


def test_no_rows_give_no_logits_and_a_zero_gradient(backend) -> None:
    features, prototypes = inputs(0, 10, 17)
    logits, d_features, d_prototypes = run(features, prototypes, backend=backend)
    assert logits.shape == (0, 10) and d_features.shape == (0, 17)
    assert d_prototypes.shape == (10, 17) and not d_prototypes.any()


# Errors


@pytest.mark.parametrize(
    ("features", "prototypes", "scale", "error", "message"),
    [
        (torch.ones(3), torch.ones(2, 3), 1.0, ValueError, r"features must be \[any, any\], got \[3\]"),
        (
            torch.ones(1, 3),
            torch.ones(2, 3, 1),
            1.0,
            ValueError,
            r"prototypes must be \[any, 3\], got \[2, 3, 1\]",
        ),
        (torch.ones(1, 3), torch.ones(2, 4), 1.0, ValueError, r"prototypes must be \[any, 3\], got \[2, 4\]"),
        (torch.ones(1, 3), torch.ones(0, 3), 1.0, ValueError, r"prototypes must have at least one class"),
        (
            torch.ones(1, 3, dtype=torch.int64),
            torch.ones(2, 3),
            1.0,
            TypeError,
            "features must be float32.*int64",
        ),
        (torch.ones(1, 3), torch.ones(2, 3).bool(), 1.0, TypeError, "prototypes must be float32.*bool"),
        ([[1.0]], torch.ones(2, 3), 1.0, TypeError, "features must be a tensor, got list"),
        (
            torch.ones(1, 3),
            torch.ones(2, 3, device="meta"),
            1.0,
            ValueError,
            "prototypes must be on cpu.*meta",
        ),
        (
            torch.ones(1, 3),
            torch.ones(2, 3),
            math.nan,
            ValueError,
            "scale must be a finite number above 0, got nan",
        ),
        (
            torch.ones(1, 3),
            torch.ones(2, 3),
            math.inf,
            ValueError,
            "scale must be a finite number above 0, got inf",
        ),
        (torch.ones(1, 3), torch.ones(2, 3), 0.0, ValueError, "scale must be a finite number above 0, got 0"),
    ],
)
def test_bad_arguments(features, prototypes, scale, error, message) -> None:
    with pytest.raises(error, match=f"proto_logits: {message}"):
        proto_logits(features, prototypes, scale)


def test_a_kernel_refuses_float64(kernel) -> None:
    with pytest.raises(RuntimeError, match=f"proto_logits: {kernel} computes in float32, got float64"):
        proto_logits(*inputs(5, 10, 17, torch.float64), backend=kernel)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_gpu_backends_refuse_a_cpu_tensor(name, monkeypatch) -> None:
    monkeypatch.setattr("ulfine_fast.backend._interpreting", lambda: False)
    with pytest.raises(RuntimeError, match=f"proto_logits: {name} needs a CUDA tensor, got cpu"):
        proto_logits(*inputs(5, 10, 17), backend=name)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be auto, reference, .*got 'tpu'"):
        proto_logits(*inputs(5, 10, 17), backend="tpu")


def test_use_backend_reaches_the_op() -> None:
    with use_backend("cpp"), pytest.raises(RuntimeError, match="cpp computes in float32"):
        proto_logits(*inputs(5, 10, 17, torch.float64))


def test_a_scale_may_be_a_whole_number_of_any_size(backend):
    x = torch.eye(2)
    assert proto_logits(x, x, 2**70, backend=backend)[0, 0] == 2.0**70
