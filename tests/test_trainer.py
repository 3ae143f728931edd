"""The training step and its resume, on small synthetic features."""

from __future__ import annotations

import copy
import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import small_data
from tolerances import never_waits
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ulfine_fast import trainer, use_backend
from ulfine_fast.batches import Stream
from ulfine_fast.checkpoint import CheckpointError, Terminated
from ulfine_fast.config import METHODS, Schedule
from ulfine_fast.learners.dual import build_head
from ulfine_fast.losses import labelled_log_prior
from ulfine_fast.ops.dual_cross_entropy import dual_cross_entropy_reference
from ulfine_fast.ops.orthogonality import orthogonality_reference
from ulfine_fast.optimizer import learning_rate
from ulfine_fast.trainer import (
    CHECKPOINT,
    Batches,
    LabelledClasses,
    build_optimizer,
    evaluate,
    predict,
    train,
    train_step,
)

SCHEDULE = Schedule(steps=40, labelled_batch=16, unlabelled_batch=24, learning_rate=0.05, log_every=10)
ULFINE = METHODS["ulfine"]
RESUMED = [
    (name, optimizer) for name in ("ulfine", "ulfine_plus", "fixmatch") for optimizer in ("sgd", "adamw")
]


def small_run(method=ULFINE, schedule=SCHEDULE, data=None, **options):
    data = small_data() if data is None else data
    method = replace(method, eta_folds=0)
    head = build_head(data.prototypes, method, schedule.seed)
    result = train(head, data, method, schedule, progress=False, **options)
    return head, result


def labelled_classes(data):
    return LabelledClasses(data.labelled_counts, labelled_log_prior(data.labelled_counts))


def one_step(method, data=None, schedule=SCHEDULE):
    data = small_data() if data is None else data
    head = build_head(data.prototypes, method, 0)
    optimizer = build_optimizer(head, method, schedule)
    batch = Batches(data, method, schedule, torch.device("cpu"))(0)
    return data, head, optimizer, batch, labelled_classes(data)


def middle_confidence(head, batch):
    """A threshold that keeps about half of the batch."""
    return float(head.pseudo_label(batch.weak, 0.0).confidence.median()) - 1e-6


def snapshot(head, optimizer):
    tensors = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{slot}": tensor.clone() for slot, tensor in slots.items()}
    return tensors


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("adjust", ["none", "labelled", "kept", "both"])
@pytest.mark.parametrize("loss_on", ["branches", "fused"])
def test_step_minimises_the_written_formula(adjust, loss_on):
    method = replace(ULFINE, adjust_unlabelled=adjust, loss_on=loss_on, unlabelled_weight=0.7)
    _, head, optimizer, batch, classes = one_step(method)
    method = replace(method, threshold=middle_confidence(head, batch))
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

    labelled = term(batch.labelled, batch.targets, torch.full((16,), 1 / 16), classes.log_prior)
    prior = {
        "none": None,
        "labelled": classes.log_prior,
        "kept": kept_prior,
        "both": (kept_prior + classes.log_prior) / 2,
    }[adjust]
    unlabelled = term(batch.strong, pseudo.label, pseudo.keep * (0.7 / 24), prior)
    loss = labelled + unlabelled + method.orthogonality_weight * orthogonality_reference(textual)
    loss.backward()

    report = train_step(head, optimizer, batch, method, classes)
    assert report.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert report.acceptance.item() == pytest.approx(pseudo.keep.float().mean().item())
    torch.testing.assert_close(head.linear.grad, linear.grad.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.state.textual.grad, textual.grad.float(), rtol=1e-4, atol=1e-6)


