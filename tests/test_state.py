import copy
import math

import pytest
import torch
from tolerances import assert_no_worse, assert_same_bits, compiled, seeded, unchanged
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ulfine_fast import PrototypeState, PseudoLabels, proto_fit, pseudo_label, use_backend
from ulfine_fast.ops import orthogonality

RATES = {"mu": 0.3, "beta": 0.7, "gamma": 0.8, "scale_decay": 0.9}
CLASSES, DIM = 7, 5


def text() -> torch.Tensor:
    return 3 * torch.randn(CLASSES, DIM, generator=seeded(1))


def step(seed: int, rows: int = 11) -> tuple[torch.Tensor, torch.Tensor, PseudoLabels]:
    """Labelled features, targets and pseudo-labels of one step."""
    generator = seeded(seed)
    features = torch.randn(rows, DIM, generator=generator)
    targets = torch.randint(-1, CLASSES - 1, (rows,), generator=generator)
    weak = torch.randn(4 * rows, DIM, generator=generator)
    linear = torch.randn(CLASSES, DIM, generator=generator)
    return features, targets, pseudo_label(weak, linear, text(), 0.8)


def with_counts(pseudo: PseudoLabels, **changes) -> PseudoLabels:
    return pseudo._replace(**{name: torch.as_tensor(value) for name, value in changes.items()})


def measured(linear: float, proto: float) -> PrototypeState:
    state = PrototypeState(text())
    state.measure(torch.tensor([linear, proto]), decay=0.9)
    return state


# Start


def test_it_starts_from_unit_text_without_any_visual_evidence() -> None:
    state = PrototypeState(text())
    torch.testing.assert_close(state.text.norm(dim=-1), torch.ones(CLASSES))
    assert_same_bits(state.textual, state.text)
    for buffer in (state.visual, state.seen, state.distribution, state.kept_distribution, state.measured):
        assert not buffer.any()


def test_only_the_textual_prototypes_are_learned() -> None:
    state = PrototypeState(text())
    assert [name for name, _ in state.named_parameters()] == ["textual"]
    assert isinstance(state.textual, nn.Parameter) and state.textual.requires_grad


def test_text_and_textual_are_copies() -> None:
    given = torch.nn.functional.normalize(text(), dim=-1)
    state = PrototypeState(given)
    with torch.no_grad(), unchanged(given, state.text):
        state.textual.zero_()


def test_half_text_is_kept_in_float32() -> None:
    state = PrototypeState(text().half())
    assert all(t.dtype in (torch.float32, torch.bool) for t in state.state_dict().values())


def test_text_that_requires_grad_is_detached() -> None:
    state = PrototypeState(text().requires_grad_())
    assert not state.text.requires_grad and state.textual.is_leaf


def test_a_zero_text_row_stays_zero() -> None:
    rows = text()
    rows[2] = 0
    state = PrototypeState(rows)
    assert not state.text[2].any() and state.text.isfinite().all()


# Alignment


def test_align_is_one_before_the_first_measurement() -> None:
    assert PrototypeState(text()).align().item() == 1.0


def test_align_is_the_ratio_of_the_branch_scales() -> None:
    assert measured(6.0, 4.0).align().item() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("linear", "proto", "align"), [(1e4, 1.0, 100.0), (1e-4, 1.0, 0.01), (0.0, 1.0, 0.01)]
)
def test_align_is_clamped(linear, proto, align) -> None:
    assert measured(linear, proto).align().item() == pytest.approx(align)


@pytest.mark.parametrize(("proto", "align"), [(0.0, 1.0), (0.9e-6, 1.0), (1.1e-6, 100.0)])
def test_align_is_one_where_the_prototype_logits_hardly_vary(proto, align) -> None:
    assert measured(5.0, proto).align().item() == pytest.approx(align)


def test_align_has_no_graph() -> None:
    assert not measured(6.0, 4.0).align().requires_grad


def test_the_first_measurement_sets_the_scales() -> None:
    assert measured(6.0, 4.0).branch_scale.tolist() == [6.0, 4.0]
    assert measured(6.0, 4.0).measured.item() is True


def test_later_measurements_move_the_scales_by_one_minus_decay() -> None:
    state = measured(6.0, 4.0)
    state.measure(torch.tensor([16.0, 0.0]), decay=0.9)
    torch.testing.assert_close(state.branch_scale, torch.tensor([7.0, 3.6]))


