"""Runs on cached features: the step by its formula, records, resume; on small synthetic features."""

from __future__ import annotations

import copy
import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import TRAINED, cached_run, small_data
from tolerances import never_waits
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ulfine_fast import loop, use_backend
from ulfine_fast.batches import FeatureViews, Stream
from ulfine_fast.checkpoint import CheckpointError, Terminated, load_checkpoint
from ulfine_fast.config import METHODS, Training
from ulfine_fast.distributed import World
from ulfine_fast.engine import Engine, Student
from ulfine_fast.evaluation import metrics, predict
from ulfine_fast.learners import LEARNERS, Learner, build_learner
from ulfine_fast.loop import CHECKPOINT
from ulfine_fast.losses import labelled_log_prior
from ulfine_fast.ops.dual_cross_entropy import dual_cross_entropy_reference
from ulfine_fast.ops.orthogonality import orthogonality_reference
from ulfine_fast.optimizer import learning_rate

SCHEDULE = Training(steps=40, labelled_batch=16, unlabelled_batch=24, learning_rate=0.05, log_every=10)
ULFINE = METHODS["ulfine"]
RESUMED = [
    (name, optimizer) for name in ("ulfine", "ulfine_plus", "fixmatch") for optimizer in ("sgd", "adamw")
]


def small_run(method=ULFINE, schedule=SCHEDULE, data=None, **options):
    data = small_data() if data is None else data
    method = replace(method, eta_folds=0)
    # what of `experiment.run` tells two runs apart
    identity = {
        "method": {"mu": method.mu},
        "data": {"labelled": loop.digest_of({"": data.labelled})},
    }
    return cached_run(method, schedule, data, identity=identity, **options)


class OneBatch(FeatureViews):
    """The batch of step 0 in every step, and whatever a test makes of it."""

    def batch(self, step, labelled, unlabelled, views):
        return self.changed(super().batch(0, labelled, unlabelled, views))

    changed = staticmethod(lambda batch: batch)


def engine_of(method=ULFINE, data=None, schedule=SCHEDULE, views=OneBatch, device="cpu"):
    data = small_data() if data is None else data
    learner = build_learner(method, data.prototypes.to(device), data.labelled_counts, seed=0)
    return Engine(Student(nn.Identity(), learner), views.of(data, schedule, device), schedule, World())


def middle_confidence(engine):
    """A threshold that keeps about half of the batch."""
    return float(engine.learner.head.pseudo_label(engine.batch(0).weak, 0.0).confidence.median()) - 1e-6


def snapshot(engine):
    return {name: tensor.detach().clone() for name, tensor in engine.state.tensors().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("adjust", ["none", "labelled", "kept", "both"])
@pytest.mark.parametrize("loss_on", ["branches", "fused"])
def test_step_minimises_the_written_formula(adjust, loss_on):
    method = replace(ULFINE, adjust_unlabelled=adjust, loss_on=loss_on, unlabelled_weight=0.7)
    method = replace(method, threshold=middle_confidence(engine_of(method)))
    engine = engine_of(method)
    head, batch, log_prior = engine.learner.head, engine.batch(0), engine.learner.log_prior
    head.state.kept_distribution.copy_(torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0, 0.0]))
    kept_prior = head.state.kept_distribution.clamp_min(1e-4)
    kept_prior = (kept_prior / kept_prior.sum()).log()
    pseudo = head.pseudo_label(batch.weak, method.threshold)
    assert 0 < pseudo.keep.sum() < len(pseudo.keep)

    linear = head.linear.detach().double().requires_grad_()
    textual = head.state.textual.detach().double().requires_grad_()

    def term(rows, targets, weights, prior):
        adjustment = None if prior is None else prior[None].double()
        fused = loss_on == "fused"
        align = head.state.align()
        return dual_cross_entropy_reference(
            rows.double(),
            targets,
            linear,
            textual.detach(),
            weights.double(),
            adjustment,
            None,
            align,
            method.eta,
            method.linear_scale,
            method.proto_scale,
            fused,
            True,
        )

    labelled = term(batch.labelled, batch.targets, torch.full((16,), 1 / 16), log_prior)
    prior = {
        "none": None,
        "labelled": log_prior,
        "kept": kept_prior,
        "both": (kept_prior + log_prior) / 2,
    }[adjust]
    unlabelled = term(batch.strong, pseudo.label, pseudo.keep * (0.7 / 24), prior)
    loss = labelled + unlabelled + method.orthogonality_weight * orthogonality_reference(textual)
    loss.backward()

    report = engine.step(1)
    assert report.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.equal(report.weight > 0, pseudo.keep)
    torch.testing.assert_close(head.linear.grad, linear.grad.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.state.textual.grad, textual.grad.float(), rtol=1e-4, atol=1e-6)