def test_kept_adjustment_is_none_before_the_first_kept_pseudo_label():
    losses = []
    for adjust in ("none", "kept"):
        method = replace(ULFINE, adjust_unlabelled=adjust, threshold=0.5)
        _, head, optimizer, batch, classes = one_step(method)
        losses.append(train_step(head, optimizer, batch, method, classes).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_first_step_measures_the_branches_before_it_fuses_them():
    _, head, optimizer, batch, classes = one_step(replace(ULFINE, proto_scale=5.0))
    expected = head.pseudo_label(batch.weak, 0.7, scale_rows=64).branch_scale
    train_step(head, optimizer, batch, replace(ULFINE, proto_scale=5.0), classes, first=True)
    assert head.state.measured
    torch.testing.assert_close(head.state.branch_scale, expected)
    assert head.state.align() > 2.0


def test_step_updates_the_estimators_after_the_optimizer():
    _, head, optimizer, batch, classes = one_step(replace(ULFINE, mu=1.0))
    before = head.state.textual.detach().clone()
    pseudo = head.pseudo_label(batch.weak, 0.7)
    train_step(head, optimizer, batch, replace(ULFINE, mu=1.0), classes)
    share = pseudo.histogram / pseudo.histogram.sum()
    torch.testing.assert_close(head.state.distribution, 0.01 * share)
    top = int(share.argmax())
    mean = F.normalize(batch.labelled[batch.targets == top].mean(0), dim=0)
    # alpha of the most predicted class is mu = 1: its text prototype became its visual mean
    torch.testing.assert_close(head.state.textual[top].detach(), mean)
    assert not torch.equal(before, head.state.textual)


def test_copies_of_labelled_images_do_not_count_in_the_distribution():
    data = small_data(protocol="acr")
    _, head, optimizer, batch, classes = one_step(ULFINE, data)
    assert batch.copies is not None and batch.copies.any() and not batch.copies.all()
    pseudo = head.pseudo_label(batch.weak[~batch.copies], 0.7)
    train_step(head, optimizer, batch, ULFINE, classes)
    torch.testing.assert_close(
        head.state.distribution, 0.01 * pseudo.histogram / pseudo.histogram.sum(), rtol=1e-5, atol=1e-8
    )


def test_rejected_strong_rows_do_not_matter():
    results = []
    for poison in (False, True):
        _, head, optimizer, batch, classes = one_step(ULFINE)
        method = replace(ULFINE, threshold=middle_confidence(head, batch))
        pseudo = head.pseudo_label(batch.weak, method.threshold)
        assert not pseudo.keep.all()
        strong = torch.where(pseudo.keep[:, None], batch.strong, torch.nan) if poison else batch.strong
        train_step(head, optimizer, batch._replace(strong=strong), method, classes)
        results.append(snapshot(head, optimizer))
    assert_same(*results)


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_a_step_that_is_not_finite_changes_nothing(backend, optimizer_name, warm, bad):
    with use_backend(backend):
        check_that_it_changes_nothing(optimizer_name, warm, bad)


def check_that_it_changes_nothing(optimizer_name, warm, bad):
    schedule = replace(SCHEDULE, optimizer=optimizer_name)
    _, head, optimizer, batch, classes = one_step(ULFINE, schedule=schedule)
    if warm:
        assert train_step(head, optimizer, batch, ULFINE, classes, first=True).finite
    before = snapshot(head, optimizer)
    labelled = batch.labelled.clone()
    labelled[3] = bad
    poisoned = batch._replace(labelled=labelled)
    report = train_step(head, optimizer, poisoned, ULFINE, classes, first=not warm)
    assert not report.finite
    after = snapshot(head, optimizer)
    if not warm and optimizer_name == "adamw":
        # AdamW makes its zero moments at the first step, skipped or not
        assert all(not after.pop(name).any() for name in after.keys() - before.keys())
    assert_same(before, after)
    assert train_step(head, optimizer, batch, ULFINE, classes).finite


@pytest.mark.parametrize("name", ["ulfine", "ulfine_plus"])
@pytest.mark.parametrize("kernel", ["cuda"])
def test_a_run_on_the_kernels_is_that_on_the_reference(kernel, name):
    runs = []
    for backend in (kernel, "reference"):
        with use_backend(backend):
            runs.append(small_run(METHODS[name], replace(SCHEDULE, steps=6), small_data(protocol="acr")))
    (got, _), (expected, _) = runs
    assert expected.state.kept_distribution.any()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_skipped_first_step_does_not_change_what_follows():
    results = []
    for skip_first in (False, True):
        _, head, optimizer, batch, classes = one_step(ULFINE)
        if skip_first:
            poisoned = batch._replace(labelled=batch.labelled * torch.nan)
            assert not train_step(head, optimizer, poisoned, ULFINE, classes, first=True).finite
        for step in range(3):
            train_step(head, optimizer, batch, ULFINE, classes, first=step == 0)
        results.append(snapshot(head, optimizer))
    assert_same(*results)


def test_twenty_skips_in_a_row_stop_the_run():
    data = small_data()
    data.labelled.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite in 20 steps in a row"):
        small_run(data=data)


def test_twenty_skips_stop_a_run_that_hardly_logs():
    data = small_data()
    data.labelled.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="stopped at step 20"):
        small_run(schedule=replace(SCHEDULE, log_every=1000), data=data)


