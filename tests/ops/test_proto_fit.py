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
from torch import nn

from ulfine_fast import FittedPrototypes, proto_fit, proto_fit_
from ulfine_fast.ops.proto_fit import proto_fit_reference

RATES = {"mu": 0.3, "beta": 0.7, "gamma": 0.8}


def inputs(b: int, c: int, d: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A batch in which some classes are absent, and a state in which every other class was seen."""
    generator = seeded(b, c, d)
    targets = torch.randint(c, (b,), generator=generator)
    targets[targets % 5 == 3] = 0
    targets[2::6] = -1
    seen = torch.arange(c) % 2 == 0
    distribution = torch.rand(c, generator=generator)
    return {
        "features": (torch.randn(b, d, generator=generator) * torch.logspace(-1, 1, b)[:, None]).to(dtype),
        "targets": targets,
        "histogram": torch.randint(9, (c,), generator=generator),
        "textual": torch.randn(c, d, generator=generator),
        "visual": torch.randn(c, d, generator=generator) * seen[:, None],
        "seen": seen,
        "distribution": distribution / distribution.sum(),
    }


def state_of(arguments) -> FittedPrototypes:
    return FittedPrototypes(*(arguments[name] for name in FittedPrototypes._fields))


def widened(arguments):
    return {name: t.double() if t.is_floating_point() else t for name, t in arguments.items()}


def assert_accurate(kernel, arguments, rates=RATES):
    got = proto_fit(**arguments, **rates, backend=kernel)
    eager = proto_fit_reference(*arguments.values(), *rates.values())
    exact = proto_fit_reference(*widened(arguments).values(), *rates.values())
    assert torch.equal(got.seen, exact.seen)
    for name in ("textual", "visual", "distribution"):
        assert_no_worse(*(getattr(state, name) for state in (got, eager, exact)))


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


def assert_no_step(got, arguments):
    """The textual prototypes of the classes in the batch are their own directions."""
    present = torch.isin(torch.arange(len(got.textual)), arguments["targets"])
    direction = torch.nn.functional.normalize(arguments["textual"], dim=-1)
    torch.testing.assert_close(got.textual[present], direction[present])


def naive(features, targets, histogram, textual, visual, seen, distribution, mu, beta, gamma):
    def unit(row):
        norm = math.sqrt(sum(value * value for value in row))
        return [value / norm for value in row]

    def blend(a, x, y):
        return [a * one + (1 - a) * other for one, other in zip(x, y, strict=True)]

    features, targets, histogram, textual, visual, seen, distribution = (
        t.tolist() for t in (features, targets, histogram, textual, visual, seen, distribution)
    )
    total = sum(histogram)
    share = [gamma * p + (1 - gamma) * h / total for p, h in zip(distribution, histogram, strict=True)]
    for k in set(targets) - {-1}:
        mine = [unit(row) for row, target in zip(features, targets, strict=True) if target == k]
        mean = [sum(column) / len(mine) for column in zip(*mine, strict=True)]
        visual[k] = blend(beta, visual[k], mean) if seen[k] else mean
        seen[k] = True
        alpha = mu * share[k] / max(share)
        textual[k] = unit(blend(alpha, unit(visual[k]), unit(textual[k])))
    return textual, visual, seen, share


@pytest.mark.parametrize(("b", "c", "d"), [(13, 6, 5), (30, 4, 2)])
def test_state_follows_the_formula(backend, b, c, d) -> None:
    arguments = inputs(b, c, d)
    expected = naive(**widened(arguments), **RATES)
    got = proto_fit(**arguments, **RATES, backend=backend)
    assert not torch.equal(got.textual, arguments["textual"])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), torch.tensor(other).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("b", "c", "d"), SHAPES)
def test_no_less_accurate_than_eager(kernel, b, c, d, dtype) -> None:
    assert_accurate(kernel, inputs(b, c, d, dtype))


@given(
    b=st.integers(0, 600),
    c=st.integers(1, 70),
    d=st.integers(1, 70),
    mu=st.sampled_from([0.0, 0.05, 1.0]),
    beta=st.sampled_from([0.0, 0.9, 1.0]),
    gamma=st.sampled_from([0.0, 0.99, 1.0]),
    floats=st.booleans(),
)
def test_any_shape_and_rate_is_no_less_accurate_than_eager(kernel, b, c, d, mu, beta, gamma, floats) -> None:
    arguments = inputs(b, c, d)
    if floats:
        arguments["histogram"] = arguments["histogram"] / 7
    assert_accurate(kernel, arguments, {"mu": mu, "beta": beta, "gamma": gamma})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout_gives_the_same_state(backend, layout) -> None:
    arguments = inputs(37, 19, 29)
    moved = {name: LAYOUTS[layout](tensor) for name, tensor in arguments.items()}
    expected = proto_fit(**arguments, **RATES, backend=backend)
    for one, other in zip(proto_fit(**moved, **RATES, backend=backend), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_expanded_features(backend) -> None:
    arguments = inputs(1, 10, 17)
    many = arguments | {
        "features": arguments["features"].expand(8, 17),
        "targets": arguments["targets"].expand(8),
    }
    expected = proto_fit(**arguments, **RATES, backend=backend)
    for one, other in zip(proto_fit(**many, **RATES, backend=backend), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_autocast_does_not_lower_the_arithmetic(backend) -> None:
    arguments = inputs(37, 10, 64)
    plain = proto_fit(**arguments, **RATES, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(proto_fit(**arguments, **RATES, backend=backend), plain)


def test_the_default_dtype_does_not_matter(backend) -> None:
    arguments = inputs(37, 10, 17)
    plain = proto_fit(**arguments, **RATES, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        wide = proto_fit(**arguments, **RATES, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(wide, plain)


# Which classes move, and how far


def test_only_the_classes_of_the_batch_change(backend) -> None:
    arguments = inputs(37, 19, 29)
    absent = ~torch.isin(torch.arange(19), arguments["targets"])
    assert absent.any() and arguments["distribution"][absent].any()
    got = proto_fit(**arguments, **RATES, backend=backend)
    for name in ("textual", "visual", "seen"):
        assert_same_bits(getattr(got, name)[absent], arguments[name][absent])
    assert (got.textual != arguments["textual"])[~absent].any(-1).all()


def test_a_class_that_is_never_labelled_stays_text(backend) -> None:
    arguments = inputs(37, 19, 29)
    arguments["targets"][arguments["targets"] == 4] = 5
    start = state_of(arguments)
    state = start
    for _ in range(5):
        state = proto_fit(**(arguments | state._asdict()), **RATES, backend=backend)
    assert_same_bits(state.textual[4], start.textual[4])
    assert state.distribution[4] > 0


def test_a_class_seen_for_the_first_time_starts_at_its_mean(backend) -> None:
    arguments = inputs(37, 10, 17)
    arguments["seen"] = torch.zeros(10, dtype=torch.bool)
    arguments["visual"] = torch.full((10, 17), math.nan)
    got = proto_fit(**arguments, **RATES, backend=backend)
    mine = arguments["features"][arguments["targets"] == 4]
    mean = torch.nn.functional.normalize(mine, dim=-1).mean(0)
    torch.testing.assert_close(got.visual[4], mean)
    assert got.seen[4]


def test_a_seen_class_moves_by_one_minus_beta(backend) -> None:
    arguments = inputs(1, 1, 2) | {
        "features": torch.tensor([[0.0, 3.0]]),
        "targets": torch.tensor([0]),
        "visual": torch.tensor([[1.0, 0.0]]),
        "seen": torch.tensor([True]),
    }
    got = proto_fit(**arguments, beta=0.9, backend=backend)
    torch.testing.assert_close(got.visual, torch.tensor([[0.9, 0.1]]))


def test_features_count_by_direction_and_not_by_norm(backend) -> None:
    arguments = inputs(37, 10, 17)
    longer = arguments | {"features": arguments["features"] * torch.linspace(1, 50, 37)[:, None]}
    expected = proto_fit(**arguments, **RATES, backend=backend)
    for one, other in zip(proto_fit(**longer, **RATES, backend=backend), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_most_predicted_class_takes_the_whole_step_mu(backend) -> None:
    # With mu = 1 that class lands on its visual prototype; one with half the share lands half way.
    arguments = {
        "features": torch.tensor([[0.0, 2.0], [0.0, 2.0]]),
        "targets": torch.tensor([0, 1]),
        "histogram": torch.tensor([8, 4]),
        "textual": torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
        "visual": torch.zeros(2, 2),
        "seen": torch.zeros(2, dtype=torch.bool),
        "distribution": torch.zeros(2),
    }
    got = proto_fit(**arguments, mu=1.0, backend=backend)
    torch.testing.assert_close(got.textual, torch.tensor([[0.0, 1.0], [math.sqrt(0.5)] * 2]))


def test_one_class_that_takes_every_prediction_leaves_the_others_at_their_text(backend) -> None:
    arguments = inputs(37, 10, 17) | {"histogram": torch.zeros(10).long(), "distribution": torch.zeros(10)}
    arguments["histogram"][6] = 99
    got = proto_fit(**arguments, **RATES, backend=backend)
    assert got.distribution.argmax() == 6 and got.distribution.count_nonzero() == 1
    direction = torch.nn.functional.normalize(arguments["textual"], dim=-1)
    present = torch.isin(torch.arange(10), arguments["targets"])
    assert present[6]
    present[6] = False
    torch.testing.assert_close(got.textual[present], direction[present])
    assert (got.textual[6] - direction[6]).norm() > 0.1


def test_the_share_of_a_class_that_is_no_longer_predicted_decays(backend) -> None:
    arguments = inputs(0, 2, 3) | {
        "histogram": torch.tensor([5, 0]),
        "distribution": torch.tensor([0.0, 1.0]),
    }
    got = proto_fit(**arguments, gamma=0.9, backend=backend)
    torch.testing.assert_close(got.distribution, torch.tensor([0.1, 0.9]))


def test_touched_prototypes_have_unit_norm(backend) -> None:
    arguments = inputs(37, 10, 17)
    present = torch.isin(torch.arange(10), arguments["targets"])
    got = proto_fit(**arguments, **RATES, backend=backend)
    torch.testing.assert_close(got.textual[present].norm(dim=-1), torch.ones(int(present.sum())))


def test_mu_zero_changes_no_direction(backend) -> None:
    arguments = inputs(37, 10, 17)
    got = proto_fit(**arguments, mu=0.0, backend=backend)
    cosine = torch.nn.functional.cosine_similarity(got.textual, arguments["textual"])
    torch.testing.assert_close(cosine, torch.ones(10))


def test_a_histogram_of_counts_and_of_shares_are_the_same(backend) -> None:
    arguments = inputs(37, 10, 17)
    shares = arguments | {"histogram": arguments["histogram"] / arguments["histogram"].sum()}
    expected = proto_fit(**arguments, **RATES, backend=backend)
    for one, other in zip(proto_fit(**shares, **RATES, backend=backend), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


# Degenerate cases


def test_a_histogram_of_tiny_shares_is_that_of_its_ratios(backend) -> None:
    arguments = inputs(5, 2, 3) | {"histogram": torch.tensor([1e-35, 3e-35]), "distribution": torch.zeros(2)}
    got = proto_fit(**arguments, **RATES | {"gamma": 0.0}, backend=backend)
    torch.testing.assert_close(got.distribution, torch.tensor([0.25, 0.75]))


def test_a_tiny_distribution_takes_its_whole_step(backend) -> None:
    arguments = inputs(13, 6, 5)
    arguments["histogram"] = torch.zeros(6)
    tiny = arguments | {"distribution": 1e-33 * arguments["distribution"]}
    got, expected = (proto_fit(**a, **RATES, backend=backend).textual for a in (tiny, arguments))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rate", [0.9999, 0.999999])
def test_a_rate_near_one_leaves_its_share_to_what_is_new(backend, rate) -> None:
    arguments = inputs(13, 6, 5)
    arguments |= {name: 0 * arguments[name] for name in ("distribution", "visual")}
    arguments["seen"] = torch.ones(6, dtype=torch.bool)
    rates = RATES | {"beta": rate, "gamma": rate}
    got = proto_fit(**arguments, **rates, backend=backend)
    exact = proto_fit_reference(*widened(arguments).values(), *rates.values())
    for one, other in ((got.distribution, exact.distribution), (got.visual, exact.visual)):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_an_empty_histogram_leaves_the_distribution_bit_by_bit(backend) -> None:
    arguments = inputs(37, 10, 17) | {"histogram": torch.zeros(10).long()}
    got = proto_fit(**arguments, **RATES, backend=backend)
    assert_same_bits(got.distribution, arguments["distribution"])
    assert not torch.equal(got.textual, arguments["textual"])


def test_a_distribution_of_zeros_takes_no_step_and_does_not_divide(backend) -> None:
    arguments = inputs(37, 10, 17) | {"histogram": torch.zeros(10).long(), "distribution": torch.zeros(10)}
    got = proto_fit(**arguments, **RATES, backend=backend)
    assert not got.distribution.any()
    assert_no_step(got, arguments)
    assert not torch.equal(got.visual, arguments["visual"])


def test_a_distribution_with_a_nan_takes_no_step(backend) -> None:
    arguments = inputs(37, 10, 17) | {"histogram": torch.zeros(10).long()}
    arguments["distribution"][4] = math.nan
    got = proto_fit(**arguments, **RATES, backend=backend)
    assert got.distribution.isnan().sum() == 1
    assert_no_step(got, arguments)


def test_a_blend_that_cancels_keeps_the_old_prototype_bit_by_bit(backend) -> None:
    arguments = inputs(2, 2, 2) | {
        "features": torch.tensor([[-2.0, 0.0], [-2.0, 0.1]]),
        "targets": torch.tensor([0, 1]),
        "histogram": torch.tensor([1, 1]),
        "textual": torch.tensor([[3.0, 0.0], [3.0, 0.0]]),
        "seen": torch.zeros(2, dtype=torch.bool),
        "distribution": torch.zeros(2),
    }
    got = proto_fit(**arguments, mu=0.5, backend=backend)
    assert got.textual[0].tolist() == [3.0, 0.0]
    assert got.visual[0].tolist() == [-1.0, 0.0] and got.seen.all()
    torch.testing.assert_close(got.textual[1], torch.tensor([0.025, 1.0]), rtol=0, atol=1e-3)


def test_a_class_whose_features_cancel_keeps_its_text(backend) -> None:
    arguments = inputs(2, 1, 2) | {
        "features": torch.tensor([[1.0, 0.0], [-5.0, 0.0]]),
        "targets": torch.tensor([0, 0]),
        "textual": torch.tensor([[3.0, 4.0]]),
        "seen": torch.zeros(1, dtype=torch.bool),
    }
    got = proto_fit(**arguments, **RATES, backend=backend)
    assert got.visual.tolist() == [[0.0, 0.0]] and got.textual.tolist() == [[3.0, 4.0]] and got.seen.all()


def test_a_zero_feature_has_no_direction(backend) -> None:
    arguments = inputs(1, 1, 2) | {
        "features": torch.tensor([[0.0, 2.0], [0.0, 0.0]]),
        "targets": torch.tensor([0, 0]),
        "seen": torch.zeros(1, dtype=torch.bool),
    }
    got = proto_fit(**arguments, **RATES, backend=backend)
    torch.testing.assert_close(got.visual, torch.tensor([[0.0, 0.5]]))


def test_a_zero_text_prototype_becomes_the_visual_one(backend) -> None:
    arguments = inputs(1, 1, 2) | {
        "features": torch.tensor([[0.0, 2.0]]),
        "targets": torch.tensor([0]),
        "histogram": torch.tensor([3]),
        "textual": torch.zeros(1, 2),
        "seen": torch.zeros(1, dtype=torch.bool),
    }
    got = proto_fit(**arguments, **RATES, backend=backend)
    torch.testing.assert_close(got.textual, torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("marker", [-1, -2, -(2**40)])
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
def test_a_row_without_label_takes_no_part(backend, marker, bad) -> None:
    arguments = inputs(37, 10, 17)
    ignored = arguments["targets"] < 0
    rest = {name: t[~ignored] if name in ("features", "targets") else t for name, t in arguments.items()}
    arguments["targets"][ignored] = marker
    arguments["features"][ignored] = bad
    got = proto_fit(**arguments, **RATES, backend=backend)
    for one, other in zip(got, proto_fit(**rest, **RATES, backend=backend), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_no_rows_update_the_distribution_alone(backend) -> None:
    arguments = inputs(0, 10, 17)
    got = proto_fit(**arguments, **RATES, backend=backend)
    for name in ("textual", "visual", "seen"):
        assert_same_bits(getattr(got, name), arguments[name])
    share = arguments["histogram"] / arguments["histogram"].sum()
    torch.testing.assert_close(got.distribution, 0.8 * arguments["distribution"] + 0.2 * share)


def test_one_class_and_one_dimension(backend) -> None:
    arguments = inputs(5, 1, 1) | {"targets": torch.zeros(5).long(), "features": torch.full((5, 1), -3.0)}
    arguments |= {"textual": torch.ones(1, 1), "seen": torch.zeros(1, dtype=torch.bool)}
    got = proto_fit(**arguments, mu=0.9, backend=backend)
    assert got.visual.tolist() == [[-1.0]] and got.textual.tolist() == [[-1.0]]


# In place and out of place


def test_out_of_place_leaves_its_arguments(backend) -> None:
    arguments = inputs(37, 10, 17)
    with unchanged(*arguments.values()):
        proto_fit(**arguments, **RATES, backend=backend)


def test_out_of_place_results_share_no_memory_with_the_arguments(backend) -> None:
    arguments = inputs(37, 10, 17)
    got = proto_fit(**arguments, **RATES, backend=backend)
    with unchanged(*state_of(arguments)):
        for tensor in got:
            tensor.zero_()


def test_in_place_is_out_of_place_written_into_the_state(backend) -> None:
    arguments = inputs(37, 10, 17)
    expected = proto_fit(**arguments, **RATES, backend=backend)
    assert proto_fit_(**arguments, **RATES, backend=backend) is None
    assert_same(state_of(arguments), expected)


def test_in_place_changes_the_four_state_tensors_alone(backend) -> None:
    arguments = inputs(37, 10, 17)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    arguments["seen"].zero_()
    with unchanged(*(arguments[name] for name in ("features", "targets", "histogram"))):
        proto_fit_(**arguments, **RATES, backend=backend)
    for name in ("textual", "visual", "distribution"):
        assert not torch.equal(arguments[name], before[name])
    assert arguments["seen"].any()


def test_in_place_bumps_the_version_of_the_state(backend) -> None:
    arguments = inputs(37, 10, 17)
    arguments["textual"] = nn.Parameter(arguments["textual"])
    before = [tensor._version for tensor in state_of(arguments)]
    proto_fit_(**arguments, **RATES, backend=backend)
    assert all(t._version > version for t, version in zip(state_of(arguments), before, strict=True))


def test_in_place_on_a_parameter_that_a_graph_has_saved_is_noticed(backend) -> None:
    arguments = inputs(37, 10, 17)
    textual = arguments["textual"] = nn.Parameter(arguments["textual"])
    loss = textual.square().sum()
    proto_fit_(**arguments, **RATES, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_keeps_a_parameter_a_leaf_with_its_gradient(backend) -> None:
    arguments = inputs(37, 10, 17)
    textual = arguments["textual"] = nn.Parameter(arguments["textual"])
    textual.grad = torch.ones_like(textual)
    proto_fit_(**arguments, **RATES, backend=backend)
    assert textual.is_leaf and textual.requires_grad and (textual.grad == 1).all()


@pytest.mark.parametrize("name", ["textual", "visual", "seen", "distribution"])
def test_in_place_needs_contiguous_state(backend, name) -> None:
    arguments = inputs(37, 10, 17)
    arguments[name] = LAYOUTS["strided"](arguments[name])
    with pytest.raises(ValueError, match=f"proto_fit_: {name} must be contiguous"):
        proto_fit_(**arguments, backend=backend)


def test_in_place_on_a_row_range_of_a_larger_state(backend) -> None:
    arguments = inputs(37, 10, 17)
    expected = proto_fit(**arguments, **RATES, backend=backend)
    moved = {name: LAYOUTS["offset"](tensor) for name, tensor in arguments.items()}
    proto_fit_(**moved, **RATES, backend=backend)
    assert_same(state_of(moved), expected)


def test_the_state_has_no_graph(backend) -> None:
    arguments = inputs(37, 10, 17)
    for name in ("features", "textual"):
        arguments[name].requires_grad_()
    assert not any(tensor.requires_grad for tensor in proto_fit(**arguments, **RATES, backend=backend))


def test_float64_state_stays_float64() -> None:
    got = proto_fit(**widened(inputs(37, 10, 17)), **RATES)
    assert [tensor.dtype for tensor in got] == [torch.float64, torch.float64, torch.bool, torch.float64]


# Transformations, memory, threads


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_opcheck(kernel, layout) -> None:
    arguments = inputs(5, 10, 17)
    for name in ("features", "targets", "histogram"):
        arguments[name] = LAYOUTS.get(layout, torch.clone)(arguments[name])
    torch.library.opcheck(
        torch.ops.ulfine._proto_fit_.default, (*arguments.values(), *RATES.values(), kernel)
    )


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(kernel, engine) -> None:
    arguments = inputs(37, 10, 17)
    function = compiled(proto_fit, backend=engine)
    expected = proto_fit(**arguments, **RATES, backend=kernel)
    with unchanged(*state_of(arguments)):
        assert_same(function(**arguments, **RATES, backend=kernel), expected)


def test_compiles_in_place_without_a_graph_break(kernel) -> None:
    arguments = inputs(37, 10, 17)
    arguments["textual"] = nn.Parameter(arguments["textual"])
    expected = proto_fit(**arguments, **RATES, backend=kernel)
    compiled(proto_fit_, backend="aot_eager")(**arguments, **RATES, backend=kernel)
    assert_same(state_of(arguments), expected)


def test_compiled_once_for_every_batch_size(kernel) -> None:
    function = compiled(proto_fit, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9):
            arguments = inputs(rows, 10, 17)
            assert_same(
                function(**arguments, **RATES, backend=kernel),
                proto_fit(**arguments, **RATES, backend=kernel),
            )


@example(b=0, c=3, d=5, threads=1)
@example(b=1, c=1, d=1, threads=2)
@example(b=300, c=101, d=67, threads=3)
@given(
    b=st.integers(0, 300), c=st.integers(1, 130), d=st.integers(1, 130), threads=st.sampled_from([1, 2, 3])
)
def test_no_scratch_is_read_before_it_is_written(poisoned, kernel, b, c, d, threads) -> None:
    arguments = inputs(b, c, d)
    expected = proto_fit(**arguments, **RATES, backend=kernel)
    got = on_threads(threads, lambda: poisoned(lambda: proto_fit(**arguments, **RATES, backend=kernel)))
    assert_same(got, expected)


@pytest.mark.parametrize(("b", "c", "d"), [(130, 100, 64), (2000, 11, 33)])
def test_same_bits_in_every_run_and_for_every_thread_count(kernel, b, c, d) -> None:
    arguments = inputs(b, c, d)
    first = proto_fit(**arguments, **RATES, backend=kernel)
    for threads in (1, 2, 3):
        assert_same(on_threads(threads, lambda: proto_fit(**arguments, **RATES, backend=kernel)), first)


# Errors

GOOD = {
    "features": torch.ones(2, 3),
    "targets": torch.tensor([0, -1]),
    "histogram": torch.ones(4).long(),
    "textual": torch.ones(4, 3),
    "visual": torch.zeros(4, 3),
    "seen": torch.zeros(4, dtype=torch.bool),
    "distribution": torch.zeros(4),
}


@pytest.mark.parametrize("function", [proto_fit, proto_fit_])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": torch.ones(3)}, ValueError, r"features must be \[any, any\], got \[3\]"),
        ({"features": torch.ones(2, 3).long()}, TypeError, "features must be float32.*got int64"),
        ({"textual": torch.ones(4, 2)}, ValueError, r"textual must be \[any, 3\], got \[4, 2\]"),
        ({"textual": torch.ones(0, 3)}, ValueError, "textual must have at least one class"),
        ({"textual": torch.ones(4, 3).half()}, TypeError, "textual must be float32 or float64, got float16"),
        ({"targets": torch.tensor([0])}, ValueError, r"targets must be \[2\], got \[1\]"),
        ({"targets": torch.tensor([4, 0])}, ValueError, "targets must be below 4 classes, got 4 at row 0"),
        ({"targets": torch.tensor([0, 0]).int()}, TypeError, "targets must be int64, got int32"),
        ({"histogram": torch.ones(3).long()}, ValueError, r"histogram must be \[4\], got \[3\]"),
        ({"histogram": torch.ones(4).half()}, TypeError, "histogram must be int64 or float32, got float16"),
        ({"visual": torch.ones(4, 2)}, ValueError, r"visual must be \[4, 3\], got \[4, 2\]"),
        ({"visual": torch.ones(4, 3).double()}, TypeError, "visual must be float32, got float64"),
        ({"seen": torch.zeros(4)}, TypeError, "seen must be bool, got float32"),
        ({"distribution": torch.zeros(4).double()}, TypeError, "distribution must be float32, got float64"),
        (
            {"visual": torch.ones(4, 3, device="meta")},
            ValueError,
            "visual must be on cpu like the rest, got meta",
        ),
        (
            {"targets": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "targets must be on cpu.*meta",
        ),
        ({"mu": torch.tensor(0.5)}, TypeError, "mu must be a number, got Tensor"),
        ({"mu": 1.5}, ValueError, r"mu must be in \[0, 1\], got 1.5"),
        ({"beta": -0.5}, ValueError, r"beta must be in \[0, 1\], got -0.5"),
        ({"gamma": math.nan}, ValueError, r"gamma must be in \[0, 1\], got nan"),
    ],
)
def test_bad_arguments(function, changes, error, message) -> None:
    with pytest.raises(error, match=f"proto_fit: {message}"):
        function(**(GOOD | changes))


def test_a_failed_call_in_place_leaves_the_state(backend) -> None:
    arguments = inputs(37, 10, 17)
    arguments["targets"][0] = 10
    with unchanged(*state_of(arguments)), pytest.raises(ValueError, match="targets must be below 10"):
        proto_fit_(**arguments, backend=backend)


def test_a_kernel_refuses_float64(kernel) -> None:
    with pytest.raises(RuntimeError, match=f"proto_fit: {kernel} computes in float32, got float64"):
        proto_fit(**widened(inputs(5, 10, 17)), backend=kernel)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be auto, reference, .*got 'tpu'"):
        proto_fit(**inputs(5, 10, 17), backend="tpu")
