"""The engine of fine-tuning: its step against plain PyTorch, resume, processes; towers are small, images are vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from processes import run_together
from synthetic import small_data
from torch import nn
from torch.nn import functional as F

from ulfine_fast import finetune as engine_module
from ulfine_fast.batches import FeatureViews
from ulfine_fast.checkpoint import CheckpointError, digest_of
from ulfine_fast.config import METHODS, FineTuning, Schedule
from ulfine_fast.distributed import World
from ulfine_fast.finetune import Engine, Student, finetune
from ulfine_fast.learners import LEARNERS, build_learner
from ulfine_fast.trainer import CHECKPOINT, build_head, labelled_log_prior, train

DATA = small_data(protocol="acr")
SHORT = FineTuning(steps=8, labelled_batch=16, unlabelled_batch=24, learning_rate=0.05, log_every=3)


class SmallTower(nn.Module):
    """A residual layer that starts as the identity, over a frozen one."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.frozen = nn.Linear(dim, dim)
        self.frozen.requires_grad_(False)
        nn.init.eye_(self.frozen.weight)
        nn.init.zeros_(self.frozen.bias)
        self.layer = nn.Linear(dim, dim)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.register_buffer("centre", torch.zeros(dim))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.frozen(images)
        return features + self.layer(torch.tanh(features)) - self.centre


def student_of(
    method: str = "ulfine", tower: nn.Module | None = None, precision: str = "fp32", **changes
) -> Student:
    torch.manual_seed(1)
    learner = build_learner(
        replace(LEARNERS[method], **changes), DATA.prototypes, DATA.labelled_counts, seed=0
    )
    return Student(SmallTower() if tower is None else tower, learner, precision)


def run(student: Student, schedule: FineTuning = SHORT, **options):
    views = options.pop("views", None) or FeatureViews(DATA, schedule)
    return finetune(student, views, DATA.labelled_counts, schedule, progress=False, **options)


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}


