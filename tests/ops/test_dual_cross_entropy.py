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
from torch.nn import functional as F

from ulfine_fast import dual_cross_entropy, proto_logits

MODES = ("branches", "fused")


def inputs(b: int, c: int, d: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Rows around their class, a third without label or of weight 0; the arguments of the op by name."""
    generator = seeded(b, c, d)
    prototypes = torch.randn(c, d, generator=generator)
    linear = prototypes + 0.5 * torch.randn(c, d, generator=generator)
    targets = torch.randint(c, (b,), generator=generator)
    features = prototypes[targets] + 2 * torch.randn(b, d, generator=generator)
    weights = torch.rand(b, generator=generator) / max(b, 1)
    targets[2::6] = -1
    weights[4::6] = 0
    return {
        "features": features.to(dtype),
        "targets": targets,
        "linear": linear.to(dtype),
        "prototypes": prototypes.to(dtype),
        "weights": weights,
    }


def grouped(b: int, c: int, groups: int = 3) -> dict[str, torch.Tensor]:
    """Adjustment [G, C] and a group in -1..G-1 for each row."""
    generator = seeded(b, c, groups)
    return {
        "adjustment": torch.randn(groups, c, generator=generator),
        "group": torch.randint(-1, groups, (b,), generator=generator),
    }


def run(arguments, **options):
    """Loss and its gradients for the features and the linear probe."""
    arguments = dict(arguments)
    function = options.pop("function", dual_cross_entropy)
    leaves = [arguments.pop(name).detach().requires_grad_() for name in ("features", "linear")]
    loss = function(leaves[0], linear=leaves[1], **arguments, **options)
    return loss, *torch.autograd.grad(loss, leaves)


def widened(arguments):
    return {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }


def assert_accurate(kernel, arguments, **options):
    got = run(arguments, backend=kernel, **options)
    eager = run(arguments, backend="reference", **options)
    exact = run(widened(arguments), backend="reference", **options)
    # The loss sums weight * nats, each a difference of logits of up to 25 and rounded like them. A gradient sums
    # weight * scale / norm over rows or over classes; its probability and its direction are both rounded.
    weight = arguments["weights"].abs()
    norms = arguments["features"].double().norm(dim=-1), arguments["linear"].double().norm(dim=-1)
    on_loss = max(exact[0].abs().item(), 3 * weight.sum().item())
    logit = 2 * 25.0 * max(1.0, options.get("align", 1.0))
    on_features = logit * weight.amax().item() / norms[0].amin().item() if len(weight) else 0.0
    on_linear = logit * weight.square().sum().sqrt().item() / norms[1].amin().item()
    for one, scale in zip(
        zip(got, eager, exact, strict=True), (on_loss, on_features, on_linear), strict=True
    ):
        assert_no_worse(*one, scale=scale)


def naive(
    features, targets, linear, prototypes, weights, adjustment, group, align, eta, scales, fused, normalize
):
    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def unit(row):
        return [value / math.sqrt(dot(row, row)) for value in row]

    def entropy(z, y):
        return math.log(sum(math.exp(value) for value in z)) - z[y]

    loss = 0.0
    for i, row in enumerate(features.tolist()):
        y = targets[i].item()
        if y < 0:
            continue
        shift = [0.0] * len(linear) if group[i] < 0 else adjustment[group[i]].tolist()
        zl = [scales[0] * dot(unit(row), unit(w) if normalize else w) for w in linear.tolist()]
        zt = [scales[1] * dot(unit(row), unit(t)) for t in prototypes.tolist()]
        branches = (
            [[eta * a + (1 - eta) * align * b for a, b in zip(zl, zt, strict=True)]] if fused else [zl, zt]
        )
        loss += weights[i].item() * sum(
            entropy([a + s for a, s in zip(z, shift, strict=True)], y) for z in branches
        )
    return loss


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_loss_follows_the_formula(backend, mode, normalize) -> None:
    arguments = inputs(13, 6, 5) | grouped(13, 6)
    expected = naive(
        **arguments, align=1.7, eta=0.2, scales=(9.0, 4.0), fused=mode == "fused", normalize=normalize
    )
    options = {"align": 1.7, "eta": 0.2, "linear_scale": 9.0, "proto_scale": 4.0}
    loss = dual_cross_entropy(
        **arguments, **options, loss_on=mode, normalize_linear=normalize, backend=backend
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("b", "c", "d"), SHAPES)
def test_no_less_accurate_than_eager(kernel, b, c, d, dtype, mode) -> None:
    assert_accurate(kernel, inputs(b, c, d, dtype), loss_on=mode)


@pytest.mark.parametrize(
    "options", [{"eta": 0.3, "align": 2.5}, {"normalize_linear": False, "linear_scale": 2.0}]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_less_accurate_than_eager_under_options(kernel, dtype, mode, options) -> None:
    assert_accurate(kernel, inputs(300, 37, 19, dtype) | grouped(300, 37), loss_on=mode, **options)


@pytest.mark.parametrize("mode", MODES)
def test_no_less_accurate_over_thousands_of_classes(kernel, mode) -> None:
    assert_accurate(kernel, inputs(3, 2500, 2), loss_on=mode)


@pytest.mark.parametrize(("b", "c", "d"), [(64, 8142, 512), (4096, 100, 512), (256, 1000, 512)])
def test_long_sums_are_no_less_accurate_on_the_processor(b, c, d) -> None:
    arguments = unweighted(b, c, d)
    # Every row has a part.
    arguments["targets"].abs_()
    got, eager = (run(arguments, backend=name) for name in ("cpp", "reference"))
    exact = run(widened(arguments), backend="reference")
    for one in zip(got, eager, exact, strict=True):
        assert_no_worse(*one)


@given(
    b=st.integers(0, 300),
    c=st.integers(1, 70),
    d=st.integers(2, 70),
    mode=st.sampled_from(MODES),
    groups=st.integers(0, 4),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
    align=st.sampled_from([0.0, 0.5, 3.0]),
)
def test_any_shape_and_option_is_no_less_accurate_than_eager(
    kernel, b, c, d, mode, groups, eta, align
) -> None:
    arguments = inputs(b, c, d) | (grouped(b, c, groups) if groups else {})
    assert_accurate(kernel, arguments, loss_on=mode, eta=eta, align=align)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_any_memory_layout_gives_the_same_result(backend, layout, mode) -> None:
    arguments = inputs(37, 19, 29) | grouped(37, 19)
    expected = run(arguments, loss_on=mode, backend=backend)
    moved = {name: LAYOUTS[layout](tensor) for name, tensor in arguments.items()}
    for one, other in zip(run(moved, loss_on=mode, backend=backend), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_expanded_features(backend) -> None:
    one = inputs(1, 10, 17) | {"weights": torch.ones(1)}
    many = {name: t.expand(8, *t.shape[1:]) if len(t) == 1 else t for name, t in one.items()}
    loss, d_features, d_linear = run(many, backend=backend)
    expected = run(one, backend=backend)
    torch.testing.assert_close(loss, 8 * expected[0])
    torch.testing.assert_close(d_features, expected[1].expand(8, 17))
    torch.testing.assert_close(d_linear, 8 * expected[2])


@pytest.mark.parametrize("mode", MODES)
def test_autocast_does_not_lower_the_arithmetic(backend, mode) -> None:
    def lowered(*args, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return dual_cross_entropy(*args, **options)

    arguments = inputs(37, 10, 64)
    plain = run(arguments, loss_on=mode, backend=backend)
    got = run(arguments, function=lowered, loss_on=mode, backend=backend)
    for one, other in zip(got, plain, strict=True):
        assert_same_bits(one, other)


def test_the_default_dtype_does_not_matter(backend) -> None:
    arguments = inputs(37, 10, 17)
    del arguments["weights"]
    plain = run(arguments, align=2.0, loss_on="fused", backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        wide = run(arguments, align=2.0, loss_on="fused", backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(wide, plain, strict=True):
        assert_same_bits(one, other)


# What the loss is


def branch_losses(arguments, linear_scale=25.0, proto_scale=25.0, shift=0.0):
    """Mean cross-entropy of either branch by PyTorch's own function."""
    return [
        F.cross_entropy(
            proto_logits(arguments["features"], arguments[bank], scale, backend="reference") + shift,
            arguments["targets"],
            ignore_index=-1,
            reduction="sum",
        )
        / len(arguments["targets"])
        for bank, scale in (("linear", linear_scale), ("prototypes", proto_scale))
    ]


def unweighted(b, c, d):
    arguments = inputs(b, c, d)
    del arguments["weights"]
    return arguments


def test_branches_is_the_sum_of_both_cross_entropies(backend) -> None:
    arguments = unweighted(37, 10, 17)
    loss = dual_cross_entropy(**arguments, linear_scale=9.0, proto_scale=4.0, backend=backend)
    torch.testing.assert_close(loss, sum(branch_losses(arguments, 9.0, 4.0)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("eta", "branch"), [(1.0, 0), (0.0, 1)])
def test_fused_with_eta_one_is_the_linear_branch_and_zero_the_prototypes(backend, eta, branch) -> None:
    arguments = unweighted(37, 10, 17)
    loss = dual_cross_entropy(**arguments, eta=eta, loss_on="fused", backend=backend)
    torch.testing.assert_close(loss, branch_losses(arguments)[branch], rtol=1e-5, atol=0)


def test_fused_with_eta_zero_passes_no_gradient_to_the_linear_probe(backend) -> None:
    _, d_features, d_linear = run(unweighted(37, 10, 17), eta=0.0, loss_on="fused", backend=backend)
    assert not d_linear.any() and d_features.any()


def test_branches_do_not_depend_on_eta_and_align(backend) -> None:
    arguments = inputs(37, 10, 17)
    plain = run(arguments, backend=backend)
    for one, other in zip(run(arguments, eta=0.9, align=3.0, backend=backend), plain, strict=True):
        assert_same_bits(one, other)


def test_fused_aligns_the_prototype_branch(backend) -> None:
    arguments = inputs(37, 10, 17)
    aligned = run(arguments, align=torch.tensor(2.0), proto_scale=10.0, loss_on="fused", backend=backend)
    scaled = run(arguments, align=1.0, proto_scale=20.0, loss_on="fused", backend=backend)
    for one, other in zip(aligned, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_no_weights_are_one_over_the_rows(backend) -> None:
    arguments = unweighted(37, 10, 17)
    loss = dual_cross_entropy(**arguments, backend=backend)
    assert_same_bits(
        loss, dual_cross_entropy(**arguments, weights=torch.full((37,), 1 / 37), backend=backend)
    )


@pytest.mark.parametrize("mode", MODES)
def test_one_adjustment_for_all_rows(backend, mode) -> None:
    arguments = inputs(37, 10, 17)
    shift = grouped(37, 10)["adjustment"][0]
    vector = run(arguments, adjustment=shift, loss_on=mode, backend=backend)
    matrix = run(arguments, adjustment=shift[None], loss_on=mode, backend=backend)
    everyone = run(arguments, adjustment=shift, group=torch.zeros(37).long(), loss_on=mode, backend=backend)
    for one, two, three in zip(vector, matrix, everyone, strict=True):
        assert_same_bits(one, two)
        assert_same_bits(one, three)


def test_adjustment_is_added_to_the_logits(backend) -> None:
    arguments = unweighted(37, 10, 17)
    shift = torch.randn(10, generator=seeded(4))
    loss = dual_cross_entropy(**arguments, adjustment=shift, backend=backend)
    torch.testing.assert_close(loss, sum(branch_losses(arguments, shift=shift)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_groups_are_losses_of_their_own(backend, mode) -> None:
    arguments, groups = inputs(37, 10, 17), grouped(37, 10)
    together = run(arguments | groups, loss_on=mode, backend=backend)
    total = [torch.zeros_like(part) for part in together]
    for index, shift in zip((-1, 0, 1, 2), (torch.zeros(10), *groups["adjustment"]), strict=True):
        mine = groups["group"] == index
        assert mine.any()
        alone = arguments | {"weights": arguments["weights"] * mine, "adjustment": shift}
        total = [t + part for t, part in zip(total, run(alone, loss_on=mode, backend=backend), strict=True)]
    for one, other in zip(together, total, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_group_without_shift_is_the_loss_without_adjustment(backend) -> None:
    arguments = inputs(37, 10, 17)
    groups = grouped(37, 10) | {"group": torch.full((37,), -1)}
    for one, other in zip(
        run(arguments | groups, backend=backend), run(arguments, backend=backend), strict=True
    ):
        assert_same_bits(one, other)


def test_a_shift_of_minus_infinity_removes_a_class(backend) -> None:
    arguments = unweighted(37, 10, 17)
    arguments["targets"] = arguments["targets"].clamp(max=8)
    shift = torch.zeros(10)
    shift[9] = -math.inf
    removed = run(arguments, adjustment=shift, backend=backend)
    nine = {name: t[:9] if name in ("linear", "prototypes") else t for name, t in arguments.items()}
    expected = run(nine, backend=backend)
    torch.testing.assert_close(removed[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(removed[1], expected[1], rtol=1e-4, atol=1e-6)
    assert not removed[2][9].any()


def test_an_adjustment_of_a_row_without_part_is_not_used(backend) -> None:
    arguments = inputs(6, 4, 5) | {"group": torch.tensor([0, 0, 1, 0, 1, 0])}
    assert arguments["targets"][2] < 0 and arguments["weights"][4] == 0
    shift = torch.zeros(2, 4)
    shift[1] = -math.inf
    for one, other in zip(
        run(arguments, adjustment=shift, backend=backend),
        run(arguments, adjustment=0 * shift[:1].repeat(2, 1), backend=backend),
        strict=True,
    ):
        assert_same_bits(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_without_a_class_is_not_a_number(backend, mode) -> None:
    arguments = unweighted(3, 10, 17) | {"group": torch.tensor([-1, 0, -1])}
    loss, d_features, d_linear = run(
        arguments, adjustment=torch.full((10,), -math.inf), loss_on=mode, backend=backend
    )
    assert loss.isnan() and d_linear.isnan().all()
    assert d_features.isnan().all(-1).tolist() == [False, True, False]


def test_eta_near_one_leaves_its_share_to_the_prototypes(backend) -> None:
    arguments = unweighted(37, 10, 17)
    options = {"loss_on": "fused", "eta": 0.999999, "proto_scale": 2e6, "linear_scale": 1e-3}
    got = run(arguments, backend=backend, **options)
    exact = run(widened(arguments), backend="reference", **options)
    for one, other in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("norm", [1e-5, 1e15, 1e18])
def test_the_gradient_of_a_row_of_any_norm_is_tangent(backend, norm) -> None:
    arguments = unweighted(5, 10, 17)
    direction = torch.nn.functional.normalize(arguments["features"], dim=-1)
    _, expected, _ = run(arguments | {"features": direction}, backend=backend)
    _, d_features, _ = run(arguments | {"features": norm * direction}, backend=backend)
    torch.testing.assert_close(
        norm * d_features, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
    )


def test_a_shift_of_minus_infinity_removes_thousands_of_classes(backend) -> None:
    # More classes than a kernel takes at a time.
    arguments = unweighted(3, 2100, 2)
    arguments["targets"] = torch.tensor([2090, 2095, 2099])
    shift = torch.zeros(2100)
    shift[:2090] = -math.inf
    removed = run(arguments, adjustment=shift, backend=backend)
    ten = {name: t[2090:] if name in ("linear", "prototypes") else t for name, t in arguments.items()}
    expected = run(ten | {"targets": arguments["targets"] - 2090}, backend=backend)
    torch.testing.assert_close(removed[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(removed[1], expected[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(removed[2][2090:], expected[2], rtol=1e-4, atol=1e-6)


# Rows that take no part


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reason", ["weight 0", "target -1", "target -2"])
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
def test_an_unused_row_contributes_exactly_nothing(backend, mode, reason, bad) -> None:
    arguments = inputs(37, 10, 17) | grouped(37, 10)
    used = (arguments["targets"] >= 0) & (arguments["weights"] != 0)
    arguments["targets"] = arguments["targets"].clamp_min(0)
    arguments["weights"] = torch.where(used, arguments["weights"], 0.0 if reason == "weight 0" else 1.0)
    if reason != "weight 0":
        arguments["targets"][~used] = int(reason.split()[1])
    expected = run(arguments, loss_on=mode, backend=backend)
    arguments["features"] = torch.where(used[:, None], arguments["features"], bad)
    loss, d_features, d_linear = run(arguments, loss_on=mode, backend=backend)
    assert_same_bits(loss, expected[0])
    assert_same_bits(d_linear, expected[2])
    assert not d_features[~used].any()
    assert d_features[used].any(-1).all()


def test_a_row_without_label_may_have_a_weight_that_is_not_finite(backend) -> None:
    arguments = inputs(37, 10, 17)
    expected = run(arguments, backend=backend)
    arguments["weights"][arguments["targets"] < 0] = math.nan
    for one, other in zip(run(arguments, backend=backend), expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_no_accepted_row_gives_loss_zero_and_a_valid_graph(backend, mode) -> None:
    arguments = inputs(37, 10, 17) | {"weights": torch.zeros(37)}
    loss, d_features, d_linear = run(arguments, loss_on=mode, backend=backend)
    assert loss.item() == 0.0
    assert not d_features.any() and not d_linear.any()


@pytest.mark.parametrize("weights", [None, torch.zeros(0)])
def test_no_rows_give_loss_zero_and_zero_gradients(backend, weights) -> None:
    loss, d_features, d_linear = run(inputs(0, 10, 17) | {"weights": weights}, backend=backend)
    assert loss.item() == 0.0
    assert d_features.shape == (0, 17) and d_linear.shape == (10, 17) and not d_linear.any()


# Degenerate rows that take part


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_used_row_that_is_not_finite_makes_the_loss_nan(backend, bad) -> None:
    arguments = inputs(37, 10, 17)
    arguments["features"][0, 3] = bad
    assert dual_cross_entropy(**arguments, backend=backend).isnan()


def test_one_class_costs_nothing(backend) -> None:
    loss, d_features, d_linear = run(unweighted(5, 1, 17), backend=backend)
    assert loss.item() == 0.0 and not d_features.any() and not d_linear.any()


@pytest.mark.parametrize("mode", MODES)
def test_a_zero_feature_is_equally_likely_everywhere_and_gets_no_gradient(backend, mode) -> None:
    arguments = inputs(1, 10, 17) | {"features": torch.zeros(1, 17), "weights": torch.ones(1)}
    loss, d_features, d_linear = run(arguments, loss_on=mode, backend=backend)
    assert loss.item() == pytest.approx((1 + (mode == "branches")) * math.log(10), rel=1e-6)
    assert not d_features.any() and not d_linear.any()


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_dimensions_are_equally_likely_everywhere(backend, mode) -> None:
    loss, d_features, d_linear = run(unweighted(2, 3, 0), loss_on=mode, backend=backend)
    assert loss.item() == pytest.approx((1 + (mode == "branches")) * math.log(3), rel=1e-6)
    assert (d_features.shape, d_linear.shape) == ((2, 0), (3, 0))


def test_a_zero_row_of_a_cosine_probe_gets_no_gradient(backend) -> None:
    arguments = inputs(37, 10, 17)
    arguments["linear"][4] = 0
    loss, d_features, d_linear = run(arguments, backend=backend)
    assert loss.isfinite() and d_features.isfinite().all()
    assert not d_linear[4].any() and d_linear[5].any()


def test_a_zero_row_of_a_plain_probe_gets_its_gradient(backend) -> None:
    arguments = inputs(37, 10, 17)
    arguments["linear"][4] = 0
    assert run(arguments, normalize_linear=False, backend=backend)[2][4].any()


def test_a_confident_row_loses_no_digits(backend) -> None:
    # Logits 25 and 16: a loss of log(1 + exp(-9)), 2e5 times smaller than what it is the difference of. A rounded
    # sum of exponentials 1 + exp(-9) leaves 5e-4 of it uncertain; a sum rounded beside 25 would leave 1e-2.
    features, bank = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.64, math.sqrt(1 - 0.64**2)]])
    loss = dual_cross_entropy(features, torch.tensor([0]), bank, bank, loss_on="fused", backend=backend)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-9)), rel=1e-3)


def test_a_confident_mistake_costs_the_whole_distance(backend) -> None:
    features, bank = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = dual_cross_entropy(features, torch.tensor([1]), bank, bank, loss_on="fused", backend=backend)
    assert loss.item() == pytest.approx(50.0, rel=1e-6)


def test_large_scales_do_not_overflow(backend) -> None:
    loss, d_features, d_linear = run(
        unweighted(37, 10, 17), linear_scale=1e4, proto_scale=1e4, backend=backend
    )
    assert loss.isfinite() and d_features.isfinite().all() and d_linear.isfinite().all()


# Gradients and transformations


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode, normalize) -> None:
    arguments = widened(inputs(5, 4, 3) | grouped(5, 4))
    features, linear = (arguments.pop(name).requires_grad_() for name in ("features", "linear"))

    def loss(features, linear):
        return dual_cross_entropy(
            features, linear=linear, **arguments, linear_scale=3.0, loss_on=mode, normalize_linear=normalize
        )

    assert torch.autograd.gradcheck(loss, (features, linear))


@pytest.mark.parametrize("wanted", ["features", "linear"])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_one_input_alone(backend, wanted, mode) -> None:
    arguments = inputs(37, 10, 17)
    both = dict(zip(("features", "linear"), run(arguments, loss_on=mode, backend=backend)[1:], strict=True))
    arguments[wanted].requires_grad_()
    dual_cross_entropy(**arguments, loss_on=mode, backend=backend).backward()
    torch.testing.assert_close(arguments[wanted].grad, both[wanted])
    assert (arguments["features"].grad is None) != (arguments["linear"].grad is None)


def test_gradient_follows_the_factor_on_the_loss(backend) -> None:
    arguments = inputs(37, 10, 17)
    once = run(arguments, backend=backend)
    thrice = run(arguments, function=lambda *a, **k: dual_cross_entropy(*a, **k) * 3, backend=backend)
    for one, other in zip(thrice, once, strict=True):
        torch.testing.assert_close(one, other * 3)


def test_two_backward_calls_add_up(backend) -> None:
    arguments = inputs(37, 10, 17)
    _, d_features, d_linear = run(arguments, backend=backend)
    for name in ("features", "linear"):
        arguments[name].requires_grad_()
    loss = dual_cross_entropy(**arguments, backend=backend)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(arguments["features"].grad, 2 * d_features)
    torch.testing.assert_close(arguments["linear"].grad, 2 * d_linear)


def test_weights_adjustment_and_align_receive_no_gradient(backend) -> None:
    arguments = inputs(37, 10, 17) | grouped(37, 10)
    others = {
        "align": torch.ones(()),
        "weights": arguments.pop("weights"),
        "adjustment": arguments.pop("adjustment"),
    }
    for tensor in (arguments["features"], *others.values()):
        tensor.requires_grad_()
    dual_cross_entropy(**arguments, **others, loss_on="fused", backend=backend).backward()
    assert arguments["features"].grad is not None
    assert all(tensor.grad is None for tensor in others.values())


def test_no_gradient_without_a_leaf(backend) -> None:
    assert not dual_cross_entropy(**inputs(5, 10, 17), backend=backend).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_loss_and_gradients(backend, dtype) -> None:
    arguments = inputs(5, 10, 17, dtype)
    arguments["linear"] = arguments["linear"].float()
    loss, d_features, d_linear = run(arguments, backend=backend)
    assert (loss.dtype, d_features.dtype, d_linear.dtype) == (torch.float32, dtype, torch.float32)


def test_a_kernel_refuses_a_second_derivative(kernel) -> None:
    arguments = inputs(5, 10, 17)
    arguments["features"].requires_grad_()
    loss = dual_cross_entropy(**arguments, backend=kernel)
    (first,) = torch.autograd.grad(loss, arguments["features"], create_graph=True)
    with pytest.raises(RuntimeError, match="dual_cross_entropy: kernels have no second derivative"):
        torch.autograd.grad(loss + first.square().sum(), arguments["features"])


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, False)])
def test_opcheck(kernel, layout, need) -> None:
    change = LAYOUTS.get(layout, torch.clone)
    values = [change(tensor) for tensor in (inputs(5, 10, 17) | grouped(5, 10)).values()]
    arguments = (*values, torch.tensor(1.5), 0.3, 25.0, 25.0, False, True, *need, kernel)
    torch.library.opcheck(torch.ops.ulfine._dual_cross_entropy.default, arguments)


def test_opcheck_without_adjustment(kernel) -> None:
    arguments = (
        *inputs(5, 10, 17).values(),
        None,
        None,
        torch.tensor(1.5),
        0.3,
        25.0,
        25.0,
        True,
        False,
        True,
        True,
        kernel,
    )
    torch.library.opcheck(torch.ops.ulfine._dual_cross_entropy.default, arguments)


@pytest.mark.parametrize(("engine", "mode"), [("aot_eager", "fused"), ("inductor", "branches")])
def test_compiles_without_a_graph_break(kernel, engine, mode) -> None:
    arguments = inputs(37, 10, 17) | grouped(37, 10)
    function = compiled(dual_cross_entropy, backend=engine)
    got = run(arguments, function=function, loss_on=mode, backend=kernel)
    for one, other in zip(got, run(arguments, loss_on=mode, backend=kernel), strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_once_for_every_batch_size(kernel) -> None:
    function = compiled(dual_cross_entropy, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9):
            arguments = unweighted(rows, 10, 17)
            got = run(arguments, function=function, backend=kernel)
            for one, other in zip(got, run(arguments, backend=kernel), strict=True):
                torch.testing.assert_close(one, other)


# Memory, threads, arguments


@example(b=0, c=3, d=5, mode="branches", threads=1)
@example(b=1, c=1, d=1, mode="branches", threads=2)
@example(b=300, c=101, d=67, mode="branches", threads=3)
@given(
    b=st.integers(0, 300),
    c=st.integers(1, 130),
    d=st.integers(1, 130),
    threads=st.sampled_from([1, 2, 3]),
    mode=st.sampled_from(MODES),
)
def test_every_output_is_written_and_nothing_else(poisoned, kernel, b, c, d, threads, mode) -> None:
    arguments = inputs(b, c, d) | grouped(b, c)
    expected = run(arguments, loss_on=mode, backend=kernel)
    got = on_threads(threads, lambda: poisoned(lambda: run(arguments, loss_on=mode, backend=kernel)))
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("wanted", ["features", "linear"])
def test_one_gradient_alone_is_written(poisoned, kernel, wanted) -> None:
    def gradient():
        loss = dual_cross_entropy(**arguments, backend=kernel)
        return torch.autograd.grad(loss, arguments[wanted])[0]

    arguments = inputs(130, 67, 101)
    arguments[wanted].requires_grad_()
    assert_same_bits(poisoned(gradient), gradient())


def test_every_output_is_written_when_no_row_is_used(poisoned, kernel) -> None:
    arguments = inputs(37, 10, 17) | {"weights": torch.zeros(37)}
    for part in poisoned(lambda: run(arguments, backend=kernel)):
        assert not part.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("b", "c", "d"), [(130, 100, 64), (700, 11, 33)])
def test_same_bits_in_every_run_and_for_every_thread_count(kernel, b, c, d, mode) -> None:
    arguments = inputs(b, c, d) | grouped(b, c)
    first = run(arguments, loss_on=mode, backend=kernel)
    for threads in (1, 2, 3):
        again = on_threads(threads, lambda: run(arguments, loss_on=mode, backend=kernel))
        for one, other in zip(again, first, strict=True):
            assert_same_bits(one, other)


def test_arguments_are_unchanged(backend) -> None:
    arguments = inputs(37, 10, 17) | grouped(37, 10)
    align = torch.tensor(1.5)
    with unchanged(*arguments.values(), align):
        run(arguments, align=align, loss_on="fused", backend=backend)


# Errors

GOOD = {
    "features": torch.ones(2, 3),
    "targets": torch.tensor([0, -1]),
    "linear": torch.ones(4, 3),
    "prototypes": torch.ones(4, 3),
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": torch.ones(3)}, ValueError, r"features must be \[any, any\], got \[3\]"),
        ({"features": torch.ones(2, 3).long()}, TypeError, "features must be float32.*got int64"),
        ({"linear": torch.ones(4, 2)}, ValueError, r"linear must be \[any, 3\], got \[4, 2\]"),
        ({"linear": torch.ones(0, 3)}, ValueError, "linear must have at least one class"),
        (
            {"linear": torch.ones(4, 3, device="meta")},
            ValueError,
            "linear must be on cpu like the rest, got meta",
        ),
        ({"prototypes": torch.ones(3, 3)}, ValueError, r"prototypes must be \[4, 3\], got \[3, 3\]"),
        ({"prototypes": torch.ones(4, 3, requires_grad=True)}, ValueError, "prototypes are fitted.*detach"),
        ({"targets": torch.tensor([0])}, ValueError, r"targets must be \[2\], got \[1\]"),
        ({"targets": torch.tensor([0.0, 1.0])}, TypeError, "targets must be int64, got float32"),
        ({"targets": torch.tensor([0, 4])}, ValueError, "targets must be below 4 classes, got 4 at row 1"),
        (
            {"targets": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "targets must be on cpu.*meta",
        ),
        ({"weights": torch.ones(3)}, ValueError, r"weights must be \[2\], got \[3\]"),
        ({"weights": torch.ones(2).long()}, TypeError, "weights must be float32.*got int64"),
        (
            {"weights": torch.ones(2, device="meta")},
            ValueError,
            "weights must be on cpu like the rest, got meta",
        ),
        ({"adjustment": torch.ones(3)}, ValueError, r"adjustment must be \[any, 4\], got \[1, 3\]"),
        ({"adjustment": torch.ones(0, 4)}, ValueError, "adjustment must have at least one group"),
        ({"group": torch.zeros(2).long()}, ValueError, "group selects rows of adjustment, which is None"),
        (
            {"adjustment": torch.ones(2, 4), "group": torch.tensor([0, 2])},
            ValueError,
            "group must be below 2 .*got 2 at row 1",
        ),
        (
            {"adjustment": torch.ones(2, 4), "group": torch.zeros(3).long()},
            ValueError,
            r"group must be \[2\]",
        ),
        ({"weights": [1.0, 1.0]}, TypeError, "weights must be a tensor, got list"),
        ({"adjustment": [0.0] * 4}, TypeError, "adjustment must be a tensor, got list"),
        ({"align": 2**70 * 10**30}, ValueError, "align must be finite in float32, got "),
        ({"align": torch.ones((), dtype=torch.complex64)}, TypeError, "align must be .*got complex64"),
        ({"eta": 2**2000}, ValueError, "eta must fit float64, got a whole number of 2001 bits"),
        ({"eta": 0.5j}, TypeError, "eta must be a number, got complex"),
        ({"linear_scale": "25"}, TypeError, "linear_scale must be a number, got str"),
        ({"normalize_linear": "no"}, TypeError, "normalize_linear must be True or False, got str"),
        ({"align": torch.ones(2)}, ValueError, r"align must be a number or a scalar tensor, got \[2\]"),
        ({"eta": 1.1}, ValueError, r"eta must be in \[0, 1\], got 1.1"),
        ({"eta": math.nan}, ValueError, r"eta must be in \[0, 1\], got nan"),
        ({"linear_scale": math.nan}, ValueError, "linear_scale must be a finite number above 0, got nan"),
        ({"proto_scale": -1.0}, ValueError, "proto_scale must be a finite number above 0, got -1"),
        ({"loss_on": "both"}, ValueError, "loss_on must be branches or fused, got 'both'"),
    ],
)
def test_bad_arguments(changes, error, message) -> None:
    with pytest.raises(error, match=f"dual_cross_entropy: {message}"):
        dual_cross_entropy(**(GOOD | changes))


def test_a_kernel_refuses_float64(kernel) -> None:
    with pytest.raises(RuntimeError, match=f"dual_cross_entropy: {kernel} computes in float32, got float64"):
        dual_cross_entropy(**widened(inputs(5, 10, 17)), backend=kernel)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be auto, reference, .*got 'tpu'"):
        dual_cross_entropy(**inputs(5, 10, 17), backend="tpu")