def test_the_terms_of_the_first_step_add_up():
    schedule = replace(SCHEDULE, log_every=1, steps=2)
    method = replace(ULFINE, proto_scale=5.0, threshold=1.0)
    _, result = small_run(method, schedule)
    _, head, optimizer, batch, classes = one_step(method, schedule=schedule)
    loss = train_step(head, optimizer, batch, method, classes, first=True).loss.item()
    first = result.history[0]
    assert first["loss_unlabelled"] == 0
    assert first["loss_labelled"] + first["orthogonality"] == pytest.approx(loss, rel=1e-5)


def test_quality_leaves_copies_of_labelled_images_out():
    data = small_data(protocol="acr")
    quality = trainer.Quality(data, 0, torch.device("cpu"))
    own = ~data.unlabelled_is_labelled
    assert sorted(quality.truth.tolist()) == sorted(data.unlabelled_truth[own].tolist())


def test_single_skips_are_counted_and_survived(monkeypatch):
    batches = Batches.__call__

    def poisoned(self, step):
        batch = batches(self, step)
        return batch._replace(labelled=batch.labelled * torch.nan) if step % 10 == 3 else batch

    monkeypatch.setattr(Batches, "__call__", poisoned)
    head, result = small_run()
    assert result.skipped == 4
    assert result.history[-1]["skipped"] == 4
    assert all(torch.isfinite(p).all() for p in head.parameters())


def test_without_unlabelled_weight_the_unlabelled_features_are_not_touched():
    data = small_data()
    poisoned = replace(data, weak=data.weak * torch.nan, strong=data.strong * torch.nan)
    heads = [small_run(METHODS["lift"], data=d)[0] for d in (data, poisoned)]
    assert_same(*(head.state_dict() for head in heads))
    assert not heads[0].state.distribution.any()


def test_without_mu_and_orthogonality_the_text_stays_bit_by_bit():
    head, _ = small_run(replace(ULFINE, mu=0.0, orthogonality_weight=0.0))
    assert torch.equal(head.state.textual, head.state.text)
    assert head.state.distribution.any()


def test_learned_prototypes_keep_unit_rows():
    head, _ = small_run(replace(ULFINE, orthogonality_weight=10.0))
    torch.testing.assert_close(head.state.textual.norm(dim=-1), torch.ones(6))
    optimizer = build_optimizer(head, ULFINE, SCHEDULE)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {id(head.linear): SCHEDULE.weight_decay, id(head.state.textual): 0.0}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name):
    data = small_data()
    head, result = small_run(METHODS[name], data=data)
    metrics = evaluate(head, data.test, data.test_labels, data.labelled_counts)
    assert metrics["fused"]["overall"] >= 0.8
    assert result.steps == (SCHEDULE.steps if METHODS[name].trained else 0)
    unlabelled = METHODS[name].unlabelled_weight > 0
    assert all(("pseudo_labels" in record) == unlabelled for record in result.history)


def test_history_holds_what_the_report_needs():
    _, result = small_run(schedule=replace(SCHEDULE, steps=25))
    assert [record["step"] for record in result.history] == [10, 20, 25]
    last = result.history[-1]
    assert 0 < last["loss_labelled"] < 1
    assert set(last["pseudo_labels"]) == {"fused", "linear", "text"}
    assert sum(last["distribution"]) == pytest.approx(1 - 0.99**25, rel=1e-4)
    assert 0 <= last["distribution_l1"] <= 2


