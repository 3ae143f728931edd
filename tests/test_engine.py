"""The engine of fine-tuning: its step against plain PyTorch, resume, processes; towers are small, images are vectors."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from processes import run_together
from safetensors.torch import load_file
from synthetic import VectorViews, cached_run, small_data
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ulfine_fast.checkpoint import CheckpointError, Terminated, digest_of, load_checkpoint
from ulfine_fast.config import METHODS, Training
from ulfine_fast.distributed import World
from ulfine_fast.engine import Engine, StepReport, Student
from ulfine_fast.history import Window
from ulfine_fast.learners import LEARNERS, build_learner
from ulfine_fast.learners.dual import build_head
from ulfine_fast.loop import CHECKPOINT, train
from ulfine_fast.losses import labelled_log_prior
from ulfine_fast.optimizer import learning_rate
from ulfine_fast.training_state import TrainingState, load_tuned_tensors, tuned_tensors

DATA = small_data(protocol="acr")
SHORT = Training(steps=8, labelled_batch=16, unlabelled_batch=24, learning_rate=0.05, log_every=3)


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


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, 5), nn.Linear(5, dim)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.up(torch.tanh(self.down(x)))


class BlockTower(nn.Module):
    """Blocks, and what FSDP finds awkward: scalars, channels last, rows that do not divide, fewer rows than processes."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 3, 2).to(memory_format=torch.channels_last)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.last = nn.Linear(16, 1)
        self.checkpointing = checkpointing
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(0.3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images + F.pad(self.first(images.view(-1, 4, 2, 2)).flatten(1), (0, 13))
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x + self.last(x)


def student_of(
    method: str = "ulfine",
    tower: Callable[[], nn.Module] = SmallTower,
    precision: str = "fp32",
    **changes,
) -> Student:
    torch.manual_seed(1)
    learner = build_learner(
        replace(LEARNERS[method], **changes), DATA.prototypes, DATA.labelled_counts, seed=0
    )
    return Student(tower(), learner, precision)


def run(student: Student, schedule: Training = SHORT, **options):
    views = options.pop("views", None) or VectorViews(DATA, schedule)
    return train(student, views, DATA.labelled_counts, schedule, progress=False, **options)


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}


@torch.no_grad()
def disturb(student: Student) -> None:
    for p in student.parameters():
        if p.requires_grad:
            p.add_(1.0)


def assert_close(ours: dict, theirs: dict, tolerance: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor.double(), theirs[name].double(), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("method", [name for name in LEARNERS if name != "zero_shot"])
def test_images_of_an_encoder_that_does_nothing_are_cached_features(method):
    changes = {"eta_folds": 0} if method == "ulfine_plus" else {}
    student = student_of(method, nn.Identity, **changes)
    run(student)
    learner, _ = cached_run(replace(LEARNERS[method], **changes), SHORT, DATA)
    assert_close(student.learner.state_dict(), learner.state_dict(), 1e-4)


def test_rejected_rows_left_out_change_nothing():
    """The step against a joint batch of all views in plain PyTorch, over eight steps."""
    student, method = student_of(), METHODS["ulfine"]
    tower, views, seen = SmallTower(), VectorViews(DATA, SHORT), []
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
            group["lr"] = learning_rate(SHORT, step)
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
            VectorViews(DATA, SHORT),
            replace(SHORT, parts=2, unlabelled_batch=30),
            World(2, 0, 0),
        )


def test_places_in_a_batch_are_in_the_order_in_which_rows_are_gathered():
    schedule = replace(SHORT, parts=3)
    places = [
        [
            Engine.slots(SimpleNamespace(world=World(2, rank), training=schedule), 24, part)
            for rank in range(2)
        ]
        for part in range(3)
    ]
    assert [place for ranks in places for slots in ranks for place in slots] == list(range(24))


class Cut(Exception):
    pass


class CutViews(VectorViews):
    """Views of a process that ends at `step`."""

    def __init__(self, schedule: Training, step: int) -> None:
        super().__init__(DATA, schedule)
        self.step = step

    def labelled(self, step, slots):
        if step == self.step:
            raise Cut
        return super().labelled(step, slots)