def assert_close(ours: dict, theirs: dict, tolerance: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor.double(), theirs[name].double(), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("method", ["ulfine", "lift", "fixmatch_la"])
def test_with_cached_features_the_step_is_that_of_the_head_trainer(method):
    schedule = Schedule(steps=8, labelled_batch=16, unlabelled_batch=24, learning_rate=0.05)
    head = build_head(DATA.prototypes, METHODS[method], 0)
    train(head, DATA, METHODS[method], schedule, progress=False)
    student = student_of(method, nn.Identity())
    run(student)
    learned = student.learner.state_dict()
    for name, tensor in head.state_dict().items():
        found = learned[f"head.{name}"]
        torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_rejected_rows_left_out_change_nothing():
    """The step against a joint batch of all views in plain PyTorch, over eight steps."""
    student, method = student_of(), METHODS["ulfine"]
    tower, views, seen = SmallTower(), FeatureViews(DATA, SHORT), []
    tower.load_state_dict(student.tower.state_dict())
    reference = build_head(DATA.prototypes, method, 0)
    optimizer = torch.optim.SGD(
        [
            {"params": [*tower.layer.parameters(), reference.linear], "weight_decay": SHORT.weight_decay},
            {"params": [reference.state.textual], "weight_decay": 0.0},
        ],
        lr=SHORT.learning_rate,
        momentum=0.9,
    )
    log_prior = labelled_log_prior(DATA.labelled_counts)
    for step in range(SHORT.steps):
        images, targets = views.labelled(step, range(16))()
        weak, places = views.weak(step, range(24))()
        strong = views.strong(step, list(range(24)), 1)()[0]
        features = tower(torch.cat([images, weak, strong]))
        if step == 0:
            scales = reference.pseudo_label(
                features[16:40].detach(), 0.0, scale_rows=method.scale_rows
            ).branch_scale
            reference.state.measure(scales, method.scale_decay)
        pseudo = reference.pseudo_label(
            features[16:40].detach(), method.threshold, scale_rows=method.scale_rows
        )
        seen.append(int(pseudo.keep.sum()))
        bank = [F.normalize(m, dim=-1) for m in (reference.linear, reference.state.textual.detach())]
        align = reference.state.align()
        x = 25.0 * F.normalize(features, dim=-1)
        z = 0.5 * x @ bank[0].T + 0.5 * align * x @ bank[1].T
        on_strong = F.cross_entropy(z[40:], pseudo.label, reduction="none") * pseudo.keep
        loss = F.cross_entropy(z[:16] + log_prior, targets) + on_strong.mean() + reference.orthogonality()
        for group in optimizer.param_groups:
            group["lr"] = engine_module.learning_rate(SHORT, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reference.state.advance(
            features[:16].detach(), targets, features[16:40].detach(), pseudo, DATA.labelled_counts,
            torch.tensor(True), copies=DATA.unlabelled_is_labelled[places], mu=method.mu, beta=method.beta,
            gamma=method.gamma, scale_decay=method.scale_decay, normalize=True,
        )  # fmt: skip
    result = run(student)
    assert 0 < sum(seen) < 24 * SHORT.steps
    assert_close(student.tower.state_dict(), tower.state_dict())
    assert_close(
        {
            name.removeprefix("head."): t
            for name, t in student.learner.state_dict().items()
            if name.startswith("head.")
        },
        reference.state_dict(),
        1e-4,
    )
    # weak rows are encoded without gradient, rejected strong rows not at all
    assert result.history[0]["rows_trained"] == pytest.approx(16 + sum(seen[:3]) / 3)
    assert result.history[0]["rows_encoded"] == pytest.approx(16 + 24 + sum(seen[:3]) / 3)


@pytest.mark.parametrize("changes", [{}, {"fitting": "posterior"}, {"loss_on": "branches"}])
def test_parts_of_a_batch_add_up(changes):
    whole, parts = student_of(**changes), student_of(**changes)
    first = run(whole)
    second = run(parts, replace(SHORT, parts=4))
    assert_close(weights(whole), weights(parts), 1e-4)
    for ours, theirs in zip(first.history, second.history, strict=True):
        assert ours["pseudo_labels"] == theirs["pseudo_labels"]


def test_batches_must_divide():
    with pytest.raises(
        ValueError, match="labelled_batch must be a multiple of processes x parts, 1 x 3, got 16"
    ):
        run(student_of(), replace(SHORT, parts=3))
    with pytest.raises(
        ValueError, match="unlabelled_batch must be a multiple of processes x parts, 2 x 2, got 30"
    ):
        Engine(
            student_of(),
            FeatureViews(DATA, SHORT),
            replace(SHORT, parts=2, unlabelled_batch=30),
            World(2, 0, 0),
        )


class Cut(Exception):
    pass


class CutViews(FeatureViews):
    """Views of a process that ends at `step`."""

    def __init__(self, schedule: FineTuning, step: int) -> None:
        super().__init__(DATA, schedule)
        self.step = step

    def labelled(self, step, slots):
        if step == self.step:
            raise Cut
        return super().labelled(step, slots)


@pytest.mark.parametrize("cut", [3, 4, 7])
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("ulfine", {}),
        ("ulfine", {"optimizer": "adamw", "ema": 0.9}),
        ("fixmatch_la", {"look_ahead": True}),
        ("ulfine", {"precision": "bf16", "parts": 2}),
        ("lift", {"optimizer": "adamw"}),
    ],
)
def test_a_run_that_was_cut_goes_on_bit_by_bit(tmp_path, cut, method, changes):
    schedule = replace(SHORT, **changes)
    precision = schedule.precision
    options = {"checkpoint_every": 2, "identity": {"data": "small"}}
    whole = student_of(method, precision=precision)
    uncut = run(whole, schedule, run_dir=tmp_path / "whole", **options)
    views = CutViews(schedule, cut)
    with pytest.raises(Cut):
        run(student_of(method, precision=precision), schedule, run_dir=tmp_path, views=views, **options)
    again = student_of(method, precision=precision)
    with torch.no_grad():
        # whatever a process starts from, the checkpoint decides
        for p in again.parameters():
            if p.requires_grad:
                p.add_(1.0)
    resumed = run(again, schedule, run_dir=tmp_path, resume=True, **options)
    assert digest_of(weights(again)) == digest_of(weights(whole))
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in uncut.history]
    assert (tmp_path / CHECKPOINT).exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    options = {"run_dir": tmp_path, "checkpoint_every": 4}
    run(student_of(), identity={"data": "small"}, **options)
    with pytest.raises(CheckpointError, match="data: expected 'small', got 'other'"):
        run(student_of(), identity={"data": "other"}, resume=True, **options)
    with pytest.raises(CheckpointError, match="schedule.learning_rate"):
        run(
            student_of(),
            replace(SHORT, learning_rate=0.1),
            identity={"data": "small"},
            resume=True,
            **options,
        )


