"""`head_loss` is the composition of the ops that its docstring names, in value, gradient and pseudo-labels."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tolerances import assert_no_worse, assert_same_bits, compiled, on_threads, seeded, unchanged

from ulfine_fast.head_loss import head_loss
from ulfine_fast.ops import dual_cross_entropy, orthogonality, pseudo_label

THRESHOLD = 0.9
OPTIONS = {"align": 0.8, "eta": 0.4, "linear_scale": 12.0, "proto_scale": 9.0}


@dataclass
class Step:
    features: torch.Tensor
    weak: torch.Tensor
    targets: torch.Tensor
    linear: torch.Tensor
    prototypes: torch.Tensor

    def leaves(self, dtype=torch.float32):
        """Copies in `dtype`; features, linear and prototypes require grad."""
        learned = {"features", "linear", "prototypes"}
        return {
            name: t.clone()
            if name == "targets"
            else t.detach().to(dtype).clone().requires_grad_(name in learned)
            for name, t in vars(self).items()
        }


def step(labelled=7, unlabelled=20, views=1, classes=11, dim=33) -> Step:
    g = seeded(labelled, unlabelled, views, classes, dim)
    prototypes = torch.randn(classes, dim, generator=g)
    truth = torch.randint(classes, (unlabelled,), generator=g)
    targets = torch.randint(classes, (labelled,), generator=g)

    def around(of):
        return prototypes[of] + 1.6 * torch.randn(len(of), dim, generator=g)

    strong = [around(truth) for _ in range(views)]
    return Step(
        torch.cat([around(targets), *strong]),
        around(truth),
        targets,
        prototypes + 0.3 * torch.randn(classes, dim, generator=g),
        prototypes,
    )


def gradients(leaves):
    return [leaves[name].grad for name in ("features", "linear", "prototypes")]


@pytest.mark.parametrize("views", [0, 1, 2])
@pytest.mark.parametrize("loss_on", ["branches", "fused"])
def test_is_the_composition_of_the_public_ops(backend, loss_on, views):
    s = step(views=views)
    if not views:
        s.weak = s.weak[:0]
    shift, strong_shift, weak_shift = torch.randn(3, 11)
    ours, parts = s.leaves(), s.leaves()

    loss, pseudo = head_loss(
        **ours, threshold=THRESHOLD, weak_adjustment=weak_shift, adjustment=shift, strong_adjustment=strong_shift, loss_on=loss_on,
        unlabelled_weight=0.7, orthogonality_weight=2.0, backend=backend, **OPTIONS,
    )  # fmt: skip
    (3.0 * loss).backward()

    with torch.no_grad():
        labels = pseudo_label(
            parts["weak"],
            parts["linear"],
            parts["prototypes"],
            THRESHOLD,
            adjustment=weak_shift,
            backend=backend,
            **OPTIONS,
        )
    assert not views or 0 < labels.keep.sum() < 20
    weights = [torch.full((7,), 1 / 7), *[labels.keep * (0.7 / (20 * max(views, 1)))] * views]
    expected = dual_cross_entropy(
        parts["features"],
        torch.cat([parts["targets"], *[labels.label] * views]),
        parts["linear"],
        parts["prototypes"].detach(),
        torch.cat(weights),
        adjustment=torch.stack([shift, strong_shift]),
        group=torch.cat([torch.zeros(7, dtype=torch.int64), torch.ones(20 * views, dtype=torch.int64)]),
        loss_on=loss_on,
        backend=backend,
        **OPTIONS,
    ) + 2.0 * orthogonality(parts["prototypes"], backend=backend)
    (3.0 * expected).backward()

    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(gradients(ours), gradients(parts), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    # Cuda fuses logits here that it computes for the loss anyway, and banks where it has pseudo-labels alone.
    same = torch.testing.assert_close if backend == "cuda" else assert_same_bits
    for got, wanted in zip(pseudo, labels, strict=True):
        same(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (32, 130, 1, 100, 65), (9, 0, 0, 2, 3), (300, 40, 2, 37, 19)]
)
def test_no_less_accurate_than_eager(kernel, shape, dtype):
    s = step(*shape)
    results = {}
    for name, wide, backend in (
        ("got", dtype, kernel), ("eager", dtype, "reference"), ("exact", torch.float64, "reference")
    ):  # fmt: skip
        narrow = s.leaves(dtype)
        leaves = {k: v.detach().to(wide if v.is_floating_point() else v.dtype) for k, v in narrow.items()}
        for key in ("features", "linear", "prototypes"):
            leaves[key].requires_grad_()
        # Threshold 0 keeps every row, so that no rounded confidence decides what is compared.
        loss, _ = head_loss(**leaves, threshold=0.0, loss_on="fused", backend=backend, **OPTIONS)
        loss.backward()
        results[name] = [loss, *gradients(leaves)]
    for got, eager, exact in zip(*results.values(), strict=True):
        assert_no_worse(
            got, eager, exact, scale=max(1.0, exact.abs().max().item()) if exact.ndim == 0 else None
        )


def test_labelled_rows_alone_need_no_unlabelled_ones(backend):
    s = step(unlabelled=0, views=0)
    leaves = s.leaves()
    loss, pseudo = head_loss(**leaves, orthogonality_weight=0.0, backend=backend)
    expected = dual_cross_entropy(s.features, s.targets, s.linear, s.prototypes, backend=backend)
    torch.testing.assert_close(loss, expected)
    assert pseudo.label.shape == (0,)
    assert pseudo.histogram.sum() == 0
    loss.backward()
    assert leaves["prototypes"].grad is None


def test_no_accepted_pseudo_label_leaves_exactly_the_labelled_loss(backend):
    s = step()
    leaves = s.leaves()
    loss, pseudo = head_loss(**leaves, threshold=1.0, orthogonality_weight=0.0, backend=backend, **OPTIONS)
    assert not pseudo.keep.any()
    alone = dual_cross_entropy(s.features[:7], s.targets, s.linear, s.prototypes, backend=backend, **OPTIONS)
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    loss.backward()
    assert not leaves["features"].grad[7:].any()


def test_a_second_backward_gives_the_same_gradients(backend):
    leaves = step().leaves()
    loss, _ = head_loss(**leaves, threshold=THRESHOLD, backend=backend)
    loss.backward(retain_graph=True)
    first = [g.clone() for g in gradients(leaves)]
    loss.backward()
    for once, twice in zip(first, gradients(leaves), strict=True):
        torch.testing.assert_close(twice, 2 * once)


def test_a_kernel_refuses_a_second_derivative(kernel):
    leaves = step().leaves()
    loss, _ = head_loss(**leaves, threshold=THRESHOLD, backend=kernel)
    (first,) = torch.autograd.grad(loss, leaves["features"], create_graph=True)
    with pytest.raises(RuntimeError, match="head_loss: kernels have no second derivative"):
        torch.autograd.grad(loss + first.square().sum(), leaves["linear"])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(kernel, compiler):
    s = step()

    def function(features, linear, prototypes, weak, targets):
        loss, pseudo = head_loss(
            features * 2, weak, targets, linear, prototypes, THRESHOLD, backend=kernel, **OPTIONS
        )
        return loss * 1.5, pseudo.label

    plain, fast = s.leaves(), s.leaves()
    expected, labels = function(**plain)
    expected.backward()
    got, got_labels = compiled(function, backend=compiler)(**fast)
    got.backward()
    torch.testing.assert_close(got, expected)
    assert torch.equal(got_labels, labels)
    for one, other in zip(gradients(fast), gradients(plain), strict=True):
        torch.testing.assert_close(one, other)


def test_opcheck(kernel):
    s = step()
    arguments = (
        s.features, s.weak, s.targets, s.linear, s.prototypes, torch.tensor([0.3]),
        torch.tensor(0.9), torch.zeros(11), torch.zeros(11), None, 0.5, 25.0, 25.0, 1.0, True, 20, True, 1.0, 1.0, True, True, True, kernel,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.ulfine._head_loss.default, arguments)


def test_gradcheck():
    s = step(labelled=3, unlabelled=4, classes=4, dim=5).leaves(torch.float64)
    fixed = s["prototypes"].detach()

    def function(features, linear):
        return head_loss(features, s["weak"], s["targets"], linear, fixed, 0.0, loss_on="fused")[0]

    assert torch.autograd.gradcheck(function, (s["features"], s["linear"]))


def test_same_bits_for_every_thread_count_and_arguments_unchanged(poisoned, kernel):
    s = step(40, 300, 1, 67, 131)

    def run():
        leaves = s.leaves()
        with unchanged(*leaves.values()):
            loss, pseudo = head_loss(**leaves, threshold=THRESHOLD, backend=kernel, **OPTIONS)
            loss.backward()
        return [loss.detach(), *gradients(leaves), *pseudo]

    expected = run()
    for threads in (1, 2, 3):
        for got, wanted in zip(on_threads(threads, lambda: poisoned(run)), expected, strict=True):
            assert_same_bits(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"features": torch.randn(20, 33)},
            r"features must be \[7 labelled \+ V \* 20 strong, 33\], got \[20, 33\]",
        ),
        ({"weak": torch.randn(0, 33)}, r"V \* 0 strong"),
        ({"weak": torch.randn(20, 32)}, r"weak must be \[any, 33\], got \[20, 32\]"),
        ({"targets": torch.full((7,), 11)}, "targets must be below 11 classes, got 11 at row 0"),
        ({"adjustment": torch.zeros(10)}, r"adjustment must be \[11\], got \[10\]"),
        ({"strong_adjustment": torch.zeros(2, 11)}, r"strong_adjustment must be \[11\]"),
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
        ({"unlabelled_weight": -1.0}, "unlabelled_weight must be a finite number of at least 0, got -1"),
        ({"orthogonality_weight": float("nan")}, "orthogonality_weight must be a finite .*, got nan"),
        ({"targets": [0] * 7}, "targets must be a tensor, got list"),
        ({"adjustment": [0.0] * 11}, "adjustment must be a tensor, got list"),
        ({"scale_rows": 1.5}, "scale_rows must be a whole number, got float"),
        ({"normalize_linear": 1}, "normalize_linear must be True or False, got int"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0"),
        ({"scale_rows": -1}, "scale_rows must be at least 0, got -1"),
        ({"loss_on": "both"}, "loss_on must be branches or fused, got 'both'"),
        ({"prototypes": torch.randn(10, 33)}, r"prototypes must be \[11, 33\], got \[10, 33\]"),
    ],
)
def test_errors_say_expected_and_got(change, message):
    with pytest.raises((ValueError, TypeError), match=f"head_loss: .*{message}"):
        head_loss(**(vars(step()) | change))
