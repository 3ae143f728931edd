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

from ulfine_fast import orthogonality
from ulfine_fast.ops.orthogonality import orthogonality_reference

# (C, D) of the shared list, and both sides of C = D, where the two ways to sum meet.
SIZES = (*dict.fromkeys(shape[1:] for shape in SHAPES), (16, 16), (17, 16), (16, 17), (300, 31), (31, 300))


def inputs(c: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Prototypes of many norms around a common direction, as text features are."""
    generator = seeded(c, d)
    prototypes = torch.randn(c, d, generator=generator) + 0.5 * torch.randn(1, d, generator=generator)
    return (prototypes * torch.logspace(-0.5, 0.5, c)[:, None]).to(dtype)


def run(prototypes, function=orthogonality, **options):
    """Value and gradient."""
    leaf = prototypes.detach().requires_grad_()
    value = function(leaf, **options)
    return value, torch.autograd.grad(value, leaf)[0]


def assert_accurate(kernel, prototypes):
    got = run(prototypes, backend=kernel)
    eager = run(prototypes, function=orthogonality_reference)
    exact = run(prototypes.double(), function=orthogonality_reference)
    # A cosine is a sum of size 1, and its square is off by twice the cosine times what the sum is off.
    assert_no_worse(got[0], eager[0], exact[0], scale=2 * exact[0].sqrt().item())
    # The gradient of a row is a mean of cosines over its norm, less the part along the row.
    norms = prototypes.double().norm(dim=-1)
    assert_no_worse(got[1], eager[1], exact[1], scale=4 / len(prototypes) / norms[norms > 0].min().item())


def naive(prototypes):
    rows = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in prototypes.tolist()]
    classes = len(rows)
    total = 0.0
    for j in range(classes):
        for k in range(classes):
            if j != k:
                total += sum(a * b for a, b in zip(rows[j], rows[k], strict=True)) ** 2
    return total / (classes * (classes - 1)) if classes > 1 else 0.0


@pytest.mark.parametrize(("c", "d"), [(1, 3), (2, 3), (5, 3), (3, 5), (9, 9)])
def test_value_is_the_mean_squared_cosine_of_two_classes(backend, c, d) -> None:
    prototypes = inputs(c, d)
    value = orthogonality(prototypes, backend=backend)
    assert value.item() == pytest.approx(naive(prototypes.double()), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c", "d"), SIZES)
def test_no_less_accurate_than_eager(kernel, c, d, dtype) -> None:
    assert_accurate(kernel, inputs(c, d, dtype))


@given(c=st.integers(1, 90), d=st.integers(1, 90), zeros=st.booleans())
def test_any_shape_is_no_less_accurate_than_eager(kernel, c, d, zeros) -> None:
    prototypes = inputs(c, d)
    if zeros:
        prototypes[1::3] = 0
    assert_accurate(kernel, prototypes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "d"), [(19, 29), (29, 19)])
def test_any_memory_layout_gives_the_same_result(backend, layout, c, d) -> None:
    prototypes = inputs(c, d)
    expected = run(prototypes, backend=backend)
    for one, other in zip(run(LAYOUTS[layout](prototypes), backend=backend), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_autocast_does_not_lower_the_arithmetic(backend) -> None:
    def lowered(*args, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return orthogonality(*args, **options)

    prototypes = inputs(10, 64)
    plain = run(prototypes, backend=backend)
    for one, other in zip(run(prototypes, function=lowered, backend=backend), plain, strict=True):
        assert_same_bits(one, other)


def test_the_default_dtype_does_not_matter(backend) -> None:
    plain = run(inputs(10, 17), backend=backend)
    prototypes = inputs(10, 17)
    torch.set_default_dtype(torch.float64)
    try:
        wide = run(prototypes, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(wide, plain, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_is_float32_and_gradient_has_the_dtype_of_the_prototypes(backend, dtype) -> None:
    value, gradient = run(inputs(10, 17, dtype), backend=backend)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)


# Known values


@pytest.mark.parametrize("c", [2, 7, 64])
def test_orthogonal_prototypes_have_value_and_gradient_zero(backend, c) -> None:
    value, gradient = run(5 * torch.eye(c, 64), backend=backend)
    assert value.item() == 0.0 and not gradient.any()


@pytest.mark.parametrize(("c", "d"), [(5, 9), (9, 5)])
def test_equal_prototypes_have_value_one(backend, c, d) -> None:
    value, gradient = run(torch.ones(c, d), backend=backend)
    assert value.item() == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(gradient, torch.zeros(c, d), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("c", "d"), [(4, 2), (64, 16)])
def test_more_classes_than_dimensions_reach_the_floor(backend, c, d) -> None:
    frame = torch.eye(d).repeat(c // d, 1)
    assert orthogonality(frame, backend=backend).item() == pytest.approx((c - d) / (d * (c - 1)), rel=1e-6)


def test_opposite_prototypes_count_like_equal_ones(backend) -> None:
    value = orthogonality(torch.tensor([[1.0, 2.0], [-3.0, -6.0]]), backend=backend)
    assert value.item() == pytest.approx(1.0, rel=1e-6)


def test_near_orthogonal_prototypes_keep_their_digits(backend) -> None:
    # cos = 1e-4 everywhere off the diagonal: the value 1e-8 is what is left of a sum of 64.
    gram = torch.eye(64, dtype=torch.float64).mul(1 - 1e-4) + 1e-4
    prototypes = torch.linalg.cholesky(gram).float()
    assert orthogonality(prototypes, backend=backend).item() == pytest.approx(1e-8, rel=1e-2)


def test_value_is_never_negative(backend) -> None:
    # A zero row makes the D x D side the smaller one, where the value is a difference that rounds to either sign.
    for seed in range(8):
        frame = torch.linalg.qr(torch.randn(16, 16, generator=seeded(seed)))[0]
        value = orthogonality(torch.cat([frame, torch.zeros(1, 16)]), backend=backend).item()
        assert 0.0 <= value < 1e-6


def test_norms_do_not_matter(backend) -> None:
    prototypes = inputs(10, 17)
    value = orthogonality(prototypes, backend=backend)
    torch.testing.assert_close(
        orthogonality(prototypes * torch.logspace(-3, 3, 10)[:, None], backend=backend), value
    )


def test_gradient_is_orthogonal_to_the_prototype(backend) -> None:
    prototypes = inputs(10, 17)
    _, gradient = run(prototypes, backend=backend)
    torch.testing.assert_close((gradient * prototypes).sum(-1), torch.zeros(10), rtol=0, atol=1e-6)
    assert (gradient.norm(dim=-1) > 1e-4).all()


# Degenerate cases


@pytest.mark.parametrize("factor", [1.0, math.nan])
@pytest.mark.parametrize("d", [1, 17])
def test_one_class_has_value_and_gradient_zero(backend, d, factor) -> None:
    value, gradient = run(factor * inputs(1, d), backend=backend)
    assert value.item() == 0.0 and not gradient.any()


def test_rows_without_dimensions_have_value_zero(backend) -> None:
    value, gradient = run(torch.zeros(3, 0), backend=backend)
    assert value.item() == 0.0 and gradient.shape == (3, 0)


@pytest.mark.parametrize(("c", "d"), [(5, 9), (9, 5)])
def test_a_zero_row_has_cosine_zero_with_all_and_no_gradient(backend, c, d) -> None:
    prototypes = inputs(c, d)
    value = orthogonality(torch.cat([prototypes[:2], prototypes[3:]]), backend=backend).item()
    prototypes[2] = 0
    got, gradient = run(prototypes, backend=backend)
    assert got.item() == pytest.approx(value * (c - 2) / c, rel=1e-5)
    assert not gradient[2].any() and gradient[3].any()


@pytest.mark.parametrize(("c", "d"), [(5, 9), (9, 5)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_makes_the_value_nan(backend, bad, c, d) -> None:
    prototypes = inputs(c, d)
    prototypes[2, 1] = bad
    assert orthogonality(prototypes, backend=backend).isnan()


# Gradients and transformations


@pytest.mark.parametrize(("c", "d"), [(1, 3), (4, 5), (5, 4)])
def test_gradcheck(c, d) -> None:
    assert torch.autograd.gradcheck(orthogonality, inputs(c, d, torch.float64).requires_grad_())


def test_gradient_follows_the_factor_on_the_value(backend) -> None:
    prototypes = inputs(10, 17)
    _, once = run(prototypes, backend=backend)
    _, thrice = run(prototypes, function=lambda p: orthogonality(p, backend=backend) * 3)
    torch.testing.assert_close(thrice, once * 3)


def test_two_backward_calls_add_up(backend) -> None:
    leaf = inputs(10, 17).requires_grad_()
    value = orthogonality(leaf, backend=backend)
    value.backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close(leaf.grad, 2 * run(leaf, backend=backend)[1])


def test_a_kernel_refuses_a_second_derivative(kernel) -> None:
    leaf = inputs(10, 17).requires_grad_()
    value = orthogonality(leaf, backend=kernel)
    (first,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="orthogonality: kernels have no second derivative"):
        torch.autograd.grad(value + first.square().sum(), leaf)


def test_the_reference_has_a_second_derivative() -> None:
    leaf = inputs(4, 3).double().requires_grad_()
    assert torch.autograd.gradgradcheck(orthogonality_reference, leaf)


@pytest.mark.parametrize(("c", "d"), [(7, 48), (100, 512), (300, 48)])
def test_value_is_at_most_one(backend, c, d) -> None:
    row = torch.randn(1, d, generator=seeded(c, d))
    assert 1 - 1e-5 < orthogonality(row.repeat(c, 1), backend=backend).item() <= 1


def test_no_gradient_without_a_leaf(backend) -> None:
    assert not orthogonality(inputs(5, 10), backend=backend).requires_grad


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize(("c", "d"), [(5, 9), (9, 5)])
def test_opcheck(kernel, layout, c, d) -> None:
    prototypes = LAYOUTS.get(layout, torch.clone)(inputs(c, d))
    torch.library.opcheck(torch.ops.ulfine._orthogonality.default, (prototypes, kernel))


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", [None, "transposed"])
def test_compiles_without_a_graph_break(kernel, engine, layout) -> None:
    prototypes = LAYOUTS.get(layout, torch.clone)(inputs(10, 17))
    got = run(prototypes, function=compiled(orthogonality, backend=engine), backend=kernel)
    for one, other in zip(got, run(prototypes, backend=kernel), strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_once_for_every_number_of_classes(kernel) -> None:
    function = compiled(orthogonality, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for classes in (5, 9):
            prototypes = inputs(classes, 17)
            got = run(prototypes, function=function, backend=kernel)
            for one, other in zip(got, run(prototypes, backend=kernel), strict=True):
                torch.testing.assert_close(one, other)


# Memory, threads, arguments


@example(c=1, d=1, threads=1)
@example(c=67, d=131, threads=2)
@example(c=131, d=67, threads=3)
@given(c=st.integers(1, 150), d=st.integers(1, 150), threads=st.sampled_from([1, 2, 3]))
def test_every_output_is_written_and_nothing_else(poisoned, kernel, c, d, threads) -> None:
    prototypes = inputs(c, d)
    expected = run(prototypes, backend=kernel)
    got = on_threads(threads, lambda: poisoned(lambda: run(prototypes, backend=kernel)))
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize(("c", "d"), [(100, 130), (700, 33)])
def test_same_bits_in_every_run_and_for_every_thread_count(kernel, c, d) -> None:
    prototypes = inputs(c, d)
    first = run(prototypes, backend=kernel)
    for threads in (1, 2, 3):
        again = on_threads(threads, lambda: run(prototypes, backend=kernel))
        for one, other in zip(again, first, strict=True):
            assert_same_bits(one, other)


def test_the_argument_is_unchanged(backend) -> None:
    prototypes = inputs(10, 17)
    with unchanged(prototypes):
        run(prototypes, backend=backend)


# Errors


@pytest.mark.parametrize(
    ("prototypes", "error", "message"),
    [
        (torch.ones(3), ValueError, r"prototypes must be \[any, any\], got \[3\]"),
        (torch.ones(0, 3), ValueError, "prototypes must have at least one class"),
        (torch.ones(2, 3).long(), TypeError, "prototypes must be float32.*got int64"),
        ([[1.0]], TypeError, "prototypes must be a tensor, got list"),
    ],
)
def test_bad_arguments(prototypes, error, message) -> None:
    with pytest.raises(error, match=f"orthogonality: {message}"):
        orthogonality(prototypes)


def test_a_kernel_refuses_float64(kernel) -> None:
    with pytest.raises(RuntimeError, match=f"orthogonality: {kernel} computes in float32, got float64"):
        orthogonality(inputs(5, 9, torch.float64), backend=kernel)


def test_cpp_refuses_another_device() -> None:
    with pytest.raises(RuntimeError, match="orthogonality: cpp needs a CPU tensor, got meta"):
        orthogonality(inputs(5, 9).to("meta"), backend="cpp")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be auto, reference, .*got 'tpu'"):
        orthogonality(inputs(5, 9), backend="tpu")