def test_kept_adjustment_is_none_before_the_first_kept_pseudo_label():
    losses = [
        engine_of(replace(ULFINE, adjust_unlabelled=adjust, threshold=0.5)).step(1).loss.item()
        for adjust in ("none", "kept")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_first_step_measures_the_branches_before_it_fuses_them():
    engine = engine_of(replace(ULFINE, proto_scale=5.0))
    head = engine.learner.head
    expected = head.pseudo_label(engine.batch(0).weak, 0.7, scale_rows=64).branch_scale
    engine.step(0)
    assert head.state.measured
    torch.testing.assert_close(head.state.branch_scale, expected)
    assert head.state.align() > 2.0


def test_step_updates_the_estimators_after_the_optimizer():
    engine = engine_of(replace(ULFINE, mu=1.0))
    head, batch = engine.learner.head, engine.batch(0)
    before = head.state.textual.detach().clone()
    pseudo = head.pseudo_label(batch.weak, 0.7)
    engine.step(1)
    share = pseudo.histogram / pseudo.histogram.sum()
    torch.testing.assert_close(head.state.distribution, 0.01 * share)
    top = int(share.argmax())
    mean = F.normalize(batch.labelled[batch.targets == top].mean(0), dim=0)
    # alpha of the most predicted class is mu = 1: its text prototype became its visual mean
    torch.testing.assert_close(head.state.textual[top].detach(), mean)
    assert not torch.equal(before, head.state.textual)


def test_copies_of_labelled_images_do_not_count_in_the_distribution():
    engine = engine_of(data=small_data(protocol="acr"))
    head, batch = engine.learner.head, engine.batch(0)
    copies = engine.copies[batch.places]
    assert copies.any() and not copies.all()
    pseudo = head.pseudo_label(batch.weak[~copies], 0.7)
    engine.step(1)
    torch.testing.assert_close(
        head.state.distribution, 0.01 * pseudo.histogram / pseudo.histogram.sum(), rtol=1e-5, atol=1e-8
    )


def test_rejected_strong_rows_do_not_matter():
    results = []
    method = replace(ULFINE, threshold=middle_confidence(engine_of()))
    for poison in (False, True):
        engine = engine_of(method)
        keep = engine.learner.head.pseudo_label(engine.batch(0).weak, method.threshold).keep
        assert not keep.all()

        def poisoned(batch, keep=keep):
            return batch._replace(strong=torch.where(keep[:, None], batch.strong, torch.nan))

        if poison:
            engine.views.changed = poisoned
        engine.step(1)
        results.append(snapshot(engine))
    assert_same(*results)


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_a_step_that_is_not_finite_changes_nothing(backend, optimizer_name, warm, bad):
    with use_backend(backend):
        check_that_it_changes_nothing(optimizer_name, warm, bad)


def check_that_it_changes_nothing(optimizer_name, warm, bad):
    engine = engine_of(schedule=replace(SCHEDULE, optimizer=optimizer_name, ema=0.5))
    if warm:
        assert engine.step(0).finite
    before = snapshot(engine)

    def poisoned(batch):
        labelled = batch.labelled.clone()
        labelled[3] = bad
        return batch._replace(labelled=labelled)

    engine.views.changed = poisoned
    assert not engine.step(1 if warm else 0).finite
    after = snapshot(engine)
    if not warm and optimizer_name == "adamw":
        # AdamW makes its zero moments at the first step, skipped or not
        assert all(not after.pop(name).any() for name in after.keys() - before.keys())
    assert_same(before, after)
    engine.views.changed = lambda batch: batch
    assert engine.step(2).finite


@pytest.mark.parametrize("name", ["ulfine", "ulfine_plus"])
@pytest.mark.parametrize("kernel", ["cuda"])
def test_a_run_on_the_kernels_is_that_on_the_reference(kernel, name):
    runs = []
    for backend in (kernel, "reference"):
        with use_backend(backend):
            runs.append(small_run(METHODS[name], replace(SCHEDULE, steps=6), small_data(protocol="acr")))
    (got, _), (expected, _) = runs
    assert expected.head.state.kept_distribution.any()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_skipped_first_step_does_not_change_what_follows():
    results = []
    for skip_first in (False, True):
        engine = engine_of()
        if skip_first:
            engine.views.changed = lambda batch: batch._replace(labelled=batch.labelled * torch.nan)
            assert not engine.step(0).finite
            engine.views.changed = lambda batch: batch
        for step in range(3):
            engine.step(step)
        results.append(snapshot(engine))
    assert_same(*results)


@pytest.mark.parametrize("name", TRAINED)
def test_one_call_for_the_loss_is_the_loss_of_the_pseudo_labels(name):
    engine = engine_of(TRAINED[name], small_data(protocol="acr"))
    learner, (labelled, targets, weak, strong, _) = engine.learner, engine.batch(0)
    learner.start(weak)
    for progress in (0.0, 0.5):
        results = [
            call(labelled, targets, weak, strong, progress)
            for call in (learner.joint, partial(Learner.joint, learner))
        ]
        (loss, found), (expected, pseudo) = results
        torch.testing.assert_close(loss, expected)
        assert torch.equal(found.label, pseudo.label)
        assert torch.equal(found.weight > 0, pseudo.weight > 0)


def test_twenty_skips_in_a_row_stop_the_run():
    data = small_data()
    data.labelled.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite in 20 steps in a row; check the features for NaN"):
        small_run(data=data)


def test_twenty_skips_stop_a_run_that_hardly_logs():
    data = small_data()
    data.labelled.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="stopped at step 20"):
        small_run(schedule=replace(SCHEDULE, log_every=1000), data=data)


