"""Every learner on small synthetic features, and the formulas of each family by hand."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic import small_data
from torch.nn import functional as F

from ulfine_fast.config import METHODS, Method, Training
from ulfine_fast.features import FeatureData
from ulfine_fast.learners import LEARNERS, Learner, Pseudo, build_learner
from ulfine_fast.learners.acr import AcrConfig, reversed_ranks
from ulfine_fast.learners.ccl import CclConfig
from ulfine_fast.learners.daso import DasoConfig
from ulfine_fast.learners.finessl import FineSslConfig
from ulfine_fast.learners.freematch import FreeMatchConfig
from ulfine_fast.learners.learner import confident, consistency
from ulfine_fast.learners.loft import LoftConfig
from ulfine_fast.learners.running import RunningSum, class_sums
from ulfine_fast.losses import LOSSES, one_hot
from ulfine_fast.optimizer import MOMENTUM

FINITE = torch.tensor(True)
# eta is settled before a head is built
CONFIGS = {**LEARNERS, "ulfine_plus": replace(LEARNERS["ulfine_plus"], eta_folds=0)}
FAMILIES = {
    "freematch": FreeMatchConfig(fairness_weight=0.01),
    "daso": DasoConfig(threshold=0.6),
    "acr": AcrConfig(threshold=0.6),
    "ccl": CclConfig(threshold=0.6),
    "finessl": FineSslConfig(),
    "loft": LoftConfig(),
}
SEMI = {**{name: CONFIGS[name] for name in ("fixmatch_la", "ulfine", "ulfine_plus")}, **FAMILIES}
TRAINED = {**{name: config for name, config in CONFIGS.items() if name != "zero_shot"}, **FAMILIES}


def built(config, data=None) -> tuple[Learner, FeatureData]:
    data = small_data() if data is None else data
    return build_learner(config, data.prototypes, data.labelled_counts, seed=0), data


def draw(data, step, views):
    """Labelled features and targets, weak features, and strong ones [views, B_u, D], of norms around 3."""
    random = torch.Generator().manual_seed(100 + step)
    labelled = torch.randint(len(data.labels), (16,), generator=random)
    unlabelled = torch.randperm(data.weak.shape[1], generator=random)[:24]
    norm = lambda rows: 3.0 + torch.rand(*rows.shape[:-1], 1, generator=random)  # noqa: E731
    parts = data.labelled[0, labelled], data.weak[0, unlabelled], data.strong[:views, unlabelled]
    labelled_features, weak, strong = (part * norm(part) for part in parts)
    return labelled_features, data.labels[labelled], weak, strong


def kept(pseudo, strong):
    """Strong features [n, D] that the pseudo-labels ask for, and the row of each."""
    rows = pseudo.weight.nonzero()[:, 0]
    return strong[:, rows].flatten(0, 1), rows.repeat(len(strong))


def train(learner, data, optimizer, steps, total=30):
    """Loss of each step."""
    losses = []
    for step in steps:
        labelled, targets, weak, strong = draw(data, step, learner.views)
        if not learner.semi:
            weak, strong = weak[:0], strong[:, :0]
        if step == 0:
            learner.start(weak)
        pseudo = learner.pseudo(weak, step / total)
        loss = learner.loss(labelled, targets, *kept(pseudo, strong), pseudo, step / total)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.advance(labelled, targets, weak, pseudo, FINITE)
        losses.append(float(loss.detach()))
    return losses


def sgd(learner, rate=0.01):
    return torch.optim.SGD(learner.groups(5e-4), lr=rate, momentum=MOMENTUM)


def accuracy(learner, data):
    return float((learner.logits(data.test).argmax(-1) == data.test_labels).float().mean())


def bits(learner):
    return {name: tensor.clone() for name, tensor in learner.state_dict().items()}


def assert_same(learner, before):
    for name, tensor in learner.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def trained(name, steps=4):
    learner, data = built(SEMI[name])
    train(learner, data, sgd(learner, rate=0.1), range(steps))
    return learner, data


# Contract, of every learner


@pytest.mark.parametrize("name", TRAINED)
def test_training_beats_zero_shot_and_lowers_the_loss(name):
    learner, data = built(TRAINED[name], small_data(noise=0.15, text_noise=0.5))
    zero_shot = accuracy(build_learner("zero_shot", data.prototypes, data.labelled_counts, seed=0), data)
    losses = train(learner, data, sgd(learner), range(30))
    assert all(map(math.isfinite, losses))
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    assert accuracy(learner, data) > zero_shot


@pytest.mark.parametrize("name", TRAINED)
def test_the_gradient_reaches_features_and_parameters(name):
    learner, data = built(TRAINED[name])
    labelled, targets, weak, strong = draw(data, 0, learner.views)
    learner.start(weak)
    pseudo = learner.pseudo(weak, 0.5)
    features, rows = kept(pseudo, strong)
    for part in (labelled, features):
        part.requires_grad_()
    learner.loss(labelled, targets, features, rows, pseudo, 0.5).backward()
    assert labelled.grad.isfinite().all() and labelled.grad.any(-1).all()
    if learner.semi and len(rows):
        assert features.grad.isfinite().all() and features.grad.any()
    for group in learner.groups(5e-4):
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in group["params"])


@pytest.mark.parametrize("name", SEMI)
def test_pseudo_labels_change_no_state_and_have_no_gradient(name):
    learner, data = trained(name)
    before = bits(learner)
    *_, weak, _ = draw(data, 9, 1)
    pseudo = learner.pseudo(weak.requires_grad_(), 0.5)
    assert_same(learner, before)
    assert pseudo.label.dtype == torch.int64 and pseudo.weight.dtype == torch.float32
    for tensor in (pseudo.label, pseudo.weight, pseudo.target, *pseudo.detail):
        assert len(tensor) == len(weak) and not tensor.requires_grad
    assert (pseudo.weight >= 0).all()


@pytest.mark.parametrize("name", SEMI)
def test_a_step_that_is_not_finite_changes_no_bit(name):
    learner, data = trained(name)
    before = bits(learner)
    labelled, targets, weak, _ = draw(data, 9, 1)
    pseudo = learner.pseudo(weak, 0.5)
    learner.advance(labelled * math.nan, targets, weak, pseudo, torch.tensor(False))
    assert_same(learner, before)
    learner.advance(labelled, targets, weak, pseudo, FINITE)
    estimators = name not in ("fixmatch_la", "loft")
    changed = [n for n, t in learner.state_dict().items() if not torch.equal(t, before[n])]
    assert bool(changed) == estimators or name == "fixmatch_la"


@pytest.mark.parametrize("name", SEMI)
def test_a_restored_run_continues_bit_by_bit(name):
    learner, data = built(SEMI[name])
    optimizer = sgd(learner)
    train(learner, data, optimizer, range(4))
    other, _ = built(SEMI[name])
    other.load_state_dict(learner.state_dict())
    continued = sgd(other)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(learner, data, optimizer, range(4, 7)) == train(other, data, continued, range(4, 7))
    assert_same(other, bits(learner))


@pytest.mark.parametrize("name", SEMI)
def test_a_batch_without_unlabelled_rows(name):
    learner, data = trained(name)
    labelled, targets, weak, strong = draw(data, 9, learner.views)
    pseudo = learner.pseudo(weak[:0], 0.5)
    loss = learner.loss(labelled, targets, strong[0, :0], torch.empty(0, dtype=torch.int64), pseudo, 0.5)
    loss.backward()
    assert loss.isfinite()
    learner.advance(labelled, targets, weak[:0], pseudo, FINITE)
    assert all(t.isfinite().all() for t in learner.state_dict().values())


@pytest.mark.parametrize("name", SEMI)
def test_without_a_kept_row_the_unlabelled_loss_is_0(name):
    learner, data = trained(name)
    labelled, targets, weak, strong = draw(data, 9, learner.views)
    pseudo = learner.pseudo(weak, 0.5)
    pseudo = pseudo._replace(weight=torch.zeros_like(pseudo.weight))
    none = torch.empty(0, dtype=torch.int64)
    loss = learner.loss(labelled, targets, strong[0, :0], none, pseudo, 0.5)
    alone = learner.loss(labelled, targets, strong[0, :0], none, learner.pseudo(weak[:0], 0.5), 0.5)
    assert loss == alone


@pytest.mark.parametrize("name", SEMI)
def test_rejected_rows_need_not_be_encoded(name):
    """The mean is over all views of the batch, so leaving out rows of weight 0 changes nothing."""
    learner, data = trained(name)
    labelled, targets, weak, strong = draw(data, 9, learner.views)
    pseudo = learner.pseudo(weak, 0.0)
    pseudo.weight[::3] = 0.0
    if name == "finessl":
        pseudo.detail[0][::3] = False
    some, rows = kept(pseudo, strong)
    assert 0 < len(rows) < learner.views * len(weak)
    every = torch.arange(len(weak)).repeat(learner.views)
    if name == "freematch":
        learner.config = replace(learner.config, fairness_weight=0.0)
    arguments = pseudo, 0.0
    torch.testing.assert_close(
        learner.loss(labelled, targets, some, rows, *arguments),
        learner.loss(labelled, targets, strong.flatten(0, 1), every, *arguments),
    )


@pytest.mark.parametrize("name", SEMI)
def test_the_unlabelled_mean_is_over_all_views(name):
    learner, data = trained(name)
    labelled, targets, weak, strong = draw(data, 9, learner.views)
    if name == "freematch":
        learner.config = replace(learner.config, fairness_weight=0.0)
    pseudo = learner.pseudo(weak, 0.5)
    none = learner.loss(labelled, targets, strong[0, :0], torch.empty(0, dtype=torch.int64), pseudo, 0.5)
    once = learner.loss(labelled, targets, *kept(pseudo, strong), pseudo, 0.5) - none
    doubled = Pseudo(
        *(torch.cat([t, t]) for t in pseudo[:3]), tuple(torch.cat([t, t * 0]) for t in pseudo.detail)
    )
    doubled.weight[len(weak) :] = 0.0
    half = learner.loss(labelled, targets, *kept(pseudo, strong), doubled, 0.5) - none
    assert once > 0
    torch.testing.assert_close(half, once / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SEMI)
def test_features_that_are_not_finite_get_no_pseudo_label(name):
    learner, data = trained(name)
    labelled, targets, weak, _ = draw(data, 9, 1)
    weak[3] = math.nan
    pseudo = learner.pseudo(weak, 0.5)
    assert pseudo.label[3] == -1 and pseudo.weight[3] == 0
    assert (pseudo.label[:3] >= 0).all()
    learner.advance(labelled, targets, weak, pseudo, FINITE)
    assert all(t.isfinite().all() for t in learner.state_dict().values())


@pytest.mark.parametrize("name", SEMI)
def test_copies_of_labelled_images_are_not_counted(name):
    learner, data = trained(name)
    labelled, targets, weak, _ = draw(data, 9, 1)
    pseudo = learner.pseudo(weak, 0.5)
    other = copy.deepcopy(learner)
    copies = torch.arange(len(weak)) % 2 == 1
    learner.advance(labelled, targets, weak, pseudo, FINITE, copies=copies)
    if isinstance(learner.config, Method):
        # what was kept is trained on and so counts in `kept_distribution`, copy or not
        without = pseudo._replace(label=torch.where(copies, -1, pseudo.label))
        other.advance(labelled, targets, weak, without, FINITE)
        assert torch.equal(learner.head.state.distribution, other.head.state.distribution)
        return
    seen = Pseudo(*(t[~copies] for t in pseudo[:3]), tuple(t[~copies] for t in pseudo.detail))
    other.advance(labelled, targets, weak[~copies], seen, FINITE)
    for tensor, wanted in zip(learner.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, wanted)


@pytest.mark.parametrize("name", TRAINED)
def test_a_class_without_labelled_images_keeps_everything_finite(name):
    data = small_data()
    keep = data.labels != 5
    counts = data.labelled_counts.clone()
    counts[5] = 0
    data = replace(data, labelled=data.labelled[:, keep], labels=data.labels[keep], labelled_counts=counts)
    learner, _ = built(TRAINED[name], data)
    assert all(map(math.isfinite, train(learner, data, sgd(learner), range(6))))
    assert all(t.isfinite().all() for t in learner.state_dict().values())
    assert (learner.logits(data.test).argmax(-1) == 5).float().mean() < 0.5


@pytest.mark.parametrize("name", SEMI)
def test_targets_of_minus_1_are_left_out(name):
    learner, data = trained(name)
    labelled, targets, weak, strong = draw(data, 9, learner.views)
    targets[4] = -1
    pseudo = learner.pseudo(weak[:0], 0.5)
    arguments = (strong[0, :0], torch.empty(0, dtype=torch.int64), pseudo, 0.5)
    loss = learner.loss(labelled, targets, *arguments)
    labelled[4] = -labelled[4]
    assert learner.loss(labelled, targets, *arguments) == loss
    other = copy.deepcopy(learner)
    learner.advance(labelled, targets, weak, learner.pseudo(weak, 0.5), FINITE)
    labelled[4] *= -2.0
    other.advance(labelled, targets, weak, other.pseudo(weak, 0.5), FINITE)
    assert_same(learner, bits(other))


@pytest.mark.parametrize("name", SEMI)
def test_autocast_and_half_features_keep_float32_arithmetic(name):
    learner, data = trained(name)
    labelled, targets, weak, strong = draw(data, 9, learner.views)
    labelled, weak, strong = (t.bfloat16() for t in (labelled, weak, strong))

    def step(learner):
        pseudo = learner.pseudo(weak, 0.5)
        loss = learner.loss(labelled, targets, *kept(pseudo, strong), pseudo, 0.5)
        learner.advance(labelled, targets, weak, pseudo, FINITE)
        return loss

    other = copy.deepcopy(learner)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(learner)
        assert learner.logits(weak).dtype == torch.float32
    assert loss == step(other)
    assert_same(learner, bits(other))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_branch_predicts_and_folding_is_exact(name):
    learner, data = built({**CONFIGS, **FAMILIES}[name])
    if learner.semi:
        train(learner, data, sgd(learner), range(3))
    logits = learner.logits(data.test)
    first = next(iter(learner.branches().values()))
    assert torch.equal(first(data.test), logits)
    assert logits.dtype == torch.float32
    for branch in learner.branches().values():
        assert branch(data.test).shape == logits.shape
    folded = learner.folded()
    assert (folded is None) == (name == "ccl")
    if folded is not None:
        torch.testing.assert_close(F.normalize(5 * data.test, dim=-1) @ folded.T, logits)
    torch.testing.assert_close(learner.logits(7 * data.test), logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_unit_rows_and_scales_do_not_decay(name):
    learner, _ = built(CONFIGS[name])
    decays = {}
    for group in learner.groups(0.02):
        decays |= {id(p): group["weight_decay"] for p in group["params"]}
    names = {name: decays[id(p)] for name, p in learner.named_parameters() if id(p) in decays}
    exempt = {"head.state.textual", "head.log_scale", "auxiliary.log_scale"}
    assert {n: decay for n, decay in names.items() if n not in exempt} == {
        n: 0.02 for n in names if n not in exempt
    }
    assert all(names[n] == 0.0 for n in names if n in exempt)
    learned = {n for n, _ in learner.named_parameters()}
    assert set(names) == learned - ({"head.state.textual"} if name != "ulfine" else set())


def test_what_cannot_be_built_says_why():
    prototypes, counts = torch.randn(3, 4), torch.tensor([4, 2, 1])
    with pytest.raises(
        ValueError, match="build_learner: method must be one of .*acr.*got 'akr'; did you mean acr"
    ):
        build_learner("akr", prototypes, counts, seed=0)
    with pytest.raises(ValueError, match="eta_folds must be 0"):
        build_learner("ulfine_plus", prototypes, counts, seed=0)
    with pytest.raises(TypeError, match="method must be a name or a learner's config, got Training"):
        build_learner(Training(), prototypes, counts, seed=0)
    with pytest.raises(ValueError, match=r"labelled_counts must be \[3\], got \[2\]"):
        build_learner("acr", prototypes, counts[:2], seed=0)
    for wrong in (torch.zeros(3, dtype=torch.int64), torch.tensor([3, -1, 2])):
        with pytest.raises(ValueError, match="labelled_counts must be at least 0 and not all 0"):
            build_learner("acr", prototypes, wrong, seed=0)


@pytest.mark.parametrize(
    ("config", "field", "value", "expected"),
    [
        (FreeMatchConfig, "window", 1.5, "in [0, 1]"),
        (FreeMatchConfig, "fairness_weight", -1.0, "at least 0"),
        (DasoConfig, "threshold", 1.1, "in [0, 1]"),
        (DasoConfig, "prototype_temperature", 0.0, "at least 0.001"),
        (AcrConfig, "views", 3, "1 or 2"),
        (CclConfig, "unlabelled_weight", math.inf, "finite"),
        (FineSslConfig, "margin", math.nan, "finite"),
        (LoftConfig, "scale", 0.0, "in [0.001, 1000.0]"),
    ],
)
def test_a_number_outside_its_range_is_named(config, field, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"{field} must be {expected}, got {value}")):
        config(**{field: value})


def test_choices_that_exclude_each_other_are_named():
    with pytest.raises(ValueError, match=r"soft_threshold must be at most hard_threshold 0.6, got 0.7"):
        LoftConfig(soft_threshold=0.7)
    with pytest.raises(ValueError, match="labelled_loss must be one of cross_entropy.*got 'hinge'"):
        replace(METHODS["lift"], labelled_loss="hinge")
    with pytest.raises(ValueError, match="labelled_loss must be logit_adjustment unless eta is 1"):
        replace(METHODS["ulfine"], labelled_loss="ldam")
    with pytest.raises(ValueError, match="views must be 1 or 2, got 3"):
        replace(METHODS["ulfine"], views=3)


# Parts


def test_a_running_sum_looks_back_on_a_share_of_the_run():
    sums = RunningSum(2, window=0.5)
    assert torch.equal(sums.share(), torch.tensor([0.5, 0.5]))
    total = np.zeros(2)
    for step, amount in enumerate(([4.0, 0.0], [1.0, 2.0], [0.0, 3.0])):
        total = (1 - 1 / (1 + 0.5 * step)) * total + np.array(amount)
        sums.add_(torch.tensor(amount), FINITE)
    np.testing.assert_allclose(sums.sum.numpy(), total, rtol=1e-6)
    np.testing.assert_allclose(sums.share().numpy(), (total + 1) / (total.sum() + 2), rtol=1e-6)
    before = bits(sums)
    sums.add_(torch.tensor([math.nan, 1.0]), torch.tensor(False))
    assert_same(sums, before)


def test_class_sums_are_of_directions():
    features = torch.tensor([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]])
    sums = class_sums(features, one_hot(torch.tensor([1, 1, -1]), 3))
    torch.testing.assert_close(sums, torch.tensor([[0.0, 0.0], [0.6, 1.8], [0.0, 0.0]]))


def test_confidence_of_rows_that_are_not_finite_is_0():
    label, confidence = confident(torch.tensor([[0.2, 0.8], [math.nan, math.nan]]))
    assert label.tolist() == [1, -1] and confidence.tolist() == pytest.approx([0.8, 0.0])


def test_consistency_by_hand():
    logits = torch.randn(3, 2, dtype=torch.float64)
    rows = torch.tensor([0, 2, 0])
    hard = Pseudo(torch.tensor([1, 0, 0]), torch.tensor([2.0, 0.0, 0.5]), torch.tensor([1, 0, -1]))
    each = -logits.log_softmax(-1)
    expected = 2.0 * (each[0, 1] + each[2, 1]) / (2 * 3)
    torch.testing.assert_close(consistency(logits, rows, hard, 2), expected)
    target = torch.tensor([[0.3, 0.7], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    expected = (2.0 * (each[0] + each[2]) @ target[0] + 0.5 * each[1, 0]) / 3
    torch.testing.assert_close(consistency(logits, rows, hard._replace(target=target), 1), expected)


# The library's own family


@pytest.mark.parametrize("loss", LOSSES)
def test_the_labelled_loss_of_a_cosine_probe_can_be_chosen(loss):
    config = replace(METHODS["lift"], labelled_loss=loss, linear_scale=20.0)
    learner, data = built(config)
    labelled, targets, weak, _ = draw(data, 0, 1)
    pseudo = learner.pseudo(weak[:0], 0.0)
    found = learner.loss(labelled, targets, weak[:0], torch.empty(0, dtype=torch.int64), pseudo, 0.0)
    options = {"scale": 20.0} if loss == "ldam" else {}
    expected = LOSSES[loss](learner.logits(labelled), targets, data.labelled_counts, **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale_rows", [8, 16, 100])
def test_the_branch_scales_of_a_batch_in_parts_are_those_of_the_whole(scale_rows):
    learner, data = built(replace(CONFIGS["ulfine"], scale_rows=scale_rows))
    labelled, targets, weak, _ = draw(data, 0, 1)
    learner.start(weak)
    parts = [learner.pseudo(part, 0.0) for part in (weak[:12], weak[12:])]
    joined = Pseudo(
        *(torch.cat(t) for t in zip(*(p[:3] for p in parts), strict=True)),
        tuple(torch.cat(t) for t in zip(*(p.detail for p in parts), strict=True)),
    )
    whole = learner.head.pseudo_label(weak, 0.7, scale_rows=scale_rows).branch_scale
    before = learner.head.state.branch_scale.clone()
    learner.advance(labelled, targets, weak, joined, FINITE)
    torch.testing.assert_close(learner.head.state.branch_scale, 0.99 * before + 0.01 * whole)


# FreeMatch


def test_freematch_thresholds_by_hand():
    learner, data = built(FreeMatchConfig(window=1.0))
    classes = len(data.prototypes)
    torch.testing.assert_close(learner.thresholds(), torch.full((classes,), 1 / classes))
    total, confidence = np.zeros(classes), 0.0
    for step in range(2):
        labelled, targets, weak, _ = draw(data, step, 1)
        p = learner.head(weak).detach().double().softmax(-1).numpy()
        total = step / (1 + step) * total + p.sum(0)
        confidence = step / (1 + step) * confidence + p.max(1).sum()
        learner.advance(labelled, targets, weak, learner.pseudo(weak, 0.0), FINITE)
    mean = (total + 1) / (total.sum() + classes)
    expected = (confidence + 1) / (total.sum() + classes) * mean / mean.max()
    np.testing.assert_allclose(learner.thresholds().numpy(), expected, rtol=1e-5)
    *_, weak, _ = draw(data, 5, 1)
    p = learner.head(weak).detach().double().softmax(-1).numpy()
    wanted = p.max(1) >= expected[p.argmax(1)]
    pseudo = learner.pseudo(weak, 0.0)
    assert 0 < wanted.sum() < len(wanted)
    assert ((pseudo.weight > 0).numpy() == wanted).all()
    assert (pseudo.label.numpy() == p.argmax(1)).all()


def test_freematch_fairness_by_hand():
    learner, data = trained("freematch")
    labelled, targets, weak, strong = draw(data, 9, 1)
    pseudo = learner.pseudo(weak, 0.5)
    features, rows = kept(pseudo, strong)
    p = learner.head(features).detach().double().softmax(-1).numpy()
    histogram = np.bincount(p.argmax(1), minlength=p.shape[1]) / len(p)
    b = np.where(histogram > 0, p.mean(0) / np.maximum(histogram, 1e-9), 0)
    a = (learner.probabilities.share() / learner.predicted.share()).double().numpy()
    term = (a / a.sum() * np.log(np.maximum(b / b.sum(), 1e-12))).sum()
    with_term = learner.loss(labelled, targets, features, rows, pseudo, 0.5)
    learner.config = replace(learner.config, fairness_weight=0.0)
    without = learner.loss(labelled, targets, features, rows, pseudo, 0.5)
    assert float((with_term - without).detach()) == pytest.approx(0.01 * term, rel=1e-3)


# DASO


def test_daso_blend_by_hand():
    config = DasoConfig(blend_temperature=0.5, threshold=0.6, warm_up=0.1)
    learner, data = built(config)
    classes = len(data.prototypes)
    labelled, targets, weak, _ = draw(data, 0, 1)
    first = learner.pseudo(weak, 0.05)
    learner.advance(labelled, targets, weak, first, FINITE)
    linear = learner.head(weak).detach().double().softmax(-1).numpy()
    assert (first.label.numpy() == linear.argmax(1)).all()
    m = np.bincount(linear.argmax(1), minlength=classes) + 1.0
    v = (m / m.max()) ** 2
    np.testing.assert_allclose(learner.blend().numpy(), v, rtol=1e-5)

    x = F.normalize(labelled.double(), dim=-1).numpy()
    means = F.normalize(data.prototypes.double(), dim=-1).numpy()
    for k in range(classes):
        if (targets == k).any():
            mean = x[(targets == k).numpy()].sum(0)
            means[k] = mean / np.linalg.norm(mean)
    cosine = F.normalize(weak.double(), dim=-1).numpy() @ means.T
    semantic = np.exp(20 * cosine) / np.exp(20 * cosine).sum(1, keepdims=True)
    share = v[linear.argmax(1)][:, None]
    blended = (1 - share) * linear + share * semantic
    early = np.where(linear.max(1) >= 0.6, linear.argmax(1), -1)
    assert (learner.pseudo(weak, 0.05).target.numpy() == early).all()
    pseudo = learner.pseudo(weak, 0.1)
    assert (pseudo.label.numpy() == blended.argmax(1)).all()
    wanted = np.where(blended.max(1) >= 0.6, blended.argmax(1), -1)
    assert (wanted == -1).any() and (wanted != early).any()
    assert (pseudo.target.numpy() == wanted).all()
    np.testing.assert_allclose(pseudo.detail[0].numpy(), semantic, rtol=1e-4)


def test_daso_aligns_every_image_after_its_warm_up_only():
    learner, data = built(DasoConfig(threshold=0.9, warm_up=0.1))
    labelled, targets, weak, strong = draw(data, 0, 1)
    early, late = learner.pseudo(weak, 0.05), learner.pseudo(weak, 0.1)
    assert torch.equal(early.weight > 0, early.target >= 0) and (early.weight == 0).any()
    assert (late.weight == 1).all() and (late.target == -1).any()
    every = torch.arange(len(weak))
    plain = learner.loss(labelled, targets, strong[0], every, late, 0.05)
    aligned = learner.loss(labelled, targets, strong[0], every, late, 0.1)
    z = learner.semantic(strong[0]).double().log_softmax(-1)
    term = -(late.detail[0].double() * z).sum(-1).mean()
    assert float((aligned - plain).detach()) == pytest.approx(float(term), rel=1e-5)
    off, _ = built(DasoConfig(threshold=0.9, warm_up=0.1, alignment_weight=0.0))
    assert torch.equal(off.pseudo(weak, 0.1).weight > 0, late.target >= 0)


# ACR


def test_acr_tau_is_0_1_and_2_at_its_anchors():
    counts = torch.tensor([1000, 200, 40, 8])
    learner = build_learner("acr", torch.randn(4, 5), counts, seed=0)
    prior = counts.double() / counts.sum()
    found = []
    for truth in (prior, torch.full((4,), 0.25), prior.flip(0)):
        learner.accepted.sum.copy_(1e5 * truth)
        p = (1e5 * truth.double().numpy() + 1) / (1e5 + 4)
        anchors = [prior.numpy(), np.full(4, 0.25), prior.numpy()[::-1]]
        distance = [0.5 * (p * np.log(p / a)).sum() + 0.5 * (a * np.log(a / p)).sum() for a in anchors]
        expected = 2 * math.exp(distance[0]) / sum(map(math.exp, distance))
        found.append(float(learner.tau()))
        assert found[-1] == pytest.approx(expected, rel=1e-5)
    assert found[0] < 0.1 and 0.7 < found[1] < 1 and found[2] > 1.8


def test_reversed_ranks_swap_head_and_tail():
    prior = torch.tensor([0.1, 0.6, 0.3])
    assert torch.equal(reversed_ranks(prior), torch.tensor([0.6, 0.1, 0.3]))


def test_acr_gives_each_head_its_own_labels():
    learner, data = built(AcrConfig(scale=5.0))
    with torch.no_grad():
        learner.head.weight += 0.2 * torch.randn(learner.head.weight.shape)
    *_, weak, _ = draw(data, 9, 2)
    prior = (data.labelled_counts.double() / data.labelled_counts.sum()).log()
    logits = learner.plain(weak).detach().double()
    plain, label = logits.softmax(-1).max(-1)
    adjusted, adjusted_label = (logits - learner.tau().double() * prior).softmax(-1).max(-1)
    balanced, balanced_label = learner.head(weak).detach().double().softmax(-1).max(-1)
    assert not torch.equal(label, adjusted_label)
    # some rows are kept by their plain confidence alone, some by the adjusted one alone
    threshold = float(torch.cat([plain, adjusted]).quantile(0.5))
    learner.config = replace(learner.config, threshold=threshold)
    assert ((plain >= threshold) & (adjusted < threshold)).any()
    assert ((plain < threshold) & (adjusted >= threshold)).any()
    sure = torch.maximum(adjusted, plain) >= threshold
    pseudo = learner.pseudo(weak, 0.5)
    assert torch.equal(pseudo.target, torch.where(sure, adjusted_label, -1))
    own = torch.where(balanced >= threshold, balanced_label, -1)
    assert torch.equal(pseudo.detail[0], own)
    assert torch.equal(pseudo.label, balanced_label)
    assert torch.equal(pseudo.weight > 0, sure | (own >= 0))


def test_a_class_without_labelled_images_counts_as_one_where_a_prior_divides():
    learner = build_learner("acr", torch.randn(3, 4), torch.tensor([3, 0, 1]), seed=0)
    torch.testing.assert_close(learner.labelled_prior(), torch.tensor([0.6, 0.2, 0.2]))


def test_acr_counts_every_kept_label():
    learner, data = built(AcrConfig(window=1.0))
    labelled, targets, weak, _ = draw(data, 0, 1)
    pseudo = learner.pseudo(weak, 0.0)
    pseudo = pseudo._replace(detail=(torch.tensor([2] * 5 + [0] + [-1] * 18),))
    learner.advance(labelled, targets, weak, pseudo, FINITE)
    assert learner.accepted.sum.tolist() == [1, 0, 5, 0, 0, 0]


# CCL


def test_ccl_fusion_by_hand():
    learner, data = trained("ccl")
    *_, weak, _ = draw(data, 9, 1)
    n = data.labelled_counts.double().numpy()
    m = learner.accepted.sum.double().numpy()
    prior = (n / n.sum() + (m + 1) / (m + 1).sum()) / 2
    plain, balanced = (h(weak).detach().double().numpy() for h in (learner.plain, learner.head))
    z = (plain - np.log(prior)) / 2 + balanced / 2
    np.testing.assert_allclose(learner.logits(weak).detach().numpy(), z, rtol=1e-4, atol=1e-5)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    pseudo = learner.pseudo(weak, 0.5)
    assert (pseudo.label.numpy() == p.argmax(1)).all()
    assert ((pseudo.weight > 0).numpy() == (p.max(1) >= 0.6)).all()
    assert set(pseudo.weight.tolist()) == {0.0, 1.5}
    before = learner.accepted.sum.double().numpy()
    labelled, targets, *_ = draw(data, 9, 1)
    learner.advance(labelled, targets, weak, pseudo, FINITE)
    t = 0.1 * 4
    expected = t / (1 + t) * before + p[p.max(1) >= 0.6].sum(0)
    np.testing.assert_allclose(learner.accepted.sum.numpy(), expected, rtol=1e-5)


def test_ccl_can_ask_for_low_energy():
    config = CclConfig(threshold=0.0, check_energy=True, energy_threshold=-20.0)
    learner, data = built(config)
    *_, weak, _ = draw(data, 0, 1)
    energy = -learner.logits(weak).logsumexp(-1)
    keep = learner.pseudo(weak, 0.0).weight > 0
    assert torch.equal(keep, energy <= -20.0) and 0 < int(keep.sum()) < len(keep)


# FineSSL


def test_finessl_margins_by_hand():
    learner, data = built(FineSslConfig())
    assert not learner.margins().any()
    learner.accepted.sum.copy_(torch.tensor([9.0, 4.0, 0.0, 1.0, 9.0, 2.0]))
    s = np.array([10, 5, 1, 2, 10, 3]) / 10
    margins = 8 * (1 - 0.1) * (1 - s) / (1 + s)
    np.testing.assert_allclose(learner.margins().numpy(), margins, rtol=1e-6)
    labelled, targets, _, _ = draw(data, 0, 1)
    z = learner.head(labelled).detach().double().numpy()
    expected = []
    for row, k in zip(z, targets.tolist(), strict=True):
        raised = row + margins[k]
        raised[k] = row[k]
        expected.append(np.log(np.exp(raised).sum()) - row[k])
    found = learner.labelled_loss(labelled, targets)
    assert float(found.detach()) == pytest.approx(np.mean(expected), rel=1e-5)


def test_finessl_weighs_by_the_auxiliary_head_which_leaves_the_features_alone():
    learner, data = trained("finessl")
    labelled, targets, weak, strong = draw(data, 9, 2)
    main, auxiliary = (h(weak).detach().softmax(-1).max(-1).values for h in (learner.head, learner.auxiliary))
    pseudo = learner.pseudo(weak, 0.5)
    torch.testing.assert_close(pseudo.weight, 3.0 * auxiliary)
    assert torch.equal(pseudo.detail[0], main >= 0.7) and main.min() < 0.7 < main.max()
    assert torch.equal(pseudo.label, learner.head(weak).argmax(-1))
    features, rows = kept(pseudo, strong)
    z = learner.auxiliary(features).double().log_softmax(-1)
    smoothed = 0.5 * one_hot(pseudo.label, z.shape[1], z.dtype)[rows] + 0.5 / z.shape[1]
    unlabelled = -((smoothed * z).sum(-1) * pseudo.detail[0][rows]).sum() / (2 * len(weak))
    supervised = F.cross_entropy(learner.auxiliary(labelled), targets, label_smoothing=0.5)
    main = consistency(
        learner.head(features) - learner.margins() * one_hot(pseudo.label[rows], z.shape[1]), rows, pseudo, 2
    )
    expected = learner.labelled_loss(labelled, targets) + main + supervised + unlabelled
    labelled.requires_grad_(), features.requires_grad_()
    loss = learner.loss(labelled, targets, features, rows, pseudo, 0.5)
    torch.testing.assert_close(loss.double(), expected.double())
    gradients = torch.autograd.grad(loss, (labelled, features))
    with torch.no_grad():
        learner.auxiliary.weight.neg_()
    again = torch.autograd.grad(
        learner.loss(labelled, targets, features, rows, pseudo, 0.5), (labelled, features)
    )
    for found, wanted in zip(again, gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_finessl_starts_two_equal_heads_with_the_scale_of_its_source():
    learner, _ = built(FineSslConfig())
    assert torch.equal(learner.head.weight, learner.auxiliary.weight)
    assert float(learner.head.log_scale.detach().exp()) == pytest.approx(1 / 0.07, rel=1e-6)


# LoFT


def test_loft_splits_by_confidence():
    learner, _ = built(LoftConfig(hard_threshold=0.7, soft_threshold=0.4))
    logits = torch.tensor(
        [[3.0, 0, 0, 0, 0, 0], [1.5, 1.4, -3, -3, -3, -3], [0.1, 0, 0, 0, 0, 0], [math.nan] * 6]
    )
    learner.head.forward = lambda _: logits
    pseudo = learner.pseudo(torch.zeros(4, 16), 0.0)
    assert pseudo.label.tolist() == [0, 0, 0, -1]
    assert pseudo.weight.tolist() == [3.0, 1.0, 0.0, 0.0]
    assert pseudo.target[0].tolist() == [1, 0, 0, 0, 0, 0]
    p = np.exp(logits[1].double().numpy())
    np.testing.assert_allclose(pseudo.target[1].numpy(), p / p.sum(), rtol=1e-6)
    assert pseudo.target.isfinite().all()