def test_looking_ahead_takes_the_weights_of_the_step_before(monkeypatch):
    events = []

    def watch(name):
        plain = getattr(Engine, name)

        def call(engine, *arguments):
            answer = plain(engine, *arguments)
            events.append((name, *arguments))
            return answer

        monkeypatch.setattr(Engine, name, call)

    watch("look")
    watch("_update")
    run(student_of(), replace(SHORT, steps=4, look_ahead=True), checkpoint_every=2)
    update = ("_update",)
    assert events == [("look", 0), ("look", 1), update, ("look", 2), update, ("look", 3), update, update]
    events.clear()
    run(student_of(), replace(SHORT, steps=2))
    assert events == [("look", 0), update, ("look", 1), update]


class Poisoned(FeatureViews):
    """Labelled images of step 3 are not numbers."""

    def labelled(self, step, slots):
        answer = super().labelled(step, slots)
        return lambda: (answer()[0] * (float("nan") if step == 3 else 1.0), answer()[1])


def test_a_step_that_is_not_finite_changes_nothing():
    student = student_of()
    engine = Engine(student, Poisoned(DATA, replace(SHORT, ema=0.5)), replace(SHORT, ema=0.5), World())
    for step in range(3):
        assert engine.step(step).finite
    before = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    assert not engine.step(3).finite
    assert digest_of(engine.tensors()) == digest_of(before)
    assert engine.step(4).finite
    assert digest_of(engine.tensors()) != digest_of(before)


def test_twenty_such_steps_end_the_run(monkeypatch):
    student = student_of()
    with torch.no_grad():
        student.tower.frozen.weight.fill_(float("inf"))
    with pytest.raises(
        RuntimeError, match="stopped at step 20: the gradient was not finite in 20 steps in a row"
    ):
        run(student, replace(SHORT, steps=40))


def test_the_mean_of_the_weights_is_what_is_left():
    schedule = replace(SHORT, ema=0.75)
    student, views = student_of(), FeatureViews(DATA, schedule)
    engine = Engine(student, views, schedule, World())
    mean = {name: p.detach().clone() for name, p in engine.weights.items()}
    for step in range(schedule.steps):
        engine.step(step)
        for name, p in engine.weights.items():
            mean[name] = 0.75 * mean[name] + 0.25 * p.detach()
    averaged = student_of()
    run(averaged, schedule)
    named = dict(averaged.named_parameters())
    for name, tensor in mean.items():
        torch.testing.assert_close(named[name].detach(), tensor)
        assert not torch.equal(tensor, engine.weights[name])


def test_half_precision_is_that_of_the_products_alone():
    seen = []

    class Watched(SmallTower):
        def forward(self, images):
            seen.append((F.linear(images, self.layer.weight).dtype, self.layer.weight.dtype))
            return super().forward(images)

    student = student_of(tower=Watched(), precision="bf16")
    run(student, replace(SHORT, precision="bf16"))
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    exact = student_of()
    run(exact)
    assert_close(weights(exact), weights(student), 0.05)