def test_truth_of_the_unlabelled_images_is_for_reports_only():
    data = small_data()
    wrong = replace(data, unlabelled_truth=torch.zeros_like(data.unlabelled_truth))
    heads = [small_run(data=d)[0] for d in (data, wrong)]
    assert_same(*(head.state_dict() for head in heads))


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
    schedule = Schedule(steps=100, learning_rate=0.2)
    assert learning_rate(schedule, 0) == 0.2
    assert learning_rate(schedule, 50) == pytest.approx(0.1)
    assert learning_rate(schedule, 100) == pytest.approx(0.0)


def test_prior_of_a_class_without_images():
    prior = labelled_log_prior(torch.tensor([3, 1, 0]))
    torch.testing.assert_close(prior, torch.tensor([0.75, 0.25, 1e-12]).log())


def test_predict_in_chunks_gives_the_branches():
    data = small_data()
    head, _ = small_run(data=data)
    whole = predict(head, data.test)
    pieces = predict(head, data.test, chunk=7)
    assert torch.equal(whole.label, pieces.label)
    torch.testing.assert_close(whole.confidence, pieces.confidence)
    logits = head(data.test)
    assert torch.equal(whole.label, logits.argmax(-1))
    torch.testing.assert_close(whole.confidence, logits.softmax(-1).amax(-1).detach())
    linear = F.normalize(data.test, dim=-1) @ F.normalize(head.linear, dim=-1).T
    text = F.normalize(data.test, dim=-1) @ head.state.textual.T
    assert torch.equal(predict(head, data.test, "linear").label, linear.argmax(-1))
    assert torch.equal(predict(head, data.test, "text").label, text.argmax(-1))
    assert head.eta == ULFINE.eta
    with pytest.raises(ValueError, match="branch must be one of fused, linear, text"):
        predict(head, data.test, "both")