# Update


def test_update_is_proto_fit_of_the_state() -> None:
    state = PrototypeState(text())
    features, targets, pseudo = step(2)
    before = [t.detach().clone() for t in (state.textual, state.visual, state.seen, state.distribution)]
    expected = proto_fit(features, targets, pseudo.histogram, *before, mu=0.3, beta=0.7, gamma=0.8)
    state.update(features, targets, pseudo, **RATES)
    for name, value in expected._asdict().items():
        assert_same_bits(getattr(state, name), value)
    assert state.seen.any() and state.distribution.any()


def test_update_measures_the_scales() -> None:
    state = measured(6.0, 4.0)
    _, _, pseudo = arguments = step(2)
    state.update(*arguments, **RATES)
    torch.testing.assert_close(state.branch_scale, 0.9 * torch.tensor([6.0, 4.0]) + 0.1 * pseudo.branch_scale)


def test_update_leaves_the_text_and_its_arguments() -> None:
    state = PrototypeState(text())
    features, targets, pseudo = step(2)
    with unchanged(state.text, features, targets, *pseudo):
        state.update(features, targets, pseudo, **RATES)


def test_update_follows_both_distributions() -> None:
    state = PrototypeState(text())
    features, targets, pseudo = step(2)
    counts = [4, 0, 0, 0, 0, 0, 12], [0, 0, 0, 0, 0, 0, 5]
    state.update(
        features, targets, with_counts(pseudo, histogram=counts[0], kept_histogram=counts[1]), **RATES
    )
    torch.testing.assert_close(state.distribution, torch.tensor([0.05, 0, 0, 0, 0, 0, 0.15]))
    torch.testing.assert_close(state.kept_distribution, torch.tensor([0, 0, 0, 0, 0, 0, 0.2]))


def test_no_accepted_pseudo_label_still_updates_the_distribution_and_the_scales() -> None:
    state = PrototypeState(text())
    state.update(*step(2), **RATES)
    before = {name: t.clone() for name, t in state.state_dict().items()}
    features, targets, pseudo = step(3)
    state.update(features, targets, with_counts(pseudo, kept_histogram=[0] * CLASSES), **RATES)
    assert before["kept_distribution"].any()
    assert_same_bits(state.kept_distribution, before["kept_distribution"])
    assert not torch.equal(state.distribution, before["distribution"])
    assert not torch.equal(state.branch_scale, before["branch_scale"])


def test_without_weak_views_the_text_stays_and_the_class_means_still_run() -> None:
    state = PrototypeState(text())
    features, targets, _ = step(2)
    nothing = pseudo_label(torch.zeros(0, DIM), text(), text())
    state.update(features, targets, nothing, **RATES)
    torch.testing.assert_close(state.textual.detach(), state.text)
    assert not state.distribution.any() and not state.kept_distribution.any()
    assert state.visual.any() and state.align().item() == 1.0


def test_without_labelled_rows_only_the_distributions_and_scales_run() -> None:
    state = PrototypeState(text())
    _, _, pseudo = step(2)
    state.update(torch.zeros(0, DIM), torch.zeros(0, dtype=torch.int64), pseudo, **RATES)
    assert_same_bits(state.textual, state.text)
    assert not state.visual.any() and not state.seen.any()
    assert state.distribution.any() and state.measured


def test_a_class_that_is_never_labelled_stays_text() -> None:
    state = PrototypeState(text())
    for seed in range(2, 7):
        state.update(*step(seed), **RATES)
    last = CLASSES - 1
    assert not state.seen[last]
    assert_same_bits(state.textual[last], state.text[last])
    assert state.distribution[last] > 0


def test_update_keeps_the_gradient_and_the_identity_of_the_parameter() -> None:
    state = PrototypeState(text())
    orthogonality(state.textual).backward()
    parameter, gradient = state.textual, state.textual.grad.clone()
    state.update(*step(2), **RATES)
    assert state.textual is parameter
    assert_same_bits(parameter.grad, gradient)


def test_update_builds_no_graph() -> None:
    state = PrototypeState(text())
    features, targets, pseudo = step(2)
    state.update(features.requires_grad_(), targets, pseudo, **RATES)
    assert state.textual.is_leaf and not any(t.requires_grad for t in state.buffers())


