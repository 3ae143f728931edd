import pytest
import torch
from tolerances import assert_same_bits, seeded, unchanged
from torch import nn

from ulfine_fast import PrototypeState, PseudoLabels, proto_fit, pseudo_label
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