@pytest.mark.parametrize(("name", "optimizer"), RESUMED)
def test_resume_is_bit_identical(tmp_path, name, optimizer):
    method, schedule = METHODS[name], replace(SCHEDULE, optimizer=optimizer)
    whole, expected = small_run(method, schedule, run_dir=tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_at_25(self, step, batches=Batches.__call__):
        if step == 25:
            raise Stop
        return batches(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__call__", stop_at_25)
        with pytest.raises(Stop):
            small_run(method, schedule, run_dir=tmp_path / "cut", checkpoint_every=20)
    resumed, result = small_run(method, schedule, run_dir=tmp_path / "cut", resume=True)
    assert_same(whole.state_dict(), resumed.state_dict())
    assert result.history == expected.history
    assert result.steps == 40

    finished, again = small_run(method, schedule, run_dir=tmp_path / "cut", resume=True)
    assert_same(whole.state_dict(), finished.state_dict())
    assert again.history == expected.history


def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on(tmp_path, monkeypatch):
    whole, expected = small_run()

    def signalled(self, step, batches=Batches.__call__):
        if step == 25:
            signal.raise_signal(signal.SIGTERM)
        return batches(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", signalled)
        with pytest.raises(Terminated) as stopped:
            small_run(run_dir=tmp_path, checkpoint_every=100)
    assert stopped.value.code == 143
    assert trainer.load_checkpoint(tmp_path / CHECKPOINT)[1]["steps"] == 26
    resumed, result = small_run(run_dir=tmp_path, resume=True)
    assert_same(whole.state_dict(), resumed.state_dict())
    assert result.history == expected.history


def test_a_checkpoint_of_an_older_version_is_refused_in_a_sentence(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ulfine_fast.checkpoint.FORMAT", 1)
        small_run(run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=f"{CHECKPOINT}: expected checkpoint format 2, got 1$"):
        small_run(run_dir=tmp_path, resume=True)


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from pathlib import Path
from dataclasses import replace
import test_trainer as t
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
        cut_at = trainer.load_checkpoint(tmp_path / CHECKPOINT)[1]["steps"]
        assert 0 < cut_at < 600
        resumed, result = small_run(method, schedule, run_dir=tmp_path, resume=True)
        whole, expected = small_run(method, schedule)
    finally:
        torch.set_num_threads(threads)
    assert_same(whole.state_dict(), resumed.state_dict())
    assert result.history == expected.history


def test_resume_without_checkpoint_starts_from_the_beginning(tmp_path):
    fresh, _ = small_run()
    resumed, _ = small_run(run_dir=tmp_path, resume=True)
    assert_same(fresh.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"method": replace(ULFINE, mu=0.1)}, r"method\.mu: expected 0\.2, got 0\.1"),
        ({"schedule": replace(SCHEDULE, seed=1)}, r"schedule\.seed: expected 0, got 1"),
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
    _, head, optimizer, batch, classes = one_step(method)
    with torch.no_grad():
        head.state.distribution.copy_(torch.linspace(0.0, 0.3, len(classes.counts)))
    expected = copy.deepcopy(head)
    adjustment = 0.7 * head.state.log_distribution()
    pseudo = head.pseudo_label(
        batch.weak, method.threshold, adjustment=adjustment, scale_rows=method.scale_rows
    )
    plain = head.pseudo_label(batch.weak, method.threshold)
    assert not torch.allclose(pseudo.confidence, plain.confidence)

    train_step(head, optimizer, batch, method, classes)
    rates = {"mu": 0.0, "beta": method.beta, "gamma": method.gamma, "scale_decay": method.scale_decay}
    expected.state.update(batch.labelled, batch.targets, pseudo, **rates)
    expected.state.refit(
        batch.weak,
        pseudo,
        classes.counts,
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
    "changes",
    [{}, {"adjust_unlabelled": "both"}, {"fitting": "posterior", "prior_shift": 1.0}],
    ids=["plain", "both", "posterior"],
)
def test_a_step_reads_nothing_back(monkeypatch, first, changes):
    # on the CPU alone the ops look at the labels, to name one that is too large
    monkeypatch.setattr("ulfine_fast.ops._checks.labels", lambda *arguments: None)
    method = replace(ULFINE, **changes)
    _, head, optimizer, batch, classes = one_step(method, small_data(protocol="acr"))
    with NoHostReads(), pytest.raises(AssertionError, match="waits"):
        classes.counts.sum().item()
    with use_backend("reference"), NoHostReads():
        train_step(head, optimizer, batch, method, classes, first=first)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_a_step_never_waits_for_the_device(optimizer_name):
    schedule = replace(SCHEDULE, optimizer=optimizer_name)
    method = replace(ULFINE, adjust_unlabelled="kept")
    data = small_data(protocol="acr")
    head = build_head(data.prototypes.cuda(), method, 0)
    optimizer = build_optimizer(head, method, schedule)
    batches = Batches(data, method, schedule, torch.device("cuda"))
    classes = LabelledClasses(*(t.cuda() for t in labelled_classes(data)))
    train_step(head, optimizer, batches(0), method, classes, first=True)
    batch = batches(1)
    with never_waits():
        report = train_step(head, optimizer, batch, method, classes)
    assert report.finite


@pytest.mark.gpu
def test_a_run_on_the_device_is_that_on_the_cpu():
    data = small_data()
    runs = []
    for device in ("cpu", "cuda"):
        head = build_head(data.prototypes, ULFINE, 0).to(device)
        train(head, data, ULFINE, SCHEDULE, progress=False)
        runs.append(head.cpu())
    torch.testing.assert_close(runs[0].folded(), runs[1].folded(), rtol=1e-2, atol=1e-2)


def test_no_labelled_images_is_an_error():
    data = small_data()
    empty = replace(data, labelled=data.labelled[:, :0], labels=data.labels[:0])
    with pytest.raises(ValueError, match="needs labelled images"):
        small_run(data=empty)


def test_one_class_with_all_pseudo_labels_is_warned_of_once(caplog):
    data = small_data()
    one_image = data.weak[:1, :1].expand_as(data.weak)
    data = replace(data, weak=one_image, strong=one_image[: data.strong.shape[0]])
    head = build_head(data.prototypes, ULFINE)
    train(head, data, ULFINE, Schedule(steps=8, log_every=2, learning_rate=1e-6), progress=False)
    warnings = [r.getMessage() for r in caplog.records if "pseudo-labels" in r.getMessage()]
    assert len(warnings) == 1
    label = int(head.state.distribution.argmax())
    assert warnings[0].startswith(f"step 2: class {label} has 100 % of the pseudo-labels")