# Resume


def test_state_dict_holds_everything() -> None:
    names = (
        "textual text visual seen distribution kept_distribution kept_sum kept_count branch_scale measured"
    )
    assert set(PrototypeState(text()).state_dict()) == set(names.split())


def test_a_resumed_state_continues_bit_by_bit() -> None:
    straight = PrototypeState(text())
    for seed in (2, 3):
        straight.update(*step(seed), **RATES)
    resumed = PrototypeState(torch.ones(CLASSES, DIM))
    resumed.load_state_dict({name: t.clone() for name, t in straight.state_dict().items()})
    for state in (straight, resumed):
        state.update(*step(4), **RATES)
    for name, value in straight.state_dict().items():
        assert_same_bits(resumed.state_dict()[name], value)
    assert_same_bits(resumed.align(), straight.align())
    assert resumed.align().item() not in (0.01, 1.0, 100.0)


def test_transposed_text_features_give_a_state_that_can_be_updated() -> None:
    text = torch.randn(6, 4).T
    state = PrototypeState(text)
    labels = pseudo_label(torch.randn(5, 6), text.contiguous(), state.textual)
    state.update(
        torch.randn(3, 6), torch.tensor([0, 1, 1]), labels, mu=0.1, beta=0.9, gamma=0.9, scale_decay=0.9
    )
    assert state.seen.tolist() == [True, True, False, False]


def test_the_default_dtype_does_not_reach_the_buffers() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        state = PrototypeState(torch.randn(3, 5))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in state.state_dict().values()} == {torch.float32, torch.bool}


# Posterior means


def refitted(state: PrototypeState, weak: torch.Tensor, pseudo: PseudoLabels, **changes) -> None:
    options = {"strength": 4.0, "unlabelled_mass": 0.5, "gamma": 0.8} | changes
    state.refit(weak, pseudo, torch.arange(CLASSES), **options)


def test_log_distribution_is_that_of_an_average_that_started_uniform() -> None:
    state = PrototypeState(text())
    torch.testing.assert_close(state.log_distribution().exp(), torch.full((CLASSES,), 1 / CLASSES))
    running = torch.full((CLASSES,), 1 / CLASSES)
    for seed in range(3):
        features, targets, pseudo = step(seed)
        state.update(features, targets, pseudo, **RATES)
        running = 0.8 * running + 0.2 * pseudo.histogram / pseudo.histogram.sum()
    torch.testing.assert_close(state.log_distribution(), running.clamp_min(1e-4).log())


def test_refit_gives_the_posterior_mean_of_every_class() -> None:
    state, counts = PrototypeState(text()), torch.arange(CLASSES).float()
    sums, kept_count = torch.zeros(CLASSES, DIM), torch.zeros(CLASSES)
    for seed in range(3):
        features, targets, pseudo = step(seed)
        weak = torch.randn(44, DIM, generator=seeded(seed, 1))
        features = state.text[targets.clamp_min(0)] + 0.3 * features
        state.update(features, targets, pseudo, **(RATES | {"mu": 0.0}))
        refitted(state, weak, pseudo)
        unit = torch.nn.functional.normalize(weak, dim=-1)
        sums, kept_count = 0.8 * sums, 0.8 * kept_count
        for row in pseudo.keep.nonzero().flatten():
            sums[pseudo.label[row]] += unit[row]
            kept_count[pseudo.label[row]] += 1
    assert 0 < pseudo.keep.sum() < 44
    labelled = counts * state.seen
    gap = (labelled * (state.visual * state.text).sum(-1)).sum() / labelled.sum()
    assert gap > 0
    mass = 0.5 * counts.sum() * state.kept_distribution
    means = sums / kept_count.clamp_min(1e-6)[:, None]
    expected = labelled[:, None] * state.visual + mass[:, None] * means + 4.0 * gap * state.text
    torch.testing.assert_close(state.textual.data, torch.nn.functional.normalize(expected, dim=-1))