@pytest.mark.parametrize("cut", [3, 4, 7])
@pytest.mark.parametrize(
    ("method", "tower", "changes"),
    [
        ("ulfine", SmallTower, {}),
        ("ulfine", SmallTower, {"optimizer": "adamw", "ema": 0.9}),
        ("fixmatch_la", SmallTower, {"look_ahead": True}),
        ("ulfine", SmallTower, {"precision": "bf16", "parts": 2}),
        ("lift", SmallTower, {"optimizer": "adamw"}),
        # its channels are last
        ("lift", BlockTower, {}),
        ("lift", BlockTower, {"optimizer": "adamw"}),
    ],
)
def test_a_run_that_was_cut_goes_on_bit_by_bit(tmp_path, cut, method, tower, changes):
    schedule = replace(SHORT, **changes)
    precision = schedule.precision
    options = {"checkpoint_every": 2, "identity": {"data": "small"}}
    whole = student_of(method, tower, precision)
    uncut = run(whole, schedule, run_dir=tmp_path / "whole", **options)
    views = CutViews(schedule, cut)
    with pytest.raises(Cut):
        run(student_of(method, tower, precision), schedule, run_dir=tmp_path, views=views, **options)
    again = student_of(method, tower, precision)
    # whatever a process starts from, the checkpoint decides
    disturb(again)
    resumed = run(again, schedule, run_dir=tmp_path, resume=True, **options)
    assert digest_of(weights(again)) == digest_of(weights(whole))
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in uncut.history]
    assert (tmp_path / CHECKPOINT).exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    options = {"run_dir": tmp_path, "checkpoint_every": 4}
    run(student_of(), identity={"data": "small"}, **options)
    with pytest.raises(CheckpointError, match="data: expected 'small', got 'other'"):
        run(student_of(), identity={"data": "other"}, resume=True, **options)
    with pytest.raises(CheckpointError, match="training.learning_rate"):
        run(
            student_of(),
            replace(SHORT, learning_rate=0.1),
            identity={"data": "small"},
            resume=True,
            **options,
        )


def test_looking_ahead_takes_the_weights_of_the_step_before(monkeypatch):
    events, look, update = [], Engine.look, TrainingState.update

    def watched_look(engine, step):
        answer = look(engine, step)
        events.append(("look", step))
        return answer

    def watched_update(state, loss):
        answer = update(state, loss)
        events.append("update")
        return answer

    monkeypatch.setattr(Engine, "look", watched_look)
    monkeypatch.setattr(TrainingState, "update", watched_update)
    run(student_of(), replace(SHORT, steps=4, look_ahead=True), checkpoint_every=2)
    assert events == [
        ("look", 0),
        ("look", 1),
        "update",
        ("look", 2),
        "update",
        ("look", 3),
        "update",
        "update",
    ]
    events.clear()
    run(student_of(), replace(SHORT, steps=2))
    assert events == [("look", 0), "update", ("look", 1), "update"]


class Poisoned(VectorViews):
    """Labelled images of step 3 are not numbers."""

    def labelled(self, step, slots):
        answer = super().labelled(step, slots)
        return lambda: (answer()[0] * (float("nan") if step == 3 else 1.0), answer()[1])


def test_a_step_that_is_not_finite_changes_nothing():
    student = student_of()
    engine = Engine(student, Poisoned(DATA, replace(SHORT, ema=0.5)), replace(SHORT, ema=0.5), World())
    for step in range(3):
        assert engine.step(step).finite
    before = {name: tensor.clone() for name, tensor in engine.state.tensors().items()}
    assert not engine.step(3).finite
    assert digest_of(engine.state.tensors()) == digest_of(before)
    assert engine.step(4).finite
    assert digest_of(engine.state.tensors()) != digest_of(before)


def test_a_first_step_whose_loss_is_not_finite_changes_nothing():
    engine = Engine(student_of(), VectorViews(DATA, SHORT), SHORT, World())
    loss = type(engine.learner).loss
    engine.learner.loss = lambda *arguments: loss(engine.learner, *arguments) + float("inf")
    before = weights(engine.student)
    assert not engine.step(0).finite
    assert digest_of(weights(engine.student)) == digest_of(before)


