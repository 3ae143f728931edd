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
    assert_same_outside_band,
    compiled,
    on_threads,
    seeded,
    unchanged,
)

from ulfine_fast import proto_logits, pseudo_label
from ulfine_fast.ops.pseudo_label import dual_logits_reference, fuse_logits_reference, pseudo_label_reference

THRESHOLD = 0.5


def inputs(b: int, c: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Features [B, D] around one class each, so that confidences spread over (0, 1); linear and prototypes."""
    generator = seeded(b, c, d)
    prototypes = torch.randn(c, d, generator=generator)
    linear = prototypes + 0.5 * torch.randn(c, d, generator=generator)
    near = prototypes[torch.randint(c, (b,), generator=generator)]
    features = near * torch.rand(b, 1, generator=generator) + torch.randn(b, d, generator=generator)
    return features.to(dtype), linear.to(dtype), prototypes.to(dtype)


def definition(features, linear, prototypes, threshold=THRESHOLD, rows=None, **changes):
    """`pseudo_label_reference` under the defaults of the public function."""
    rows = len(features) if rows is None else rows
    options = {
        "eta": 0.5,
        "linear_scale": 25.0,
        "proto_scale": 25.0,
        "temperature": 1.0,
        "normalize_linear": True,
    }
    align = torch.as_tensor(changes.pop("align", 1.0))
    threshold = torch.as_tensor(threshold).reshape(-1)
    adjustment = changes.pop("adjustment", None)
    return pseudo_label_reference(
        features, linear, prototypes, threshold, align, adjustment, *(options | changes).values(), rows
    )


def exact_and_distances(features, linear, prototypes, threshold, **changes):
    """The definition in float64, and how far each row is from a tie and from its threshold."""
    features, linear, prototypes = (t.double() for t in (features, linear, prototypes))
    exact = definition(
        features, linear, prototypes, torch.as_tensor(threshold, dtype=torch.float64), **changes
    )
    options = {"linear_scale": 25.0, "proto_scale": 25.0, "normalize_linear": True}
    branches = dual_logits_reference(
        features, linear, prototypes, *(changes.get(name, default) for name, default in options.items())
    )
    align = torch.as_tensor(changes.get("align", 1.0))
    z = fuse_logits_reference(*branches, changes.get("eta", 0.5), align)
    top = z.topk(min(2, z.shape[1]), dim=-1).values
    gap = top[:, 0] - top[:, 1] if z.shape[1] > 1 else torch.full((len(z),), math.inf)
    limit = torch.as_tensor(threshold, dtype=torch.float64)
    limit = limit[exact.label.clamp_min(0)] if limit.ndim else limit
    return exact, gap, torch.minimum(gap, (exact.confidence - limit).abs())


def assert_accurate(kernel, features, linear, prototypes, threshold=THRESHOLD, **changes):
    got = pseudo_label(features, linear, prototypes, threshold, backend=kernel, **changes)
    eager = definition(features, linear, prototypes, threshold, **changes)
    exact, gap, to_threshold = exact_and_distances(features, linear, prototypes, threshold, **changes)
    assert_same_outside_band(got.label, exact.label, gap)
    assert_same_outside_band(got.keep, exact.keep, to_threshold)
    assert_no_worse(got.confidence, eager.confidence, exact.confidence, scale=1.0)
    # A deviation is what remains of logits of up to 25.
    assert_no_worse(got.branch_scale, eager.branch_scale, exact.branch_scale, scale=25.0)
    assert_counts(got, linear.shape[0])


def assert_counts(got, classes):
    """The histograms are counts of the labels that were returned."""
    for histogram, rows in ((got.histogram, got.label >= 0), (got.kept_histogram, got.keep)):
        assert_same_bits(histogram, torch.bincount(got.label[rows], minlength=classes))


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


def plane(*angles: float) -> torch.Tensor:
    """Unit vectors [N, 2] at these angles in degrees."""
    radians = torch.tensor(angles).double().deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=-1).float()


def naive(features, linear, prototypes, limit, align, eta, linear_scale, proto_scale, temperature, normalize):
    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def unit(row):
        return [value / math.sqrt(dot(row, row)) for value in row]

    def spread(values):
        mean = sum(values) / len(values)
        return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))

    features, linear, prototypes = (t.tolist() for t in (features, linear, prototypes))
    label, confidence, keep, spreads = [], [], [], []
    histogram, kept_histogram = [0] * len(linear), [0] * len(linear)
    for row in features:
        zl = [linear_scale * dot(unit(row), unit(w) if normalize else w) for w in linear]
        zt = [proto_scale * dot(unit(row), unit(t)) for t in prototypes]
        z = [eta * a + (1 - eta) * align * b for a, b in zip(zl, zt, strict=True)]
        best = max(range(len(z)), key=lambda k: (z[k], -k))
        probability = 1 / sum(math.exp((other - z[best]) / temperature) for other in z)
        label.append(best)
        confidence.append(probability)
        keep.append(probability >= limit[best])
        histogram[best] += 1
        kept_histogram[best] += keep[-1]
        spreads.append((spread(zl), spread(zt)))
    scale = [sum(column) / len(spreads) for column in zip(*spreads, strict=True)]
    return label, confidence, keep, histogram, kept_histogram, scale


OPTIONS = [
    {},
    {"eta": 0.2, "align": 1.7, "linear_scale": 9.0, "proto_scale": 4.0},
    {"temperature": 3.0, "eta": 1.0},
    {"normalize_linear": False, "linear_scale": 2.0, "eta": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_result_follows_the_formula(backend, options) -> None:
    features, linear, prototypes = inputs(23, 6, 5)
    limit = torch.linspace(0.3, 0.9, 6)
    full = {"align": 1.0, "eta": 0.5, "linear_scale": 25.0, "proto_scale": 25.0, "temperature": 1.0} | options
    normalize = full.pop("normalize_linear", True)
    expected = naive(
        features.double(), linear.double(), prototypes.double(), limit.tolist(), *full.values(), normalize
    )
    got = pseudo_label(features, linear, prototypes, limit, backend=backend, **options)
    assert 0 < got.keep.sum() < 23
    assert got.label.tolist() == expected[0]
    torch.testing.assert_close(got.confidence, torch.tensor(expected[1]), rtol=1e-5, atol=1e-6)
    assert [part.tolist() for part in got[2:5]] == list(expected[2:5])
    torch.testing.assert_close(got.branch_scale, torch.tensor(expected[5]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("b", "c", "d"), SHAPES)
def test_no_less_accurate_than_eager(kernel, b, c, d, dtype) -> None:
    assert_accurate(kernel, *inputs(b, c, d, dtype))


def test_no_less_accurate_in_the_tiles_of_tf32(kernel, tf32) -> None:
    assert_accurate(kernel, *inputs(70, 300, 40), temperature=2.0)


def test_no_less_accurate_over_thousands_of_classes(kernel) -> None:
    assert_accurate(kernel, *inputs(5, 4500, 7), temperature=0.7)


@pytest.mark.parametrize("options", OPTIONS)
def test_no_less_accurate_than_eager_under_options(kernel, options) -> None:
    assert_accurate(kernel, *inputs(300, 37, 19), torch.linspace(0.1, 0.9, 37), **options)


@given(
    b=st.integers(0, 300),
    c=st.integers(1, 70),
    d=st.integers(1, 70),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
    align=st.sampled_from([0.0, 0.5, 3.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    rows=st.integers(0, 300),
    per_class=st.booleans(),
)
def test_any_shape_and_option_is_no_less_accurate_than_eager(
    kernel, b, c, d, eta, align, temperature, rows, per_class
) -> None:
    threshold = torch.linspace(0.1, 0.9, c) if per_class else 0.6
    options = {"eta": eta, "align": align, "temperature": temperature}
    features, linear, prototypes = inputs(b, c, d)
    got = pseudo_label(features, linear, prototypes, threshold, scale_rows=rows, backend=kernel, **options)
    eager = definition(features, linear, prototypes, threshold, rows=rows, **options)
    exact, gap, to_threshold = exact_and_distances(
        features, linear, prototypes, threshold, rows=rows, **options
    )
    assert_same_outside_band(got.label, exact.label, gap)
    assert_same_outside_band(got.keep, exact.keep, to_threshold)
    assert_no_worse(got.confidence, eager.confidence, exact.confidence, scale=1.0)
    assert_no_worse(got.branch_scale, eager.branch_scale, exact.branch_scale, scale=25.0)
    assert_counts(got, c)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout_gives_the_same_result(backend, layout) -> None:
    change = LAYOUTS[layout]
    arguments = *inputs(37, 19, 29), torch.linspace(0.2, 0.9, 19)
    expected = pseudo_label(*arguments, backend=backend)
    got = pseudo_label(*map(change, arguments), backend=backend)
    assert got.keep.any() and not got.keep.all()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_expanded_features(backend) -> None:
    features, linear, prototypes = inputs(1, 10, 17)
    got = pseudo_label(features.expand(8, 17), linear, prototypes, backend=backend)
    one = pseudo_label(features, linear, prototypes, backend=backend)
    assert got.label.tolist() == one.label.tolist() * 8
    assert_same_bits(got.histogram, one.histogram * 8)


def test_autocast_does_not_lower_the_arithmetic(backend) -> None:
    arguments = inputs(37, 10, 64)
    plain = pseudo_label(*arguments, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(pseudo_label(*arguments, backend=backend), plain)


def test_the_default_dtype_does_not_matter(backend) -> None:
    arguments = inputs(37, 10, 17)
    plain = pseudo_label(*arguments, 0.7, align=2.0, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        wide = pseudo_label(*arguments, 0.7, align=2.0, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(wide, plain)


# Label and confidence


@pytest.mark.parametrize("classes", [2, 3, 8, 17, 100, 1000])
def test_a_tie_takes_the_lowest_index(backend, classes) -> None:
    # From class `low` on, all classes are the feature itself, at a logit of exactly 25.
    for low in (0, 1, classes // 2, classes - 2):
        bank = plane(90).repeat(classes, 1)
        bank[low:] = plane(0)
        assert pseudo_label(plane(0), bank, bank, backend=backend).label.item() == low


def test_equal_logits_share_the_confidence(backend) -> None:
    got = pseudo_label(torch.ones(1, 3), torch.ones(4, 3), torch.ones(4, 3), 0.25, backend=backend)
    torch.testing.assert_close(got.confidence, torch.tensor([0.25]))
    assert got.label.item() == 0


def test_temperature_changes_the_confidence_and_not_the_label(backend) -> None:
    arguments = inputs(130, 10, 17)
    sharp, plain, soft = (pseudo_label(*arguments, temperature=t, backend=backend) for t in (0.5, 1.0, 2.0))
    assert torch.equal(plain.label, sharp.label) and torch.equal(plain.label, soft.label)
    assert (sharp.confidence >= plain.confidence).all() and (plain.confidence >= soft.confidence).all()
    assert (plain.confidence > soft.confidence).any()


@pytest.mark.parametrize(("eta", "alone"), [(1.0, "linear"), (0.0, "prototypes")])
def test_eta_one_is_the_linear_branch_and_zero_the_prototypes(backend, eta, alone) -> None:
    features, linear, prototypes = inputs(130, 10, 17)
    got = pseudo_label(
        features, linear, prototypes, eta=eta, linear_scale=9.0, proto_scale=4.0, align=1.5, backend=backend
    )
    bank, scale = {"linear": (linear, 9.0), "prototypes": (prototypes, 4.0 * 1.5)}[alone]
    probability = proto_logits(features, bank, scale, backend="reference").softmax(-1)
    assert torch.equal(got.label, probability.argmax(-1))
    torch.testing.assert_close(got.confidence, probability.amax(-1), rtol=1e-5, atol=1e-6)


def test_align_multiplies_the_prototype_branch(backend) -> None:
    arguments = inputs(130, 10, 17)
    aligned = pseudo_label(*arguments, align=torch.tensor(2.0), proto_scale=10.0, backend=backend)
    scaled = pseudo_label(*arguments, align=1.0, proto_scale=20.0, backend=backend)
    assert torch.equal(aligned.label, scaled.label)
    torch.testing.assert_close(aligned.confidence, scaled.confidence, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(aligned.branch_scale[1] * 2, scaled.branch_scale[1])


def test_one_class_is_certain(backend) -> None:
    features, linear, prototypes = inputs(5, 1, 17)
    got = pseudo_label(features, linear, prototypes, 1.0, backend=backend)
    assert got.label.tolist() == [0] * 5 and got.confidence.tolist() == [1.0] * 5 and got.keep.all()
    assert got.branch_scale.tolist() == [0.0, 0.0]


# Threshold


def test_a_threshold_met_exactly_keeps_the_row(backend) -> None:
    arguments = inputs(5, 10, 17)
    confidence = pseudo_label(*arguments, backend=backend).confidence[3]
    above = torch.nextafter(confidence, torch.ones(()))
    assert pseudo_label(*arguments, confidence, backend=backend).keep[3]
    assert not pseudo_label(*arguments, above, backend=backend).keep[3]


def test_a_number_and_a_scalar_tensor_are_one_threshold_for_all(backend) -> None:
    arguments = inputs(130, 10, 17)
    assert_same(
        pseudo_label(*arguments, 0.4, backend=backend),
        pseudo_label(*arguments, torch.tensor(0.4), backend=backend),
    )


def test_a_threshold_per_class_is_that_of_the_predicted_class(backend) -> None:
    arguments = inputs(130, 10, 17)
    limit = torch.zeros(10)
    limit[[2, 5, 7]] = 1.1
    got = pseudo_label(*arguments, limit, backend=backend)
    rejected = torch.isin(got.label, torch.tensor([2, 5, 7]))
    assert rejected.any()
    assert torch.equal(got.keep, ~rejected)


def test_threshold_zero_keeps_every_row(backend) -> None:
    got = pseudo_label(*inputs(130, 10, 17), 0.0, backend=backend)
    assert got.keep.all()
    assert_same_bits(got.kept_histogram, got.histogram)


def test_no_accepted_row_leaves_the_kept_histogram_empty(backend) -> None:
    got = pseudo_label(*inputs(130, 10, 17), torch.tensor(1.1), backend=backend)
    assert not got.keep.any() and not got.kept_histogram.any()
    assert got.histogram.sum() == 130


# Histograms and scales


def test_histograms_count_the_rows(backend) -> None:
    got = pseudo_label(*inputs(700, 10, 17), backend=backend)
    assert got.histogram.sum() == 700
    assert 0 < got.keep.sum() < 700
    assert_counts(got, 10)


def test_branch_scale_is_the_mean_deviation_over_classes(backend) -> None:
    # The branches see 4 classes at 0 or 90 degrees: cosines 1, 1, 0, 0 deviate by half, 1, 0, 0, 0 by sqrt(3)/4.
    linear, prototypes = plane(0, 0, 90, 90), plane(0, 90, 90, 90)
    got = pseudo_label(plane(0), linear, prototypes, linear_scale=8.0, proto_scale=3.0, backend=backend)
    torch.testing.assert_close(got.branch_scale, torch.tensor([4.0, 0.75 * math.sqrt(3)]))


@pytest.mark.parametrize("rows", [1, 36, 256, 300])
def test_scale_rows_measures_the_first_rows_alone(backend, rows) -> None:
    features, linear, prototypes = inputs(300, 10, 17)
    got = pseudo_label(features, linear, prototypes, scale_rows=rows, backend=backend)
    head = pseudo_label(features[:rows], linear, prototypes, backend=backend)
    torch.testing.assert_close(got.branch_scale, head.branch_scale, rtol=1e-6, atol=0)
    whole = pseudo_label(features, linear, prototypes, backend=backend)
    assert_same(got[:5], whole[:5])


def test_scale_rows_beyond_the_batch_are_all_rows(backend) -> None:
    arguments = inputs(37, 10, 17)
    assert_same(
        pseudo_label(*arguments, scale_rows=1000, backend=backend), pseudo_label(*arguments, backend=backend)
    )


def test_scale_rows_zero_gives_zeros(backend) -> None:
    got = pseudo_label(*inputs(37, 10, 17), scale_rows=0, backend=backend)
    assert got.branch_scale.tolist() == [0.0, 0.0]


# Degenerate rows


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 2, 259])
def test_a_row_that_is_not_finite_is_left_out_of_everything(backend, bad, row) -> None:
    features, linear, prototypes = inputs(260, 10, 17)
    features[row, 3] = bad
    got = pseudo_label(features, linear, prototypes, 0.0, backend=backend)
    assert (got.label[row], got.confidence[row], got.keep[row]) == (-1, 0.0, False)
    rest = torch.arange(260) != row
    others = pseudo_label(features[rest], linear, prototypes, 0.0, backend=backend)
    assert torch.equal(got.label[rest], others.label) and got.keep[rest].all()
    assert_same_bits(got.histogram, others.histogram)
    assert_same_bits(got.kept_histogram, others.kept_histogram)
    torch.testing.assert_close(got.branch_scale, others.branch_scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bank", [0, 1])
def test_a_class_that_is_not_finite_leaves_no_label(backend, bank) -> None:
    features, *banks = inputs(5, 10, 17)
    banks[bank][4, 1] = math.nan
    linear, prototypes = banks
    got = pseudo_label(features, linear, prototypes, 0.0, backend=backend)
    assert got.label.tolist() == [-1] * 5 and not got.keep.any() and not got.histogram.any()
    assert got.branch_scale.tolist() == [0.0, 0.0]


def test_a_zero_feature_is_equally_likely_everywhere(backend) -> None:
    features, linear, prototypes = inputs(5, 10, 17)
    features[2] = 0
    got = pseudo_label(features, linear, prototypes, backend=backend)
    assert got.label[2] == 0
    torch.testing.assert_close(got.confidence[2], torch.tensor(0.1))


def test_rows_without_dimensions_are_equally_likely_everywhere(backend) -> None:
    found = pseudo_label(torch.zeros(2, 0), torch.zeros(4, 0), torch.zeros(4, 0), backend=backend)
    assert found.confidence.tolist() == [0.25, 0.25] and not found.branch_scale.any()


def test_a_zero_prototype_has_logit_zero(backend) -> None:
    # Cosines 0 and -1: the class without direction wins with 1 / (1 + exp(-25)).
    got = pseudo_label(
        plane(0), torch.zeros(2, 2), torch.tensor([[-1.0, 0.0], [0.0, 0.0]]), eta=0.0, backend=backend
    )
    assert got.label.item() == 1
    torch.testing.assert_close(got.branch_scale, torch.tensor([0.0, 12.5]))


def test_no_rows_give_empty_labels_and_zero_counts(backend) -> None:
    got = pseudo_label(*inputs(0, 10, 17), backend=backend)
    assert [list(part.shape) for part in got] == [[0], [0], [0], [10], [10], [2]]
    assert (
        not got.histogram.any() and not got.kept_histogram.any() and got.branch_scale.tolist() == [0.0, 0.0]
    )


# Transformations


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_the_result(backend, dtype) -> None:
    got = pseudo_label(*inputs(5, 10, 17, dtype), backend=backend)
    assert [part.dtype for part in got[:5]] == [
        torch.int64,
        torch.float32,
        torch.bool,
        torch.int64,
        torch.int64,
    ]
    assert got.branch_scale.dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_adjustment_is_added_to_the_fused_logits(backend, temperature) -> None:
    features, linear, prototypes = inputs(40, 10, 17)
    share = torch.linspace(0.0, 1.0, 10)
    share[3] = 0.0
    adjustment = 3.0 * share.log()
    options = {"align": 0.8, "eta": 0.3, "temperature": temperature}
    got = pseudo_label(features, linear, prototypes, 0.5, adjustment=adjustment, backend=backend, **options)
    zl, zt = dual_logits_reference(features, linear, prototypes, 25.0, 25.0, True)
    z = fuse_logits_reference(zl, zt, 0.3, torch.tensor(0.8)) + adjustment
    confidence, label = (z / temperature).softmax(-1).max(-1)
    assert torch.equal(got.label, label)
    torch.testing.assert_close(got.confidence, confidence)
    assert not got.histogram[[0, 3]].any()
    plain = pseudo_label(features, linear, prototypes, 0.5, backend=backend, **options)
    assert not torch.equal(got.label, plain.label)
    torch.testing.assert_close(got.branch_scale, plain.branch_scale)


def test_a_shift_of_minus_infinity_removes_a_class(backend) -> None:
    # More classes than a kernel takes at a time.
    features, linear, prototypes = inputs(5, 300, 17)
    adjustment = torch.zeros(300)
    adjustment[:290] = -math.inf
    got = pseudo_label(features, linear, prototypes, adjustment=adjustment, backend=backend)
    rest = pseudo_label(features, linear[290:], prototypes[290:], backend=backend)
    assert torch.equal(got.label, rest.label + 290)
    torch.testing.assert_close(got.confidence, rest.confidence)


def test_adjustment_errors() -> None:
    arguments = inputs(5, 10, 17)
    with pytest.raises(ValueError, match=r"pseudo_label: adjustment must be \[10\], got \[9\]"):
        pseudo_label(*arguments, adjustment=torch.zeros(9))
    with pytest.raises(TypeError, match="pseudo_label: adjustment must be a tensor, got float"):
        pseudo_label(*arguments, adjustment=0.5)


def test_nothing_of_the_result_requires_grad(backend) -> None:
    arguments = [t.requires_grad_() for t in inputs(5, 10, 17)]
    got = pseudo_label(*arguments, align=torch.ones((), requires_grad=True), backend=backend)
    assert not any(part.requires_grad for part in got)


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("thresholds", [1, 10])
def test_opcheck(kernel, layout, thresholds) -> None:
    change = LAYOUTS.get(layout, torch.clone)
    arguments = *map(change, inputs(5, 10, 17)), torch.full((thresholds,), 0.3), torch.tensor(1.5)
    arguments += (torch.zeros(10) if thresholds > 1 else None,)
    torch.library.opcheck(
        torch.ops.ulfine._pseudo_label.default, (*arguments, 0.5, 25.0, 25.0, 1.0, True, 4, kernel)
    )


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(kernel, engine) -> None:
    arguments = inputs(37, 10, 17)
    function = compiled(pseudo_label, backend=engine)
    assert_same(function(*arguments, backend=kernel), pseudo_label(*arguments, backend=kernel))


def test_compiled_once_for_every_batch_size(kernel) -> None:
    function = compiled(pseudo_label, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9):
            arguments = inputs(rows, 10, 17)
            assert_same(function(*arguments, backend=kernel), pseudo_label(*arguments, backend=kernel))


# Memory, threads, arguments


@example(b=0, c=3, d=5, rows=9, threads=1)
@example(b=1, c=1, d=1, rows=9, threads=2)
@example(b=300, c=101, d=67, rows=9, threads=3)
@given(
    b=st.integers(0, 300),
    c=st.integers(1, 130),
    d=st.integers(1, 130),
    threads=st.sampled_from([1, 2, 3]),
    rows=st.sampled_from([None, 0, 3, 100]),
)
def test_every_output_is_written_and_nothing_else(poisoned, kernel, b, c, d, threads, rows) -> None:
    def call():
        return pseudo_label(*arguments, scale_rows=rows, backend=kernel)

    arguments = inputs(b, c, d)
    assert_same(on_threads(threads, lambda: poisoned(call)), call())


@pytest.mark.parametrize(("b", "c", "d"), [(130, 100, 64), (700, 11, 33)])
def test_same_bits_in_every_run_and_for_every_thread_count(kernel, b, c, d) -> None:
    arguments = inputs(b, c, d)
    first = pseudo_label(*arguments, backend=kernel)
    for threads in (1, 2, 3):
        assert_same(on_threads(threads, lambda: pseudo_label(*arguments, backend=kernel)), first)


def test_a_row_does_not_depend_on_the_rest_of_the_batch(kernel) -> None:
    features, linear, prototypes = inputs(300, 19, 29)
    whole = pseudo_label(features, linear, prototypes, backend=kernel)
    tail = pseudo_label(features[250:], linear, prototypes, backend=kernel)
    # Cuda multiplies by a library, which may take another way for another number of rows.
    same = torch.testing.assert_close if kernel == "cuda" else assert_same_bits
    for one, other in zip(tail[:3], whole[:3], strict=True):
        same(one, other[250:])


def test_arguments_are_unchanged(backend) -> None:
    arguments = *inputs(37, 10, 17), torch.linspace(0, 1, 10)
    align = torch.tensor(1.5)
    with unchanged(*arguments, align):
        pseudo_label(*arguments, align=align, backend=backend)


# Errors

X, BANK = torch.ones(2, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], BANK, BANK), {}, ValueError, r"features must be \[any, any\], got \[3\]"),
        ((X, BANK[:, :2], BANK), {}, ValueError, r"linear must be \[any, 3\], got \[4, 2\]"),
        ((X, BANK[:0], BANK[:0]), {}, ValueError, "linear must have at least one class"),
        ((X, BANK, BANK[:3]), {}, ValueError, r"prototypes must be \[4, 3\], got \[3, 3\]"),
        ((X.long(), BANK, BANK), {}, TypeError, "features must be float32.*got int64"),
        ((X, BANK, BANK.bool()), {}, TypeError, "prototypes must be float32.*got bool"),
        ((X, BANK.to("meta"), BANK), {}, ValueError, "linear must be on cpu like the rest, got meta"),
        ((X, BANK, BANK.to("meta")), {}, ValueError, "prototypes must be on cpu like the rest, got meta"),
        ((X, BANK, BANK, torch.ones(3)), {}, ValueError, r"threshold must be \[4\], got \[3\]"),
        ((X, BANK, BANK, torch.ones(4).long()), {}, TypeError, "threshold must be float32.*got int64"),
        ((X, BANK, BANK, torch.ones(4).to("meta")), {}, ValueError, "threshold must be on cpu.*meta"),
        ((X, BANK, BANK, 1.5), {}, ValueError, r"threshold must be in \[0, 1\], got 1.5"),
        ((X, BANK, BANK, math.nan), {}, ValueError, r"threshold must be in \[0, 1\], got nan"),
        ((X, BANK, BANK), {"eta": -0.1}, ValueError, r"eta must be in \[0, 1\], got -0.1"),
        ((X, BANK, BANK), {"eta": math.nan}, ValueError, r"eta must be in \[0, 1\], got nan"),
        (
            (X, BANK, BANK),
            {"align": torch.ones(2)},
            ValueError,
            r"align must be a number or a scalar tensor, got \[2\]",
        ),
        ((X, BANK, BANK), {"align": torch.ones((), device="meta")}, ValueError, "align must be on cpu.*meta"),
        (
            (X, BANK, BANK),
            {"linear_scale": math.nan},
            ValueError,
            "linear_scale must be a finite number above 0, got nan",
        ),
        (
            (X, BANK, BANK),
            {"proto_scale": 0.0},
            ValueError,
            "proto_scale must be a finite number above 0, got 0",
        ),
        (
            (X, BANK, BANK),
            {"temperature": 0.0},
            ValueError,
            "temperature must be a finite number above 0, got 0",
        ),
        ((X, BANK, BANK, 0.7j), {}, TypeError, "threshold must be a number, got complex"),
        ((X, BANK, BANK, torch.tensor(0.7j)), {}, TypeError, "threshold must be .*got complex64"),
        ((X, BANK, BANK), {"adjustment": [0.0] * 4}, TypeError, "adjustment must be a tensor, got list"),
        ((X, BANK, BANK), {"scale_rows": 1.5}, TypeError, "scale_rows must be a whole number, got float"),
        ((X, BANK, BANK), {"scale_rows": -1}, ValueError, "scale_rows must be at least 0, got -1"),
    ],
)
def test_bad_arguments(arguments, options, error, message) -> None:
    with pytest.raises(error, match=f"pseudo_label: {message}"):
        pseudo_label(*arguments, **options)


def test_a_kernel_refuses_float64(kernel) -> None:
    with pytest.raises(RuntimeError, match=f"pseudo_label: {kernel} computes in float32, got float64"):
        pseudo_label(*inputs(5, 10, 17, torch.float64), backend=kernel)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be auto, reference, .*got 'tpu'"):
        pseudo_label(*inputs(5, 10, 17), backend="tpu")


def test_a_row_of_minus_infinities_has_no_label(backend) -> None:
    linear = torch.full((3, 1), -float("inf"))
    found = pseudo_label(
        torch.ones(2, 1), linear, torch.ones(3, 1), eta=1.0, normalize_linear=False, backend=backend
    )
    assert found.label.tolist() == [-1, -1]
    assert not found.keep.any()
    assert not found.histogram.any()


def test_a_row_that_may_be_no_class_still_measures_the_branches(backend) -> None:
    arguments = inputs(5, 10, 17)
    found = pseudo_label(*arguments, adjustment=torch.full((10,), -math.inf), backend=backend)
    assert (found.label == -1).all() and not found.confidence.any() and not found.histogram.any()
    assert_same_bits(found.branch_scale, pseudo_label(*arguments, backend=backend).branch_scale)


def test_a_large_whole_number_is_an_align(backend) -> None:
    found = [pseudo_label(*inputs(5, 10, 17), align=a, backend=backend) for a in (2**70, 2.0**70)]
    assert_same_bits(found[0].label, found[1].label)


def test_align_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="pseudo_label: align must be finite in float32, got nan"):
        pseudo_label(torch.ones(2, 1), torch.ones(3, 1), torch.ones(3, 1), align=float("nan"))