def test_refit_shrinks_to_the_text_by_class_count() -> None:
    state = PrototypeState(text())
    features = state.text.repeat(4, 1) + 0.5 * torch.randn(4 * CLASSES, DIM, generator=seeded(5))
    _, _, pseudo = step(0)
    nothing = with_counts(
        pseudo, keep=torch.zeros(44, dtype=torch.bool), kept_histogram=torch.zeros(CLASSES, dtype=torch.int64)
    )
    state.update(features, torch.arange(CLASSES).repeat(4), nothing, **(RATES | {"mu": 0.0}))
    weak = torch.randn(44, DIM, generator=seeded(6))
    counts = torch.tensor([0, 1, 4, 16, 64, 256, 10**6])
    state.refit(weak, nothing, counts, strength=4.0, unlabelled_mass=1.0, gamma=0.9)
    torch.testing.assert_close(state.textual[0].data, state.text[0])
    to_visual = torch.nn.functional.cosine_similarity(state.textual, state.visual, dim=-1)
    torch.testing.assert_close(to_visual[-1].data, torch.tensor(1.0), rtol=0, atol=1e-5)


def test_refit_without_evidence_keeps_the_prototypes_and_every_argument() -> None:
    state = PrototypeState(text())
    _, _, pseudo = step(0)
    weak = torch.randn(44, DIM, generator=seeded(6))
    with unchanged(weak, *pseudo):
        refitted(state, weak, with_counts(pseudo, keep=torch.zeros(44, dtype=torch.bool)))
    assert_same_bits(state.textual, state.text)


# The whole update at once

ADVANCE = {"mu": 0.3, "beta": 0.7, "gamma": 0.8, "scale_decay": 0.9, "strength": 3.0, "unlabelled_mass": 0.5}
TRUE, FALSE = torch.tensor(True), torch.tensor(False)
# Labelled rows, weak rows, classes, dimensions; the large ones pass the 256 threads of a block.
SIZES = [(1, 1, 1, 1), (0, 9, 4, 3), (7, 0, 5, 6), (40, 70, 9, 33), (30, 300, 260, 5), (300, 40, 6, 270)]
CHOICES = {
    "compounding": {},
    "normalized": {"normalize": True},
    "still": {"mu": 0.0},
    "still and normalized": {"mu": 0.0, "normalize": True},
    "posterior": {"posterior": True},
    "posterior and normalized": {"posterior": True, "normalize": True},
}


def moving(b: int, u: int, c: int, d: int) -> tuple[PrototypeState, dict[str, object]]:
    """A state in mid-training whose rows have any norm, and the arguments of a step."""
    generator = seeded(b, u, c, d)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    def counts(most: int) -> torch.Tensor:
        return torch.randint(most, (c,), generator=generator)

    state = PrototypeState(normal(c, d))
    seen = torch.arange(c) % 3 != 1
    with torch.no_grad():
        state.textual.copy_(state.text + 0.4 * normal(c, d)).mul_(torch.linspace(0.5, 2, c)[:, None])
        state.visual.copy_((0.8 * state.text + 0.2 * normal(c, d)) * seen[:, None])
        state.seen.copy_(seen)
        for share in (state.distribution, state.kept_distribution):
            share.copy_(torch.rand(c, generator=generator) / c)
        state.kept_sum.copy_(normal(c, d))
        state.kept_count.copy_(counts(5))
        state.measure(torch.tensor([6.0, 4.0]), 0.9)
    targets = torch.randint(-1, c, (b,), generator=generator)
    targets[targets % 4 == 2] = 0
    label = torch.randint(-1, c, (u,), generator=generator)
    keep = (label >= 0) & (torch.rand(u, generator=generator) < 0.6)
    pseudo = PseudoLabels(
        label,
        torch.rand(u, generator=generator),
        keep,
        torch.bincount(label[label >= 0], minlength=c),
        torch.bincount(label[keep], minlength=c),
        torch.tensor([5.0, 7.0]),
    )
    rows = normal(b, d) + state.text[targets.clamp_min(0)]
    return state, {
        "features": rows * torch.logspace(-1, 1, b)[:, None],
        "targets": targets,
        "weak": 3 * normal(u, d),
        "pseudo": pseudo,
        "labelled_counts": counts(50),
        "finite": TRUE,
    }


def marked(u: int) -> torch.Tensor:
    return torch.arange(u) % 3 == 0


def advanced(state: PrototypeState, backend: str, arguments: dict, **changes: object) -> PrototypeState:
    state = copy.deepcopy(state)
    with use_backend(backend):
        state.advance(**(ADVANCE | arguments | changes))
    return state