def test_a_step_does_not_wait_for_the_device(monkeypatch):
    schedule = replace(SHORT, ema=0.9, precision="fp16", optimizer="adamw")
    # kernels of the processor take numbers for their arguments, this learner has none
    student = student_of("finessl", precision="fp16")
    engine = Engine(student, VectorViews(DATA, schedule), schedule, World())
    engine.step(0)
    window = Window(engine, torch.zeros(3, dtype=torch.int64), DATA.labelled_counts)

    def wait(*_):
        raise AssertionError("waited for the device")

    # the rows to encode are the one thing that has to be known
    lists, plain = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(1) or plain(tensor))
    for name in ("__bool__", "__float__", "__int__", "item"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    window.add(engine.step(1))
    assert len(lists) == 1


def test_twenty_such_steps_end_the_run():
    student = student_of()
    with torch.no_grad():
        student.tower.frozen.weight.fill_(float("inf"))
    with pytest.raises(
        RuntimeError, match="stopped at step 20: loss was not finite in 20 steps in a row; lower the learning"
    ):
        run(student, replace(SHORT, steps=40))


def window_after(skips: list[int], finite: list[bool]) -> Window:
    engine = Engine(student_of(), VectorViews(DATA, SHORT), SHORT, World())
    window, empty = Window(engine, torch.tensor(skips), DATA.labelled_counts), torch.zeros(())
    for each in finite:
        window.add(StepReport(empty, torch.tensor(each), empty, empty, empty, (0, 0)))
    return window


def test_steps_that_changed_nothing_end_the_run_only_in_a_row():
    assert window_after([0, 0, 5], [False] * 19 + [True] + [False] * 19).skipped(39, 100) == 5 + 38


def test_a_run_that_ends_in_such_steps_has_failed():
    window = window_after([0, 0, 0], [True, False, False, False])
    with pytest.raises(RuntimeError, match="stopped at step 4: loss or gradient was not finite in 3 steps"):
        window.skipped(4, 4)
    assert window.skipped(4, 5) == 3


@pytest.mark.parametrize(("rate", "warns"), [(0.05, False), (100.0, True)])
def test_a_loss_no_better_than_a_guess_is_warned_of_once(caplog, rate, warns):
    run(student_of("lift"), replace(SHORT, learning_rate=rate, steps=40, log_every=2))
    found = [r.getMessage() for r in caplog.records if "no better than a guess by class size" in r.message]
    assert len(found) == warns
    assert all(text.startswith("step 8: the labelled loss, ") for text in found)
    assert all(text.endswith("lower the learning rate") for text in found)


def test_a_short_run_that_has_diverged_is_warned_of_at_its_end(caplog):
    run(student_of("lift"), replace(SHORT, learning_rate=100.0, steps=6, log_every=3))
    found = [r.getMessage() for r in caplog.records if "no better than a guess by class size" in r.message]
    assert len(found) == 1
    assert "nats over the last 2 records" in found[0]


def test_a_resumed_run_remembers_the_steps_in_a_row_that_changed_nothing(tmp_path):
    schedule = replace(SHORT, steps=30)
    broken = student_of()
    with torch.no_grad():
        broken.tower.frozen.weight.fill_(float("inf"))
    options = {"run_dir": tmp_path, "checkpoint_every": 5}
    with pytest.raises(Cut):
        run(broken, schedule, views=CutViews(schedule, 13), **options)
    with pytest.raises(RuntimeError, match="stopped at step 20: loss was not finite in 20 steps"):
        run(broken, schedule, resume=True, **options)


def test_the_mean_of_the_weights_is_what_is_left():
    schedule = replace(SHORT, ema=0.75)
    student, views = student_of(), VectorViews(DATA, schedule)
    engine = Engine(student, views, schedule, World())
    mean = {name: p.detach().clone() for name, p in engine.state.weights.items()}
    for step in range(schedule.steps):
        engine.step(step)
        for name, p in engine.state.weights.items():
            mean[name] = 0.75 * mean[name] + 0.25 * p.detach()
    averaged = student_of()
    run(averaged, schedule)
    named = dict(averaged.named_parameters())
    for name, tensor in mean.items():
        torch.testing.assert_close(named[name].detach(), tensor)
        assert not torch.equal(tensor, engine.state.weights[name])


def test_half_precision_is_that_of_the_products_alone():
    seen = []

    class Watched(SmallTower):
        def forward(self, images):
            seen.append((F.linear(images, self.layer.weight).dtype, self.layer.weight.dtype))
            return super().forward(images)

    student = student_of(tower=Watched, precision="bf16")
    run(student, replace(SHORT, precision="bf16"))
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    exact = student_of()
    run(exact)
    assert_close(weights(exact), weights(student), 0.05)


def test_float16_gradients_are_scaled_and_an_overflow_lowers_the_scale():
    schedule = replace(SHORT, precision="fp16")
    student, exact = student_of(precision="fp16"), student_of()
    engine = Engine(student, VectorViews(DATA, schedule), schedule, World())
    engine.state.scale.fill_(2.0**40)
    before = weights(student)
    assert not engine.step(0).finite
    assert engine.state.scale == 2.0**39
    assert all(torch.equal(before[name], p) for name, p in student.named_parameters())
    engine.state.scale.fill_(2.0**10)
    assert engine.step(0).finite
    assert engine.state.scale == 2.0**10
    Engine(exact, VectorViews(DATA, SHORT), SHORT, World()).step(0)
    moved, exactly = (
        torch.cat([(p.detach() - before[name]).flatten() for name, p in s.named_parameters()])
        for s in (student, exact)
    )
    # the 11 bits of a float16
    assert (moved - exactly).norm() < 2.0**-10 * exactly.norm()


class OneWeakViewIsNotANumber(VectorViews):
    """In step 2 the weak view in slot 13, which the second of two processes has."""

    def weak(self, step, slots):
        answer = super().weak(step, slots)
        hit = torch.tensor([step == 2 and slot == 13 for slot in slots])
        return lambda: (answer()[0].masked_fill(hit[:, None], float("nan")), answer()[1])


class OneProcessKeepsNothing(VectorViews):
    """The weak views in slots 12 to 23 are not numbers, in all steps."""

    def weak(self, step, slots):
        answer = super().weak(step, slots)
        lost = torch.tensor([slot >= 12 for slot in slots])
        return lambda: (answer()[0].masked_fill(lost[:, None], float("nan")), answer()[1])


class OneProcessIsPoisoned(VectorViews):
    """In step 3 the labelled image in slot 9 is not a number."""

    def labelled(self, step, slots):
        answer = super().labelled(step, slots)
        hit = torch.tensor([step == 3 and slot == 9 for slot in slots])
        return lambda: (answer()[0].masked_fill(hit[:, None], float("nan")), answer()[1])


class Case(NamedTuple):
    method: str = "ulfine"
    schedule: Training = SHORT
    views: type = VectorViews
    tower: Callable[[], nn.Module] = SmallTower

    def student(self) -> Student:
        settled = {"eta_folds": 0} if self.method == "ulfine_plus" else {}
        return student_of(self.method, self.tower, self.schedule.precision, **settled)

    def run(self, **options):
        student = self.student()
        if not options.get("world", World()).leads:
            # whatever it starts from, the first process decides
            disturb(student)
        views = options.pop("views", None) or self.views(DATA, self.schedule)
        return student, run(student, self.schedule, views=views, **options)


SHARDED = replace(SHORT, shard=True)
TOGETHER = {
    "ulfine": Case(),
    "ulfine_plus": Case("ulfine_plus"),
    "lift": Case("lift"),
    "finessl": Case("finessl"),
    "look ahead": Case("fixmatch_la", replace(SHORT, look_ahead=True, parts=2)),
    "one weak view is not a number": Case(views=OneWeakViewIsNotANumber),
    "one process keeps nothing": Case(views=OneProcessKeepsNothing),
    "one process is poisoned": Case(views=OneProcessIsPoisoned),
    "sharded": Case(schedule=SHARDED, tower=BlockTower),
    "sharded, recomputed": Case(schedule=SHARDED, tower=partial(BlockTower, checkpointing=True)),
    "sharded, AdamW": Case(
        "fixmatch_la",
        replace(SHARDED, optimizer="adamw", ema=0.75, parts=2, look_ahead=True),
        tower=BlockTower,
    ),
    "sharded, poisoned": Case(schedule=SHARDED, tower=BlockTower, views=OneProcessIsPoisoned),
}
CUT = {
    "plain": Case(schedule=replace(SHORT, parts=2)),
    "sharded": Case(schedule=replace(SHARDED, optimizer="adamw", ema=0.75), tower=BlockTower),
}
SCRIPT = """
import os
import sys
from pathlib import Path

from safetensors.torch import save_file
from test_engine import *
from ulfine_fast.distributed import process_group, sharded_parameters, whole, world

torch.set_num_threads(1)
here, folder = world(), Path(sys.argv[1])


def report(name, student, result):
    found = {key: whole(tensor, here).detach().contiguous() for key, tensor in student.state_dict().items()}
    print(f"{name}: {digest_of(found)}, {result.skipped} skipped")
    if here.leads:
        save_file(found, folder / f"{name}.safetensors")


class Dies(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        print("dies", flush=True)
        os._exit(3)


with process_group(here, torch.device("cpu"), timeout=30):
    for name, case in TOGETHER.items():
        report(name, *case.run(world=here))
    for name, case in CUT.items():
        report(f"{name} goes on", *case.run(world=here, resume=True, run_dir=folder / f"{name} alone"))
        try:
            views = CutViews(case.schedule, 6)
            case.run(world=here, run_dir=folder / f"{name} together", checkpoint_every=4, views=views)
        except Cut:
            print("cut")
    student, _ = CUT["sharded"].run(world=here)
    first, second, _ = student.tower.blocks
    first.register_forward_hook(lambda *_: print("split", *sharded_parameters(second)))
    with torch.no_grad():
        student.encode(DATA.weak[0][:4])
    print("split", *sharded_parameters(student.tower))
    try:
        views = SignalledViews(SHORT, 1 if here.rank == 1 else None)
        run(student_of(), views=views, world=here, run_dir=folder / "terminated", checkpoint_every=100)
    except Terminated as stopped:
        print("terminated with", stopped.code)
    student = student_of()
    if here.rank == 1:
        loss = student.learner.loss
        # labelled, targets, strong, rows, pseudo, progress
        student.learner.loss = lambda *given: loss(*given) + (float("inf") if given[-1] == 0.5 else 0.0)
    report("one loss", student, run(student, world=here))
    student = student_of()
    if here.rank == 1:
        student.learner.advance = lambda *_: student.learner.head.linear.data.add_(0.01)
    try:
        run(student, world=here)
    except RuntimeError as error:
        print(error)
    for options in ({"identity": {"data": here.rank}}, {"resume": True, "run_dir": folder / f"rank {here.rank}"}):
        try:
            Case().run(world=here, **options)
        except RuntimeError as error:
            print(error)
    sys.stdout.flush()
    student = CUT["sharded"].student()
    if here.rank == 1:
        middle = student.tower.blocks[1]
        middle.register_forward_hook(lambda _module, _inputs, output: Dies.apply(output))
    run(student, SHARDED, world=here)
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """All that two processes do in this file, done by one pair: starting it takes most of the time."""
    folder = tmp_path_factory.mktemp("together")
    for name, case in CUT.items():
        alone = case._replace(schedule=replace(case.schedule, shard=False))
        with pytest.raises(Cut):
            alone.run(run_dir=folder / f"{name} alone", checkpoint_every=4, views=CutViews(SHORT, 6))
    run(student_of(), run_dir=folder / "rank 0")
    return folder, run_together(SCRIPT, 2, str(folder), folder=folder)


def alone(case: Case) -> tuple[dict[str, torch.Tensor], int]:
    torch.set_num_threads(1)
    case = case._replace(schedule=replace(case.schedule, shard=False))
    student, result = case.run()
    return weights(student), result.skipped


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_are_one(together, name):
    folder, ended = together
    lines = [[line for line in process.out.splitlines() if line.startswith(f"{name}:")] for process in ended]
    expected, skipped = alone(TOGETHER[name])
    assert lines[0] == lines[1], ended[0].error + ended[1].error
    assert lines[0][0].endswith(f", {skipped} skipped")
    assert skipped == ("poisoned" in name)
    assert_close(expected, load_file(folder / f"{name}.safetensors"), 1e-4)


@pytest.mark.parametrize("name", CUT)
def test_two_processes_go_on_where_one_was_cut(together, name):
    folder, _ = together
    assert_close(alone(CUT[name])[0], load_file(folder / f"{name} goes on.safetensors"), 1e-4)


@pytest.mark.parametrize("name", CUT)
def test_one_process_goes_on_where_two_were_cut(together, name):
    folder, ended = together
    assert [process.out.splitlines().count("cut") for process in ended] == [2, 2]
    torch.set_num_threads(1)
    case = CUT[name]._replace(schedule=replace(CUT[name].schedule, shard=False))
    path = folder / f"{name} together"
    assert load_checkpoint(path / CHECKPOINT)[1]["steps"] == 4
    student, result = case.run(resume=True, run_dir=path)
    assert result.steps == 8
    assert_close(alone(case)[0], weights(student), 1e-4)


def test_a_signal_to_one_process_ends_all_after_the_same_step(together):
    folder, ended = together
    assert [process.out.splitlines().count("terminated with 143") for process in ended] == [1, 1]
    # the next step after the signal at which they meet has a record
    assert load_checkpoint(folder / "terminated" / CHECKPOINT)[1]["steps"] == 3


def test_only_what_is_used_is_whole(together):
    block = ["down.weight", "down.bias", "up.weight", "up.bias"]
    every = [
        "first.bias",
        *(f"blocks.{i}.{name}" for i in range(3) for name in block),
        "last.weight",
        "last.bias",
    ]
    for process in together[1]:
        lines = [line.split()[1:] for line in process.out.splitlines() if line.startswith("split")]
        # the second block while the first one runs, all after a pass without gradient
        assert lines == [block, every], process.error


def test_all_processes_skip_what_one_has_to(together):
    lines = [
        [line for line in process.out.splitlines() if line.startswith("one loss:")] for process in together[1]
    ]
    assert lines[0] == lines[1]
    assert lines[0][0].endswith(", 1 skipped")


def test_processes_that_do_not_agree_do_not_start(together):
    message = "expected the same data, encoder, method and first step in all processes, got others in [1]"
    for process in together[1]:
        assert process.out.splitlines().count(message) == 2


def test_processes_that_drift_apart_stop(together):
    message = "expected the same weights and state in all processes, got others in [1]"
    for process in together[1]:
        assert process.out.splitlines().count(message) == 1


def test_a_process_that_dies_in_the_backward_pass_ends_the_others(together):
    first, second = together[1]
    assert (first.code, second.code) == (1, 3)
    assert second.out.splitlines()[-1] == "dies"
    last = first.error.strip().splitlines()[-1].removeprefix("[rank0]: ")
    assert last.startswith("ulfine_fast.distributed.ProcessError: process 0 of 2")


def test_a_single_process_has_nothing_to_shard_over():
    with pytest.raises(ValueError, match="shard must be False in a single process, got True"):
        run(student_of(), SHARDED)


def test_copies_of_labelled_images_do_not_count_in_the_quality_of_pseudo_labels():
    views = VectorViews(DATA, SHORT)
    copies = views.unlabelled_is_labelled
    assert copies.any() and not copies.all()
    # none of the others is right
    views.unlabelled_truth = torch.where(copies, views.unlabelled_truth, (views.unlabelled_truth + 1) % 6)
    student = student_of(tower=nn.Identity, threshold=0.0)
    quality = run(student, replace(SHORT, steps=1), views=views).history[-1]["pseudo_labels"]["fused"]
    assert quality["precision"] < 0.2


class SignalledViews(VectorViews):
    """Views of a process that gets a signal when those of `step` are asked for, while the step before runs."""

    def __init__(self, schedule: Training, step: int | None, number: int = signal.SIGTERM) -> None:
        super().__init__(DATA, schedule)
        self.step, self.number = step, number

    def labelled(self, step, slots):
        if step == self.step:
            signal.raise_signal(self.number)
        return super().labelled(step, slots)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on(tmp_path, number):
    whole = student_of()
    run(whole, run_dir=tmp_path / "whole")
    views = SignalledViews(SHORT, 5, number)
    # a process in the background ignores SIGINT
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises((KeyboardInterrupt, Terminated)) as stopped:
            run(student_of(), views=views, run_dir=tmp_path / "cut", checkpoint_every=100)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert isinstance(stopped.value, Terminated) == (number == signal.SIGTERM)
    assert load_checkpoint(tmp_path / "cut" / CHECKPOINT)[1]["steps"] == 5
    again = student_of()
    run(again, run_dir=tmp_path / "cut", resume=True, checkpoint_every=100)
    assert digest_of(weights(again)) == digest_of(weights(whole))


def test_a_finished_run_may_be_made_longer_and_says_what_that_means(tmp_path, caplog):
    run(student_of(), run_dir=tmp_path)
    longer = replace(SHORT, steps=12, log_every=2)
    caplog.set_level("INFO", "ulfine_fast")
    result = run(student_of(), longer, run_dir=tmp_path, resume=True)
    assert [record["step"] for record in result.history] == [3, 6, 8, 10, 12]
    said = [record.getMessage() for record in caplog.records]
    rate = learning_rate(longer, 8)
    assert said[0].startswith(
        "the run was planned with 8 steps: after step 8 its learning rate goes from 0 to "
    )
    assert f"{rate:.3g}" in said[0]
    assert said[1] == "going on after step 8 of 12"
    with pytest.raises(CheckpointError, match="steps must be at least the 12 that are done, got 8"):
        run(student_of(), run_dir=tmp_path, resume=True)


@pytest.mark.parametrize("name", ["tower.layer.weight", "learner.head.linear"])
def test_tensors_of_another_student_are_refused_before_one_is_written(name):
    student = student_of()
    before = weights(student)
    for change, got in (({name: torch.zeros(2, 3)}, r"\[2, 3\]"), ({}, "none")):
        tensors = {key: tensor + 1 for key, tensor in tuned_tensors(student_of()).items() if key != name}
        with pytest.raises(
            CheckpointError, match=rf"expected {name} \[\d+, 16\] in the checkpoint, got {got}"
        ):
            load_tuned_tensors(student, tensors | change)
    assert all(torch.equal(before[key], tensor) for key, tensor in student.state_dict().items())


def test_history_says_what_happened():
    result = run(student_of())
    assert [record["step"] for record in result.history] == [3, 6, 8]
    record = result.history[-1]
    assert record["images_per_second"] > 0
    assert record["skipped"] == 0
    # C numbers, which a run keeps once and not in every record
    assert ["distribution" in record for record in result.history] == [False, False, True]
    assert len(record["distribution"]) == 6
    quality = record["pseudo_labels"]["fused"]
    assert 0 < quality["acceptance"] < 1
    assert quality["precision"] > 0.8
    assert result.steps == 8


def test_without_unlabelled_images_only_labelled_ones_are_read():
    class OnlyLabelled(VectorViews):
        def weak(self, step, slots):
            raise AssertionError("asked for weak views")

    result = run(student_of("lift"), views=OnlyLabelled(DATA, SHORT))
    assert result.history[-1]["rows_encoded"] == result.history[-1]["rows_trained"] == 16
    assert "pseudo_labels" not in result.history[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_device_learns_what_the_processor_learns(precision, tmp_path):
    schedule = replace(SHORT, precision=precision)
    on_cpu = student_of()
    run(on_cpu)

    def trained(**options):
        student = student_of(precision=precision).to("cuda")
        run(student, schedule, views=VectorViews(DATA, schedule, "cuda"), **options)
        return student

    first, second = trained(run_dir=tmp_path, checkpoint_every=4), trained()
    assert digest_of(weights(first)) == digest_of(weights(second))
    found = {name: tensor.cpu() for name, tensor in weights(first).items()}
    assert_close(weights(on_cpu), found, 1e-3 if precision == "fp32" else 0.05)
    # the checkpoint of a device goes on where there is none
    again = student_of(precision=precision)
    run(again, schedule, run_dir=tmp_path, checkpoint_every=4, resume=True)
    assert digest_of(weights(again)) == digest_of(found)
