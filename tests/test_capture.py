"""A captured step: on the CPU with a recording that calls the step again, on a device with the real one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from synthetic import TRAINED, cached_run, small_data
from tolerances import assert_same_bits, never_waits
from torch import nn

from ulfine_fast import capture, training_state, use_backend
from ulfine_fast.batches import FeatureViews
from ulfine_fast.capture import CapturedStep
from ulfine_fast.config import Training
from ulfine_fast.distributed import World
from ulfine_fast.engine import Engine, Student
from ulfine_fast.learners import build_learner
from ulfine_fast.optimizer import fused_optimizer

SCHEDULE = Training(steps=12, labelled_batch=16, unlabelled_batch=24, learning_rate=0.05, log_every=5)
RUNS = [(name, optimizer) for name in TRAINED for optimizer in ("sgd", "adamw")]


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
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return replay, result

    def with_rate_tensor(*arguments):
        optimizer = fused_optimizer(*arguments)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
        return optimizer

    calls = []
    monkeypatch.setattr(capture, "DEVICE", "cpu")
    monkeypatch.setattr(capture, "_warm_up", lambda run, device: [run() for _ in range(capture.WARM_UP)])
    monkeypatch.setattr(capture, "_record", record)
    monkeypatch.setattr(training_state, "fused_optimizer", with_rate_tensor)
    return calls


def run(name, optimizer, device="cpu", **options):
    schedule = replace(SCHEDULE, optimizer=optimizer, ema=0.9 if name == "lift" else 0.0)
    return cached_run(TRAINED[name], schedule, small_data(protocol="acr"), device=device, **options)


def assert_same_run(got, expected):
    for name, value in expected[0].state_dict().items():
        assert_same_bits(got[0].state_dict()[name], value)
    for ours, theirs in zip(got[1].history, expected[1].history, strict=True):
        assert ours | {"images_per_second": None} == theirs | {"images_per_second": None}
    assert (got[1].steps, got[1].skipped) == (expected[1].steps, expected[1].skipped)


def parts(name="ulfine", optimizer="sgd", device="cpu"):
    """An engine, its step as a function of the batch, and three batches."""
    data, schedule = small_data(protocol="acr"), replace(SCHEDULE, optimizer=optimizer)
    learner = build_learner(TRAINED[name], data.prototypes.to(device), data.labelled_counts, seed=0)
    views = FeatureViews.of(data, schedule, device)
    made = Engine(Student(nn.Identity(), learner), views, schedule, World())

    def step(batch):
        made.batch = lambda _: batch
        return made.step(1)

    return made, step, [made.batch(number) for number in range(3)]


def snapshot(made):
    return [tensor.detach().clone() for tensor in made.state.tensors().values()]


@pytest.mark.parametrize(("name", "optimizer"), RUNS)
def test_a_captured_run_has_the_bits_of_a_plain_one(replayed, name, optimizer):
    captured = run(name, optimizer, capture=True)
    # One recording for all steps but the first.
    assert replayed == ["record"] + ["replay"] * 11
    assert_same_run(captured, run(name, optimizer))
    assert replayed.count("replay") == 11


def test_a_captured_run_resumes_with_the_same_bits(replayed, tmp_path):
    class Stop(Exception):
        pass

    class Stopped(FeatureViews):
        def batch(self, step, *slots):
            if step == 7:
                raise Stop
            return super().batch(step, *slots)

    options = {"run_dir": tmp_path, "checkpoint_every": 3, "capture": True}
    views = Stopped.of(small_data(protocol="acr"), SCHEDULE)
    with pytest.raises(Stop):
        run("ulfine", "adamw", views=views, **options)
    assert_same_run(run("ulfine", "adamw", resume=True, **options), run("ulfine", "adamw"))
    assert replayed.count("record") == 2


def test_a_captured_run_survives_a_batch_that_is_not_finite(replayed):
    class Poisoned(FeatureViews):
        def batch(self, step, *slots):
            batch = super().batch(step, *slots)
            return batch._replace(labelled=batch.labelled * torch.nan) if step in (1, 6) else batch

    views = Poisoned.of(small_data(protocol="acr"), SCHEDULE)
    captured, plain = (run("ulfine", "adamw", capture=choice, views=views) for choice in (True, False))
    assert captured[1].skipped == 2
    assert_same_run(captured, plain)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_recording_changes_neither_weights_nor_optimizer(replayed, optimizer):
    made, step, batches = parts("ulfine_plus", optimizer)
    same = [id(tensor) for tensor in made.learner.parameters()]
    step(batches[0])
    before = snapshot(made)
    CapturedStep(step, made.state.tensors, made.state.optimizer, batches[1])
    for one, other in zip(snapshot(made), before, strict=True):
        assert_same_bits(one, other)
    assert [id(tensor) for tensor in made.learner.parameters()] == same
    assert all(not group.get("capturable") for group in made.state.optimizer.param_groups)


def test_an_optimizer_without_state_starts_as_it_would(replayed):
    results = []
    for recorded in (True, False):
        made, step, batches = parts(optimizer="adamw")
        if recorded:
            step = CapturedStep(step, made.state.tensors, made.state.optimizer, batches[0])
        step(batches[0])
        results.append(snapshot(made))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_a_step_that_fails_in_the_recording_leaves_all_as_it_was(replayed):
    made, step, batches = parts()

    def failing(batch):
        step(batch)
        raise RuntimeError("no")

    before = snapshot(made)
    with pytest.raises(RuntimeError, match="no"):
        CapturedStep(failing, made.state.tensors, made.state.optimizer, batches[0])
    for one, other in zip(snapshot(made), before, strict=True):
        assert_same_bits(one, other)


def test_the_batch_is_copied_and_the_result_is_overwritten(replayed):
    made, step, batches = parts()
    twin = copy.deepcopy(made.state.tensors())
    captured = CapturedStep(step, made.state.tensors, made.state.optimizer, batches[0])
    first = captured(batches[1])
    loss = first.loss.clone()
    assert captured(batches[2]) is first
    assert not torch.equal(first.loss, loss)
    for own, given in zip(captured.batch, batches[2], strict=True):
        assert_same_bits(own, given)
        assert own.data_ptr() != given.data_ptr()
    made.state.load(twin)
    assert_same_bits(step(batches[1]).loss, loss)


def test_adamw_is_told_of_the_recording_alone(replayed):
    seen = []
    made, step, batches = parts(optimizer="adamw")

    def watched(batch):
        seen.append([group["capturable"] for group in made.state.optimizer.param_groups])
        return step(batch)

    CapturedStep(watched, made.state.tensors, made.state.optimizer, batches[1])(batches[1])
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
    made, _, _ = parts()
    captured = CapturedStep(
        lambda pair: (pair.rows.sum(),), made.state.tensors, made.state.optimizer, Pair(torch.ones(4, 2))
    )
    with pytest.raises(ValueError, match=f"CapturedStep: {message}"):
        captured(batch)
    assert captured.batch.rows.all()


def test_without_a_device_there_is_no_capture():
    with pytest.raises(ValueError, match="capture needs a CUDA device, got cpu"):
        run("ulfine", "sgd", capture=True)


def test_a_learning_rate_that_a_graph_would_freeze_is_an_error():
    made, step, batches = parts()
    with pytest.raises(ValueError, match=r"learning rate must be a tensor on cpu, got 0\.05"):
        CapturedStep(step, made.state.tensors, made.state.optimizer, batches[0])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize(("name", "optimizer"), RUNS)
def test_on_a_device_a_captured_run_has_the_bits_of_a_plain_one(backend, name, optimizer):
    with use_backend(backend):
        captured, plain = (run(name, optimizer, "cuda", capture=choice) for choice in (True, False))
    assert_same_run(captured, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_on_a_device_a_recording_changes_neither_weights_nor_optimizer(optimizer):
    made, step, batches = parts("ulfine_plus", optimizer, "cuda")
    step(batches[0])
    before = snapshot(made)
    captured = CapturedStep(step, made.state.tensors, made.state.optimizer, batches[1])
    for one, other in zip(snapshot(made), before, strict=True):
        assert_same_bits(one, other)
    with never_waits():
        report = captured(batches[2])
    assert report.finite