def widened(arguments: dict) -> dict:
    pseudo = arguments["pseudo"]
    return arguments | {
        "features": arguments["features"].double(),
        "weak": arguments["weak"].double(),
        "pseudo": pseudo._replace(branch_scale=pseudo.branch_scale.double()),
    }


def assert_same_state(got: PrototypeState, expected: PrototypeState) -> None:
    for name, value in expected.state_dict().items():
        assert_same_bits(got.state_dict()[name], value)


@pytest.mark.parametrize("copies", [False, True], ids=["all count", "copies"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kernel", ["cuda"])
def test_advance_is_no_less_accurate_than_eager(kernel, sizes, choice, copies) -> None:
    state, arguments = moving(*sizes)
    changes = CHOICES[choice] | {"copies": marked(sizes[1]) if copies else None}
    got, eager = (advanced(state, name, arguments, **changes) for name in (kernel, "reference"))
    exact = advanced(state.double(), "reference", widened(arguments), **changes)
    for name, value in exact.state_dict().items():
        one, other = got.state_dict()[name], eager.state_dict()[name]
        if value.is_floating_point():
            assert_no_worse(one, other, value)
        else:
            assert torch.equal(one, value), name


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("backend", ["reference", "cpp", "cuda"])
def test_advance_composes_what_it_says(backend, choice) -> None:
    state, arguments = moving(40, 70, 9, 33)
    got = advanced(state, backend, arguments, **CHOICES[choice])
    options = ADVANCE | CHOICES[choice]
    posterior = options.pop("posterior", False)
    if options.pop("normalize", False):
        state.normalize(TRUE)
    rates = {name: options[name] for name in RATES}
    learns = rates["mu"] > 0 or posterior
    targets = arguments["targets"] if learns else torch.full((40,), -1)
    rates["mu"] *= not posterior
    with use_backend("reference"):
        state.update(arguments["features"], targets, arguments["pseudo"], **rates)
        if posterior:
            refit = {name: options[name] for name in ("strength", "unlabelled_mass", "gamma")}
            state.refit(arguments["weak"], arguments["pseudo"], arguments["labelled_counts"], **refit)
    for name, value in state.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_a_step_that_is_not_finite_leaves_every_bit(backend, choice) -> None:
    state, arguments = moving(40, 70, 9, 33)
    for measured in (True, False):
        state.measured.fill_(measured)
        pseudo = arguments["pseudo"]._replace(branch_scale=torch.tensor([math.nan, 2.0]))
        changes = CHOICES[choice] | {"finite": FALSE, "copies": marked(70), "pseudo": pseudo}
        assert_same_state(advanced(state, backend, arguments, **changes), state)


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_the_first_scales_of_advance_are_those_measured(backend) -> None:
    state, arguments = moving(7, 9, 5, 6)
    state.measured.fill_(False)
    assert advanced(state, backend, arguments).branch_scale.tolist() == [5.0, 7.0]
    none = arguments["pseudo"]._replace(branch_scale=torch.zeros(2))
    still = advanced(state, backend, arguments, pseudo=none)
    assert not still.measured
    assert_same_bits(still.branch_scale, state.branch_scale)
    one = arguments["pseudo"]._replace(branch_scale=torch.tensor([0.0, 2.0]))
    assert advanced(state, backend, arguments, pseudo=one).measured


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_advance_without_a_count_leaves_both_distributions(backend) -> None:
    state, arguments = moving(7, 9, 5, 6)
    nothing = torch.zeros(5, dtype=torch.int64)
    pseudo = arguments["pseudo"]._replace(histogram=nothing, kept_histogram=nothing)
    got = advanced(state, backend, arguments, pseudo=pseudo)
    assert_same_bits(got.distribution, state.distribution)
    assert_same_bits(got.kept_distribution, state.kept_distribution)
    got = advanced(state, backend, arguments, copies=torch.ones(9, dtype=torch.bool))
    assert_same_bits(got.distribution, state.distribution)


@pytest.mark.parametrize("where", ["visual", "kept_sum"])
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_one_class_that_is_not_finite_keeps_every_prototype(backend, where) -> None:
    state, arguments = moving(0, 9, 5, 6)
    getattr(state, where)[2, 4] = math.nan
    got = advanced(state, backend, arguments, posterior=True)
    assert_same_bits(got.textual, state.textual)
    assert not torch.equal(got.kept_distribution, state.kept_distribution)


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_posterior_prototypes_that_cannot_be_made_are_not_fitted_either(backend) -> None:
    state, arguments = moving(40, 9, 5, 6)
    state.kept_sum[2, 4] = math.nan

    def turned(**changes: object) -> float:
        got = advanced(state, backend, arguments, **changes)
        assert not torch.equal(got.visual, state.visual)
        return 1.0 - torch.nn.functional.cosine_similarity(got.textual, state.textual).min().item()

    assert turned(posterior=True) < 1e-6 < 1e-3 < turned()


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_text_and_images_that_lie_apart_pull_the_other_way(backend) -> None:
    state, arguments = moving(0, 0, 4, 6)
    state.visual.neg_()
    got = advanced(state, backend, arguments, posterior=True, strength=1e6)
    cosine = torch.nn.functional.cosine_similarity(got.textual, state.text)
    torch.testing.assert_close(cosine.data, -torch.ones(4), rtol=0, atol=1e-3)
    state.visual.zero_()
    assert_same_bits(advanced(state, backend, arguments, posterior=True).textual, state.textual)


@pytest.mark.parametrize("kernel", ["cuda"])
def test_a_zero_prototype_stays_zero_and_a_small_one_becomes_unit(kernel) -> None:
    state, arguments = moving(0, 9, 5, 6)
    with torch.no_grad():
        state.textual[1] = 0
        state.textual[2] = 1e-9
    got, expected = (
        advanced(state, name, arguments, normalize=True).textual for name in (kernel, "reference")
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert not got[1].any() and got[2].norm().item() == pytest.approx(1.0)


class NoOperators(TorchDispatchMode):
    """Raises at an operator of torch that starts a kernel."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name()
        assert operator.is_view or name.startswith(("aten::empty", "ulfine::")), name
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("choice", "launches"),
    [("compounding", 2), ("normalized", 2), ("still", 1), ("still and normalized", 2), ("posterior", 4)],
)
@pytest.mark.parametrize("kernel", ["cuda"])
def test_advance_starts_few_kernels(kernel, choice, launches, emulated_kernels, monkeypatch) -> None:
    state, arguments = moving(40, 70, 9, 33)
    arguments["copies"] = marked(70)
    # On a GPU no label is read.
    monkeypatch.setattr("ulfine_fast.ops._checks.labels", lambda *_: None)
    before = emulated_kernels.launches()
    with use_backend(kernel), NoOperators():
        state.advance(**(ADVANCE | arguments | CHOICES[choice]))
    assert emulated_kernels.launches() - before == launches


@pytest.mark.parametrize("posterior", [False, True])
@pytest.mark.parametrize("kernel", ["cuda"])
def test_advance_has_the_same_bits_in_every_run(kernel, posterior) -> None:
    state, arguments = moving(40, 70, 9, 33)
    changes = {"posterior": posterior, "copies": marked(70), "normalize": True}
    first = advanced(state, kernel, arguments, **changes)
    for _ in range(3):
        assert_same_state(advanced(state, kernel, arguments, **changes), first)


@pytest.mark.parametrize("posterior", [False, True])
@pytest.mark.parametrize("kernel", ["cuda"])
def test_advance_writes_what_it_reads(kernel, posterior, poisoned) -> None:
    state, arguments = moving(40, 70, 9, 33)
    changes = {"posterior": posterior, "copies": marked(70)}
    expected = advanced(state, kernel, arguments, **changes)
    assert_same_state(poisoned(lambda: advanced(state, kernel, arguments, **changes)), expected)


@pytest.mark.parametrize("posterior", [False, True])
@pytest.mark.parametrize("kernel", ["cuda"])
def test_advance_compiles_without_a_graph_break(kernel, posterior) -> None:
    state, arguments = moving(40, 70, 9, 33)
    expected = advanced(state, kernel, arguments, posterior=posterior)
    with use_backend(kernel):
        compiled(state.advance, backend="aot_eager")(**ADVANCE, **arguments, posterior=posterior)
    assert_same_state(state, expected)


@pytest.mark.parametrize("kernel", ["cuda"])
def test_the_operator_of_advance_follows_the_rules(kernel) -> None:
    state, arguments = moving(7, 9, 5, 6)
    pseudo = arguments["pseudo"]
    tensors = (
        arguments["features"], arguments["targets"], arguments["weak"], pseudo.label, pseudo.keep, marked(9),
        pseudo.histogram, pseudo.kept_histogram, pseudo.branch_scale, arguments["labelled_counts"], state.text, TRUE,
        state.textual.detach(), state.visual, state.seen, state.distribution, state.kept_distribution,
        state.kept_sum, state.kept_count, state.branch_scale, state.measured,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.ulfine._state_update_.default, (*tensors, *ADVANCE.values(), True, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["cuda"])
def test_advance_widens_half_features(kernel, dtype) -> None:
    state, arguments = moving(40, 70, 9, 33)
    half = {name: arguments[name].to(dtype) for name in ("features", "weak")}
    wide = {name: tensor.float() for name, tensor in half.items()}
    assert_same_state(
        advanced(state, kernel, arguments | half, posterior=True),
        advanced(state, kernel, arguments | wide, posterior=True),
    )


@pytest.mark.parametrize("kernel", ["cuda"])
def test_advance_takes_tensors_of_any_layout(kernel) -> None:
    state, arguments = moving(40, 70, 9, 33)
    moved = {name: arguments[name].T.contiguous().T for name in ("features", "weak")}
    moved["labelled_counts"] = arguments["labelled_counts"].repeat_interleave(2)[::2]
    moved["pseudo"] = PseudoLabels(*(t.repeat_interleave(2)[::2] for t in arguments["pseudo"]))
    copies = marked(70)
    assert_same_state(
        advanced(state, kernel, arguments | moved, posterior=True, copies=copies.repeat_interleave(2)[::2]),
        advanced(state, kernel, arguments, posterior=True, copies=copies),
    )


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_advance_tells_a_graph_that_its_state_has_changed(backend) -> None:
    state, arguments = moving(7, 9, 5, 6)
    version = state.textual._version
    with use_backend(backend):
        state.advance(**ADVANCE, **arguments)
    assert state.textual._version > version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(7, 5)}, r"advance: features must be \[any, 6\], got \[7, 5\]"),
        ({"targets": torch.zeros(6).long()}, r"advance: targets must be \[7\], got \[6\]"),
        ({"weak": torch.zeros(9, 5)}, r"advance: weak must be \[9, 6\], got \[9, 5\]"),
        ({"weak": torch.zeros(8, 6)}, r"advance: weak must be \[9, 6\], got \[8, 6\]"),
        ({"copies": torch.zeros(9)}, r"advance: copies must be bool, got float32"),
        ({"labelled_counts": torch.zeros(5)}, r"advance: labelled_counts must be int64, got float32"),
        ({"finite": True}, "advance: finite must be a tensor, got bool"),
        ({"finite": torch.ones(2).bool()}, r"advance: finite must be \[\], got \[2\]"),
        ({"finite": torch.tensor(1.0)}, "advance: finite must be bool, got float32"),
        ({"targets": torch.full((7,), 5)}, "advance: targets must be below 5 classes, got 5 at row 0"),
        ({"pseudo": None}, "advance: pseudo must be PseudoLabels, got NoneType"),
        ({"unlabelled_mass": -1.0}, "advance: unlabelled_mass must be a finite number of at least 0, got -1"),
        ({"mu": torch.tensor(0.5)}, "advance: mu must be a number, got Tensor"),
        ({"posterior": 1}, "advance: posterior must be True or False, got int"),
        ({"finite": TRUE.to("meta")}, r"advance: finite must be on cpu like the rest, got meta"),
        ({"strength": 0.0}, r"advance: strength must be a finite number above 0, got 0"),
        ({"gamma": 1.5}, r"advance: gamma must be in \[0, 1\], got 1.5"),
    ],
)
def test_advance_names_a_wrong_argument_and_changes_nothing(change, message) -> None:
    state, arguments = moving(7, 9, 5, 6)
    held = state.state_dict().values()
    with unchanged(*held), pytest.raises((ValueError, TypeError), match=message):
        state.advance(**(ADVANCE | arguments | change))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label", torch.full((9,), 5), "label must be below 5 classes, got 5 at row 0"),
        ("keep", torch.ones(9), "keep must be bool, got float32"),
        ("histogram", torch.ones(5), "histogram must be int64, got float32"),
        ("branch_scale", torch.ones(1), r"branch_scale must be \[2\], got \[1\]"),
        ("branch_scale", torch.ones(2).long(), "branch_scale must be float32.*got int64"),
    ],
)
@pytest.mark.parametrize("method", ["advance", "update", "refit"])
def test_pseudo_labels_that_do_not_fit_change_nothing(method, field, value, message) -> None:
    state, arguments = moving(7, 9, 5, 6)
    arguments |= {"pseudo": arguments["pseudo"]._replace(**{field: value})}
    calls = {
        "advance": ADVANCE | arguments,
        "update": RATES | {name: arguments[name] for name in ("features", "targets", "pseudo")},
        "refit": {name: arguments[name] for name in ("weak", "pseudo", "labelled_counts")}
        | {"strength": 16.0, "unlabelled_mass": 1.0, "gamma": 0.9},
    }
    with unchanged(*state.state_dict().values()), pytest.raises((ValueError, TypeError), match=message):
        getattr(state, method)(**calls[method])


def test_a_target_that_does_not_fit_an_update_changes_nothing() -> None:
    state, arguments = moving(7, 9, 5, 6)
    with unchanged(*state.state_dict().values()), pytest.raises(ValueError, match="targets must be below 5"):
        state.update(arguments["features"], torch.full((7,), 5), arguments["pseudo"], **RATES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_advance_takes_branch_scales_of_any_dtype(backend, dtype) -> None:
    state, arguments = moving(7, 9, 5, 6)
    pseudo = arguments["pseudo"]
    other = arguments | {"pseudo": pseudo._replace(branch_scale=pseudo.branch_scale.to(dtype))}
    assert_same_state(advanced(state, backend, other), advanced(state, backend, arguments))


def test_a_kernel_refuses_a_state_that_it_would_misread(emulated_kernels, monkeypatch) -> None:
    monkeypatch.setattr("ulfine_fast._cuda.kernels", emulated_kernels)
    state, arguments = moving(7, 9, 5, 6)
    with pytest.raises(RuntimeError, match="advance: cuda computes in float32, got float64"):
        advanced(state.double(), "cuda", arguments)
    with pytest.raises(TypeError, match="advance: textual must be float32 or float64, got float16"):
        advanced(state.half(), "cuda", arguments)


# On a GPU no label is read: one that is too large is none.
@pytest.mark.parametrize("posterior", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_a_label_beyond_the_classes_counts_nowhere(backend, posterior, monkeypatch) -> None:
    state, arguments = moving(7, 9, 5, 6)
    pseudo = arguments["pseudo"]
    label, none = (pseudo.label.index_fill(0, torch.tensor([0, 4]), large) for large in (2**20, -1))
    changes = {"copies": torch.zeros(9, dtype=torch.bool), "posterior": posterior}
    wrong, expected = (
        arguments | {"pseudo": pseudo._replace(label=one, keep=pseudo.keep & (none >= 0))}
        for one in (label, none)
    )
    monkeypatch.setattr("ulfine_fast.ops._checks.labels", lambda *_: None)
    assert_same_state(
        advanced(state, backend, wrong, **changes), advanced(state, backend, expected, **changes)
    )


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_a_rate_near_one_leaves_its_share_to_what_is_new(backend) -> None:
    state, arguments = moving(7, 9, 5, 6)
    for name in ("kept_distribution", "distribution", "branch_scale"):
        getattr(state, name).zero_()
    rates = {"beta": 0.999999, "gamma": 0.999999, "scale_decay": 0.999999}
    got = advanced(state, backend, arguments, **rates)
    exact = advanced(state.double(), "reference", widened(arguments), **rates)
    for name in ("kept_distribution", "distribution", "branch_scale"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=1e-5, atol=0)


def test_a_measurement_and_a_mark_that_do_not_fit_are_refused() -> None:
    state = PrototypeState(text())
    with pytest.raises(ValueError, match=r"measure: branch_scale must be \[2\], got \[1\]"):
        state.measure(torch.ones(1), 0.9)
    with pytest.raises(ValueError, match=r"measure: decay must be in \[0, 1\], got 2"):
        state.measure(torch.ones(2), 2.0)
    with pytest.raises(TypeError, match="normalize: finite must be a tensor, got bool"):
        state.normalize(True)