def test_float16_gradients_are_scaled_and_an_overflow_lowers_the_scale():
    schedule = replace(SHORT, precision="fp16")
    student, exact = student_of(precision="fp16"), student_of()
    engine = Engine(student, FeatureViews(DATA, schedule), schedule, World())
    engine.scale.fill_(2.0**40)
    before = digest_of(weights(student))
    assert not engine.step(0).finite
    assert engine.scale == 2.0**39
    assert digest_of({n: t for n, t in weights(student).items() if "head" not in n}) == digest_of(
        {n: t for n, t in weights(student_of(precision="fp16")).items() if "head" not in n}
    )
    assert before
    engine.scale.fill_(2.0**10)
    assert engine.step(0).finite
    run(student_of(precision="fp16"), schedule)
    run(exact)


TOGETHER = """
import sys
import torch
from pathlib import Path
from test_finetune import *
from ulfine_fast.checkpoint import digest_of
from ulfine_fast.distributed import process_group, world

torch.set_num_threads(1)
here = world()
method, folder, steps, parts, resume = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
student = student_of(method)
schedule = replace(SHORT, parts=parts)
with process_group(here, torch.device("cpu"), timeout=60):
    views = CutViews(schedule, steps)
    try:
        finetune(student, views, DATA.labelled_counts, schedule, world=here, run_dir=folder, checkpoint_every=4,
                 resume=resume == "resume", progress=False)
    except Cut:
        pass
print(digest_of(weights(student)))
if here.leads:
    from safetensors.torch import save_file
    save_file(weights(student), folder / "weights.safetensors")
"""


@pytest.mark.parametrize("method", ["ulfine", "ulfine_plus", "lift"])
def test_two_processes_are_one(tmp_path, method):
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    settled = {"eta_folds": 0}
    alone = student_of(method, **settled)
    run(alone)
    script = TOGETHER.replace("student_of(method)", "student_of(method, eta_folds=0)")
    ended = run_together(script, 2, method, str(tmp_path), "99", "1", "new", folder=tmp_path)
    assert [process.code for process in ended] == [0, 0], ended[0].error + ended[1].error
    assert ended[0].out == ended[1].out
    assert_close(weights(alone), load_file(tmp_path / "weights.safetensors"), 1e-4)


def test_another_number_of_processes_goes_on(tmp_path):
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    alone = student_of()
    run(alone)
    ended = run_together(TOGETHER, 2, "ulfine", str(tmp_path), "6", "2", "new", folder=tmp_path)
    assert [process.code for process in ended] == [0, 0], ended[0].error
    ended = run_together(TOGETHER, 1, "ulfine", str(tmp_path), "99", "2", "resume", folder=tmp_path)
    assert ended[0].code == 0, ended[0].error
    assert_close(weights(alone), load_file(tmp_path / "weights.safetensors"), 1e-4)


def test_history_says_what_happened():
    result = run(student_of())
    assert [record["step"] for record in result.history] == [3, 6, 8]
    record = result.history[-1]
    assert record["images_per_second"] > 0
    assert record["skipped"] == 0
    assert len(record["distribution"]) == 6
    quality = record["pseudo_labels"]["fused"]
    assert 0 < quality["acceptance"] < 1
    assert quality["precision"] > 0.8
    assert result.steps == 8


def test_without_unlabelled_images_only_labelled_ones_are_read():
    class OnlyLabelled(FeatureViews):
        def weak(self, step, slots):
            raise AssertionError("asked for weak views")

    result = run(student_of("lift"), views=OnlyLabelled(DATA, SHORT))
    assert result.history[-1]["rows_encoded"] == result.history[-1]["rows_trained"] == 16
    assert "pseudo_labels" not in result.history[-1]
