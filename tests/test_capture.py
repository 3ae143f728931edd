"""A captured step: on the CPU with a recording that calls the step again, on a device with the real one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from synthetic import small_data
from tolerances import assert_same_bits, never_waits

from ulfine_fast import capture, trainer, use_backend
from ulfine_fast.capture import CapturedStep
from ulfine_fast.config import METHODS, Schedule
from ulfine_fast.learners.dual import build_head
from ulfine_fast.losses import labelled_log_prior
from ulfine_fast.trainer import (
    Batches,
    LabelledClasses,
    build_optimizer,
    train,
    train_step,
)

SCHEDULE = Schedule(steps=12, labelled_batch=16, unlabelled_batch=24, learning_rate=0.05, log_every=5)
RUNS = [(name, optimizer) for name in ("ulfine", "ulfine_plus", "lift") for optimizer in ("sgd", "adamw")]


@pytest.fixture
def replayed(monkeypatch):
    """Captured steps work on the CPU; the list counts their recordings and replays."""

    def record(run, device):
        assert device.type == "cpu"
        calls.append("record")
        result = run()

        def replay():
            calls.append("replay")
            for old, new in zip(result, run(), strict=True):
                old.copy_(new)

        return replay, result

    def with_rate_tensor(*arguments):
        optimizer = build_optimizer(*arguments)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
        return optimizer

    calls = []
    monkeypatch.setattr(capture, "DEVICE", "cpu")
    monkeypatch.setattr(capture, "_warm_up", lambda run, device: [run() for _ in range(capture.WARM_UP)])
    monkeypatch.setattr(capture, "_record", record)
    monkeypatch.setattr(trainer, "build_optimizer", with_rate_tensor)
    return calls


def run(name, optimizer, device="cpu", **options):
    method, schedule = replace(METHODS[name], eta_folds=0), replace(SCHEDULE, optimizer=optimizer)
    data = small_data(protocol="acr")
    head = build_head(data.prototypes, method).to(device)
    result = train(head, data, method, schedule, progress=False, **options)
    return head, result


def assert_same_run(got, expected):
    for name, value in expected[0].state_dict().items():
        assert_same_bits(got[0].state_dict()[name], value)
    assert got[1].history == expected[1].history
    assert (got[1].steps, got[1].skipped) == (expected[1].steps, expected[1].skipped)


def parts(name="ulfine", optimizer="sgd", device="cpu"):
    """A head, its optimizer, a step and three batches."""
    method, data = replace(METHODS[name], eta_folds=0), small_data(protocol="acr")
    head = build_head(data.prototypes, method).to(device)
    made = trainer.build_optimizer(head, method, replace(SCHEDULE, optimizer=optimizer))
    batches = Batches(data, method, SCHEDULE, torch.device(device))
    counts = data.labelled_counts
    classes = LabelledClasses(counts.to(device), labelled_log_prior(counts).to(device))

    def step(batch):
        return train_step(head, made, batch, method, classes)

    return head, made, step, [batches(number) for number in range(3)]


def snapshot(head, optimizer):
    return [tensor.detach().clone() for tensor in capture._tensors(head, optimizer)]


@pytest.mark.parametrize(("name", "optimizer"), RUNS)
def test_a_captured_run_has_the_bits_of_a_plain_one(replayed, name, optimizer):
    captured = run(name, optimizer, capture=True)
    # One recording for all steps but the first.
    assert replayed == ["record"] + ["replay"] * 11
    assert_same_run(captured, run(name, optimizer))
    assert replayed.count("replay") == 11


def test_a_captured_run_resumes_with_the_same_bits(replayed, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop_at_seven(self, step, batches=Batches.__call__):
        if step == 7:
            raise Stop
        return batches(self, step)

    options = {"run_dir": tmp_path, "checkpoint_every": 3, "capture": True}
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", stop_at_seven)
        with pytest.raises(Stop):
            run("ulfine", "adamw", **options)
    assert_same_run(run("ulfine", "adamw", resume=True, **options), run("ulfine", "adamw"))
    assert replayed.count("record") == 2


def test_a_captured_run_survives_a_batch_that_is_not_finite(replayed, monkeypatch):
    batches = Batches.__call__

    def poisoned(self, step):
        batch = batches(self, step)
        return batch._replace(labelled=batch.labelled * torch.nan) if step in (1, 6) else batch

    monkeypatch.setattr(Batches, "__call__", poisoned)
    captured, plain = (run("ulfine", "adamw", capture=choice) for choice in (True, False))
    assert captured[1].skipped == 2
    assert_same_run(captured, plain)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_recording_changes_neither_head_nor_optimizer(replayed, optimizer):
    head, made, step, batches = parts("ulfine_plus", optimizer)
    same = [id(tensor) for tensor in head.parameters()]
    step(batches[0])
    before = snapshot(head, made)
    CapturedStep(step, head, made, batches[1])
    for one, other in zip(snapshot(head, made), before, strict=True):
        assert_same_bits(one, other)
    assert [id(tensor) for tensor in head.parameters()] == same
    assert all(not group.get("capturable") for group in made.param_groups)


def test_an_optimizer_without_state_starts_as_it_would(replayed):
    results = []
    for recorded in (True, False):
        head, made, step, batches = parts(optimizer="adamw")
        step = CapturedStep(step, head, made, batches[0]) if recorded else step
        step(batches[0])
        results.append(snapshot(head, made))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_a_step_that_fails_in_the_recording_leaves_all_as_it_was(replayed):
    head, made, step, batches = parts()

    def failing(batch):
        step(batch)
        raise RuntimeError("no")

    before = snapshot(head, made)
    with pytest.raises(RuntimeError, match="no"):
        CapturedStep(failing, head, made, batches[0])
    for one, other in zip(snapshot(head, made), before, strict=True):
        assert_same_bits(one, other)


def test_the_batch_is_copied_and_the_result_is_overwritten(replayed):
    head, made, step, batches = parts()
    twin = copy.deepcopy((head.state_dict(), made.state_dict()))
    captured = CapturedStep(step, head, made, batches[0])
    first = captured(batches[1])
    loss = first.loss.clone()
    assert captured(batches[2]) is first
    assert not torch.equal(first.loss, loss)
    for own, given in zip(captured.batch, batches[2], strict=True):
        assert_same_bits(own, given)
        assert own.data_ptr() != given.data_ptr()
    head.load_state_dict(twin[0])
    made.load_state_dict(twin[1])
    assert_same_bits(step(batches[1]).loss, loss)


def test_adamw_is_told_of_the_recording_alone(replayed, monkeypatch):
    seen = []
    head, made, step, batches = parts(optimizer="adamw")

    def watched(batch):
        seen.append([group["capturable"] for group in made.param_groups])
        return step(batch)

    CapturedStep(watched, head, made, batches[0])(batches[1])
    assert seen == [[False, False]] * 3 + [[True, True]] + [[False, False]]


class Pair(NamedTuple):
    rows: torch.Tensor
    marks: torch.Tensor | None = None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Pair(torch.zeros(3, 2)), r"rows must be float32 \[4, 2\] on cpu, got float32 \[3, 2\] on cpu"),
        (
            Pair(torch.zeros(4, 2).half()),
            r"rows must be float32 \[4, 2\] on cpu, got float16 \[4, 2\] on cpu",
        ),
        (Pair(torch.zeros(4, 2, device="meta")), "rows must be .*, got float32 .* on meta"),
        (Pair(torch.zeros(4, 2), torch.zeros(4)), r"marks must be None, got float32 \[4\] on cpu"),
    ],
)
def test_a_batch_of_another_kind_is_an_error(replayed, batch, message):
    head, made, _, _ = parts()
    captured = CapturedStep(lambda pair: (pair.rows.sum(),), head, made, Pair(torch.ones(4, 2)))
    with pytest.raises(ValueError, match=f"CapturedStep: {message}"):
        captured(batch)
    assert captured.batch.rows.all()


def test_a_head_on_the_cpu_is_an_error():
    head, made, step, batches = parts()
    with pytest.raises(ValueError, match="CapturedStep: head must be on a CUDA device, got cpu"):
        CapturedStep(step, head, made, batches[0])
    with pytest.raises(ValueError, match="CapturedStep: head must be on a CUDA device, got cpu"):
        run("ulfine", "sgd", capture=True)


def test_a_learning_rate_that_a_graph_would_freeze_is_an_error(monkeypatch):
    monkeypatch.setattr(capture, "DEVICE", "cpu")
    head, made, step, batches = parts()
    with pytest.raises(ValueError, match=r"learning rate must be a tensor on cpu, got 0\.05"):
        CapturedStep(step, head, made, batches[0])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize(("name", "optimizer"), RUNS)
def test_on_a_device_a_captured_run_has_the_bits_of_a_plain_one(backend, name, optimizer):
    with use_backend(backend):
        captured, plain = (run(name, optimizer, "cuda", capture=choice) for choice in (True, False))
    assert_same_run(captured, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_on_a_device_a_recording_changes_neither_head_nor_optimizer(optimizer):
    head, made, step, batches = parts("ulfine_plus", optimizer, "cuda")
    step(batches[0])
    before = snapshot(head, made)
    captured = CapturedStep(step, head, made, batches[1])
    for one, other in zip(snapshot(head, made), before, strict=True):
        assert_same_bits(one, other)
    with never_waits():
        report = captured(batches[2])
    assert report.finite