def test_the_labelled_loss_of_a_record_is_that_after_its_step():
    learner, result = small_run(replace(ULFINE, threshold=1.0), replace(SCHEDULE, log_every=1, steps=1))
    batch = engine_of().batch(0)
    loss = learner.head.loss(batch.labelled, batch.targets, adjustment=learner.log_prior)
    loss = loss + ULFINE.orthogonality_weight * learner.head.orthogonality()
    assert result.history[0]["loss_labelled"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_sample_of_the_reports_leaves_copies_of_labelled_images_out():
    data = small_data(protocol="acr")
    weak, truth = FeatureViews.of(data, SCHEDULE).sample
    own = ~data.unlabelled_is_labelled
    assert sorted(truth.tolist()) == sorted(data.unlabelled_truth[own].tolist())
    assert len(weak) == int(own.sum())


def test_single_skips_are_counted_and_survived():
    class Poisoned(FeatureViews):
        def batch(self, step, *slots):
            batch = super().batch(step, *slots)
            return batch._replace(labelled=batch.labelled * torch.nan) if step % 10 == 3 else batch

    learner, result = small_run(views=Poisoned.of(small_data(), SCHEDULE))
    assert result.skipped == 4
    assert result.history[-1]["skipped"] == 4
    assert all(torch.isfinite(p).all() for p in learner.parameters())


def test_without_unlabelled_weight_the_unlabelled_features_are_not_touched():
    data = small_data()
    poisoned = replace(data, weak=data.weak * torch.nan, strong=data.strong * torch.nan)
    learners = [small_run(METHODS["lift"], data=d)[0] for d in (data, poisoned)]
    assert_same(*(learner.state_dict() for learner in learners))
    assert not learners[0].head.state.distribution.any()


def test_without_mu_and_orthogonality_the_text_stays_bit_by_bit():
    learner, _ = small_run(replace(ULFINE, mu=0.0, orthogonality_weight=0.0))
    assert torch.equal(learner.head.state.textual, learner.head.state.text)
    assert learner.head.state.distribution.any()


def test_learned_prototypes_keep_unit_rows():
    learner, _ = small_run(replace(ULFINE, orthogonality_weight=10.0))
    head = learner.head
    torch.testing.assert_close(head.state.textual.norm(dim=-1), torch.ones(6))
    groups = learner.groups(SCHEDULE.weight_decay)
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decays == {id(head.linear): SCHEDULE.weight_decay, id(head.state.textual): 0.0}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_method_trains(name):
    data = small_data()
    config = TRAINED.get(name, LEARNERS[name])
    learner, result = cached_run(config, replace(SCHEDULE, learning_rate=0.01), data)
    found = metrics(predict(learner, data.test[:, None]), data.test_labels, data.labelled_counts)
    assert next(iter(found.values()))["overall"] >= 0.8
    assert result.steps == (SCHEDULE.steps if learner.trained else 0)
    assert all(("pseudo_labels" in record) == learner.semi for record in result.history)


def test_history_holds_what_the_report_needs():
    _, result = small_run(schedule=replace(SCHEDULE, steps=25))
    assert [record["step"] for record in result.history] == [10, 20, 25]
    last = result.history[-1]
    assert 0 < last["loss_labelled"] < 1
    assert set(last["pseudo_labels"]) == {"fused", "linear", "text"}
    assert sum(last["distribution"]) == pytest.approx(1 - 0.99**25, rel=1e-4)
    assert 0 <= last["distribution_l1"] <= 2
    assert "rows_encoded" not in last


def test_truth_of_the_unlabelled_images_is_for_reports_only():
    data = small_data()
    wrong = replace(data, unlabelled_truth=torch.zeros_like(data.unlabelled_truth))
    learners = [small_run(data=d)[0] for d in (data, wrong)]
    assert_same(*(learner.state_dict() for learner in learners))


def test_stream_is_a_function_of_the_step_and_visits_every_row_once_per_pass():
    stream = Stream(10, 4, (3, 2), seed=5, role=1, device=torch.device("cpu"))
    drawn = torch.cat([stream(step) for step in range(10)], dim=1)
    again = Stream(10, 4, (3, 2), seed=5, role=1, device=torch.device("cpu"))
    assert torch.equal(again(7), drawn[:, 28:32])
    for start in range(0, 40, 10):
        assert sorted(drawn[0, start : start + 10].tolist()) == list(range(10))
    assert set(drawn[1].tolist()) == {0, 1, 2} and set(drawn[2].tolist()) == {0, 1}
    other = Stream(10, 4, (3, 2), seed=5, role=0, device=torch.device("cpu"))
    assert not torch.equal(other(7), again(7))


def test_stream_batch_may_be_larger_than_the_set():
    rows = Stream(5, 12, (), seed=0, role=0, device=torch.device("cpu"))(1)
    assert rows.shape == (1, 12)
    assert np.bincount(rows[0], minlength=5).min() >= 1


def test_learning_rate_is_a_cosine():
    schedule = Training(steps=100, learning_rate=0.2)
    assert learning_rate(schedule, 0) == 0.2
    assert learning_rate(schedule, 50) == pytest.approx(0.1)
    assert learning_rate(schedule, 100) == pytest.approx(0.0)


def test_prior_of_a_class_without_images():
    prior = labelled_log_prior(torch.tensor([3, 1, 0]))
    torch.testing.assert_close(prior, torch.tensor([0.75, 0.25, 1e-12]).log())


def test_predictions_are_those_of_the_branches():
    data = small_data()
    learner, _ = small_run(data=data)
    found, head = predict(learner, data.test[:, None]), learner.head
    logits = head(data.test)
    assert torch.equal(found["fused"].label, logits.argmax(-1))
    torch.testing.assert_close(found["fused"].confidence, logits.softmax(-1).amax(-1).detach())
    linear = F.normalize(data.test, dim=-1) @ F.normalize(head.linear, dim=-1).T
    text = F.normalize(data.test, dim=-1) @ head.state.textual.T
    assert torch.equal(found["linear"].label, linear.argmax(-1))
    assert torch.equal(found["text"].label, text.argmax(-1))
    assert head.eta == ULFINE.eta


class Stop(Exception):
    pass


class StoppedViews(FeatureViews):
    """Views that end the run at step 25."""

    def batch(self, step, *slots):
        if step == 25:
            raise Stop
        return super().batch(step, *slots)


class SignalledViews(FeatureViews):
    """Views that send SIGTERM at step 25."""

    def batch(self, step, *slots):
        if step == 25:
            signal.raise_signal(signal.SIGTERM)
        return super().batch(step, *slots)


def without_times(history):
    return [{key: value for key, value in record.items() if key != "images_per_second"} for record in history]


@pytest.mark.parametrize(("name", "optimizer"), RESUMED)
def test_resume_is_bit_identical(tmp_path, name, optimizer):
    method, schedule = METHODS[name], replace(SCHEDULE, optimizer=optimizer)
    whole, expected = small_run(method, schedule, run_dir=tmp_path / "whole")

    views = StoppedViews.of(small_data(), schedule)
    with pytest.raises(Stop):
        small_run(method, schedule, views=views, run_dir=tmp_path / "cut", checkpoint_every=20)
    resumed, result = small_run(method, schedule, run_dir=tmp_path / "cut", resume=True)
    assert_same(whole.state_dict(), resumed.state_dict())
    assert without_times(result.history) == without_times(expected.history)
    assert result.steps == 40

    finished, again = small_run(method, schedule, run_dir=tmp_path / "cut", resume=True)
    assert_same(whole.state_dict(), finished.state_dict())
    assert without_times(again.history) == without_times(expected.history)


def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on(tmp_path):
    whole, expected = small_run()
    views = SignalledViews.of(small_data(), SCHEDULE)
    with pytest.raises(Terminated) as stopped:
        small_run(views=views, run_dir=tmp_path, checkpoint_every=100)
    assert stopped.value.code == 143
    assert load_checkpoint(tmp_path / CHECKPOINT)[1]["steps"] == 26
    resumed, result = small_run(run_dir=tmp_path, resume=True)
    assert_same(whole.state_dict(), resumed.state_dict())
    assert without_times(result.history) == without_times(expected.history)


def test_a_checkpoint_of_an_older_version_is_refused_in_a_sentence(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ulfine_fast.checkpoint.FORMAT", 1)
        small_run(run_dir=tmp_path)
    with pytest.raises(
        CheckpointError, match=f"{CHECKPOINT}: expected checkpoint format 3, got 1, of another version"
    ):
        small_run(run_dir=tmp_path, resume=True)


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from pathlib import Path
from dataclasses import replace
import test_loop as t
run_dir = Path(sys.argv[1])
t.small_run(t.METHODS[sys.argv[2]], replace(t.SCHEDULE, steps=600, optimizer=sys.argv[3]), run_dir=run_dir,
            checkpoint_every=20)
"""


@pytest.mark.parametrize(("name", "optimizer"), RESUMED)
def test_resume_after_kill_is_bit_identical(tmp_path, name, optimizer):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        script = KILLED.format(tests=str(Path(__file__).parent))
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), name, optimizer],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 120
        while not (tmp_path / CHECKPOINT).exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        method, schedule = METHODS[name], replace(SCHEDULE, steps=600, optimizer=optimizer)
        cut_at = load_checkpoint(tmp_path / CHECKPOINT)[1]["steps"]
        assert 0 < cut_at < 600
        resumed, result = small_run(method, schedule, run_dir=tmp_path, resume=True)
        whole, expected = small_run(method, schedule)
    finally:
        torch.set_num_threads(threads)
    assert_same(whole.state_dict(), resumed.state_dict())
    assert without_times(result.history) == without_times(expected.history)


def test_resume_without_checkpoint_starts_from_the_beginning(tmp_path):
    fresh, _ = small_run()
    resumed, _ = small_run(run_dir=tmp_path, resume=True)
    assert_same(fresh.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"method": replace(ULFINE, mu=0.1)}, r"method\.mu: expected 0\.2, got 0\.1"),
        ({"schedule": replace(SCHEDULE, seed=1)}, r"training\.seed: expected 0, got 1"),
        ({"schedule": replace(SCHEDULE, steps=30)}, r"steps must be at least the 40 that are done, got 30"),
        ({"data": small_data(seed=1)}, r"data\.labelled"),
    ],
)
def test_resume_of_another_run_names_the_first_difference(tmp_path, change, field):
    small_run(run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=field) as error:
        small_run(**change, run_dir=tmp_path, resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "flipped tensor", "flipped record", "empty", "text"])
def test_damaged_checkpoint_names_the_file(tmp_path, damage):
    small_run(run_dir=tmp_path)
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped tensor":
        content[-5] ^= 1
    elif damage == "flipped record":
        at = content.index(b"loss_labelled") + 3
        content[at] ^= 1
    elif damage == "empty":
        content = b""
    else:
        content = b"not a checkpoint at all"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=CHECKPOINT) as error:
        small_run(run_dir=tmp_path, resume=True)
    assert "\n" not in str(error.value)


def test_an_interrupted_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    small_run(run_dir=tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def fail(source, target):
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no"):
        small_run(schedule=replace(SCHEDULE, steps=10), run_dir=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_full_disk_names_the_file_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    small_run(run_dir=tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def fail(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="checkpoint.safetensors: expected to write it, got: No space left"):
        small_run(run_dir=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_posterior_fitting_reads_the_weak_views_under_the_estimated_prior():
    method = replace(ULFINE, fitting="posterior", prior_shift=0.7, orthogonality_weight=0.0, threshold=0.2)
    engine = engine_of(method)
    head, batch = engine.learner.head, engine.batch(0)
    with torch.no_grad():
        head.state.distribution.copy_(torch.linspace(0.0, 0.3, 6))
    expected = copy.deepcopy(head)
    adjustment = 0.7 * head.state.log_distribution()
    pseudo = head.pseudo_label(
        batch.weak, method.threshold, adjustment=adjustment, scale_rows=method.scale_rows
    )
    plain = head.pseudo_label(batch.weak, method.threshold)
    assert not torch.allclose(pseudo.confidence, plain.confidence)

    engine.step(1)
    rates = {"mu": 0.0, "beta": method.beta, "gamma": method.gamma, "scale_decay": method.scale_decay}
    expected.state.update(batch.labelled, batch.targets, pseudo, **rates)
    expected.state.refit(
        batch.weak,
        pseudo,
        engine.learner.labelled_counts,
        strength=method.strength,
        unlabelled_mass=method.unlabelled_mass,
        gamma=method.gamma,
    )
    for name, tensor in expected.state.state_dict().items():
        torch.testing.assert_close(head.state.state_dict()[name], tensor, msg=name)
    assert not torch.equal(head.state.textual, head.state.text)


class NoHostReads(TorchDispatchMode):
    """Raises at every operation whose result the host has to wait for on a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        assert not name.startswith(self.WAITING), f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "method",
    [
        *TRAINED.values(),
        replace(TRAINED["ulfine"], adjust_unlabelled="both"),
        replace(TRAINED["ulfine"], fitting="posterior", prior_shift=1.0),
    ],
    ids=[*TRAINED, "both", "posterior"],
)
def test_a_step_reads_nothing_back(monkeypatch, first, method):
    # on the CPU alone the ops look at the labels, to name one that is too large
    monkeypatch.setattr("ulfine_fast.ops._checks.labels", lambda *arguments: None)
    engine = engine_of(method, small_data(protocol="acr"), replace(SCHEDULE, ema=0.9))
    batch = engine.batch(0)
    engine.batch = lambda _: batch
    with NoHostReads(), pytest.raises(AssertionError, match="waits"):
        batch.targets.sum().item()
    with use_backend("reference"), NoHostReads():
        engine.step(0 if first else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_step_never_waits_for_the_device(name, optimizer_name):
    schedule = replace(SCHEDULE, optimizer=optimizer_name)
    engine = engine_of(TRAINED[name], small_data(protocol="acr"), schedule, FeatureViews, "cuda")
    engine.step(0)
    batch = engine.batch(1)
    engine.batch = lambda _: batch
    with never_waits():
        report = engine.step(1)
    assert report.finite


@pytest.mark.gpu
def test_a_run_on_the_device_is_that_on_the_cpu():
    learners = [small_run(device=device)[0].cpu() for device in ("cpu", "cuda")]
    torch.testing.assert_close(learners[0].folded(), learners[1].folded(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("choice", [{"parts": 2}, {"look_ahead": True}])
def test_choices_that_cached_features_do_not_have(choice):
    ((name, value),) = choice.items()
    with pytest.raises(ValueError, match=f"{name} must be .* with cached features, got {value}"):
        small_run(schedule=replace(SCHEDULE, **choice))


def test_no_labelled_images_is_an_error():
    data = small_data()
    empty = replace(data, labelled=data.labelled[:, :0], labels=data.labels[:0])
    with pytest.raises(ValueError, match="needs labelled images"):
        small_run(data=empty)


def test_one_class_with_all_pseudo_labels_is_warned_of_once(caplog):
    data = small_data()
    one_image = data.weak[:1, :1].expand_as(data.weak)
    data = replace(data, weak=one_image, strong=one_image[: data.strong.shape[0]])
    learner, _ = small_run(schedule=Training(steps=8, log_every=2, learning_rate=1e-6), data=data)
    warnings = [r.getMessage() for r in caplog.records if "pseudo-labels" in r.getMessage()]
    assert len(warnings) == 1
    label = int(learner.distribution().argmax())
    assert warnings[0].startswith(f"step 2: class {label} has 100 % of the pseudo-labels")
