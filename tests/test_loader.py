import logging
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from ulfine_fast import augment
from ulfine_fast.augment import PIPELINES, sufficient_side, view
from ulfine_fast.images import ImageFiles, MachineError, UnreadableImage
from ulfine_fast.loader import (
    ViewLoader,
    Workers,
    ahead,
    default_workers,
    evaluation_batches,
    view_batches,
)

PIPELINE = PIPELINES["finessl"]
LABELLED = np.array([4, 0, 2, 6])
UNLABELLED = np.array([1, 3, 5, 7, 8, 9, 0])
SIZE = 16


class Source:
    """Ten smooth pictures, some of which cannot be read; counts what is read."""

    def __init__(self, unreadable=(), broken=(), images=10) -> None:
        self.unreadable = set(unreadable)
        self.broken = set(broken)
        self.images = images
        self.reads = []
        self.sides = []

    def __len__(self) -> int:
        return self.images

    def name(self, index) -> str:
        return f"images/{index}.jpg"

    def read(self, index, at_least=None) -> Image.Image:
        self.reads.append(index)
        self.sides.append(at_least)
        if index in self.unreadable:
            raise UnreadableImage(self.name(index), "truncated")
        if index in self.broken:
            raise OSError("device gone")
        noise = np.random.RandomState(index).randint(0, 256, (5, 6, 3)).astype(np.uint8)
        return Image.fromarray(noise).resize((24, 20), Image.Resampling.BICUBIC)


def loader(source, **options) -> ViewLoader:
    options = {
        "labelled": LABELLED,
        "unlabelled": UNLABELLED,
        "size": SIZE,
        "seed": 3,
        "workers": 2,
        **options,
    }
    return ViewLoader(source, PIPELINE, **options)


def views_of(kind, rows, *, options=None, **request) -> tuple[torch.Tensor, list[int]]:
    with loader(Source(), **(options or {})) as views:
        got = views.submit(kind, np.array(rows), **request).result()
    return got.images, got.rows.tolist()


def test_a_view_is_that_of_its_row_and_its_own_generator() -> None:
    images, rows = views_of("weak", [3, 9, 3], step=5, slots=np.array([0, 7, 2]))
    assert rows == [3, 9, 3]
    assert images.dtype == torch.uint8
    expected = [
        view(Source().read(row), PIPELINE, "weak", np.random.default_rng((3, 1, 5, slot)), size=SIZE)
        for row, slot in ((3, 0), (9, 7), (3, 2))
    ]
    assert torch.equal(images, torch.stack(expected))


@pytest.mark.parametrize("kind", ["labelled", "weak", "strong"])
@pytest.mark.parametrize("workers", [0, 1, 5])
def test_threads_order_and_neighbours_change_nothing(kind, workers) -> None:
    rows = LABELLED if kind == "labelled" else UNLABELLED
    whole, _ = views_of(kind, rows, step=2)
    order = np.random.RandomState(0).permutation(len(rows))[:3]
    some, got = views_of(kind, rows[order], step=2, slots=order, options={"workers": workers})
    assert got == rows[order].tolist()
    assert torch.equal(some, whole[torch.from_numpy(order)])


def test_seed_kind_step_and_slot_each_select_the_draws() -> None:
    requests = [
        views_of("weak", [0], step=2),
        views_of("labelled", [0], step=2),
        views_of("strong", [0], step=2),
        views_of("weak", [0], step=3),
        views_of("weak", [0], step=2, slots=np.array([1])),
        views_of("weak", [0], step=2, options={"seed": 4}),
    ]
    assert len({images.numpy().tobytes() for images, _ in requests}) == len(requests)


def test_progress_reaches_the_crops() -> None:
    views = []
    for progress in (0.0, 1.0):
        with ViewLoader(
            Source(),
            PIPELINES["lift_plus"],
            labelled=LABELLED,
            unlabelled=UNLABELLED,
            size=SIZE,
            seed=0,
            workers=0,
        ) as views_loader:
            views.append(views_loader.submit("weak", UNLABELLED, step=0, progress=progress).result().images)
    assert not torch.equal(*views)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_next_readable_image_of_the_pool_takes_the_place(workers) -> None:
    """Row 6 is the last labelled one: after it comes the first that can be read, 2."""
    source, noted = Source(unreadable={6, 4, 0, 5}), []
    with loader(source, workers=workers, on_unreadable=noted.append) as views:
        labelled = views.submit("labelled", np.array([2, 6, 4]), step=0).result()
        weak = views.submit("weak", np.array([1, 5, 0]), step=0).result()
        again = views.submit("labelled", np.array([2, 6, 4]), step=0).result()
    assert labelled.rows.tolist() == [2, 2, 2]
    assert weak.rows.tolist() == [1, 7, 1]
    assert torch.equal(again.images, labelled.images)
    expected, _ = views_of("weak", [1, 7, 1], step=0)
    assert torch.equal(weak.images, expected)
    assert sorted(error.name for error in noted) == [f"images/{row}.jpg" for row in (0, 4, 5, 6)]


def test_every_unreadable_image_is_logged_unless_someone_listens(caplog) -> None:
    with caplog.at_level(logging.WARNING), loader(Source(unreadable={1})) as views:
        views.submit("weak", UNLABELLED, step=0).result()
    assert [record.getMessage() for record in caplog.records] == ["unreadable image: images/1.jpg: truncated"]


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable(workers) -> None:
    with loader(Source(unreadable=LABELLED), workers=workers, on_unreadable=lambda error: None) as views:
        pending = views.submit("labelled", LABELLED[:1], step=0)
        message = (
            "labelled images must be readable, at least one of them, got 4 unreadable:"
            " images/4.jpg, images/0.jpg, images/2.jpg, images/6.jpg"
        )
        with pytest.raises(ValueError, match=message):
            pending.result()
        # other pools go on
        assert views.submit("weak", UNLABELLED[:2], step=0).result().rows.tolist() == [1, 3]


def test_a_strong_view_is_never_of_another_image() -> None:
    source = Source(unreadable={3})
    with loader(source) as views, pytest.raises(UnreadableImage, match="images/3.jpg: truncated"):
        views.submit("strong", np.array([1, 3]), step=0).result()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unexpected_error_names_the_image(workers) -> None:
    with loader(Source(broken={4}), workers=workers) as views:
        pending = views.submit("labelled", LABELLED, step=0)
        with pytest.raises(RuntimeError, match=r"^images/4.jpg: OSError: device gone$"):
            pending.result()
        # the threads live on
        assert len(views.submit("weak", UNLABELLED, step=0).result().rows) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_machine_ends_the_run_and_replaces_no_image(workers) -> None:
    source = Source()

    def fail(index, _at_least=None) -> Image.Image:
        raise MachineError(f"images/{index}.jpg: got Stale file handle")

    source.read = fail
    with loader(source, workers=workers) as views:
        for kind in ("weak", "strong"):
            with pytest.raises(MachineError, match=r"^images/1.jpg: got Stale file handle$"):
                views.submit(kind, UNLABELLED, step=0).result()
    batches = evaluation_batches(
        source, partial(augment.test_views, pipeline=PIPELINE, size=SIZE), batch_size=2, workers=workers
    )
    with pytest.raises(MachineError):
        next(batches)


def test_an_image_is_decoded_once_for_its_weak_and_strong_views() -> None:
    source = Source(unreadable={5})
    with loader(source, on_unreadable=lambda error: None) as views:
        weak = views.submit("weak", UNLABELLED, step=0).result()
        ahead_of_time = views.submit("weak", UNLABELLED[:3], step=1).result()
        before = len(source.reads)
        strong = views.submit("strong", np.array([9, 7, 9]), step=0, slots=np.array([5, 2, 6])).result()
        assert len(source.reads) == before
        views.submit("strong", ahead_of_time.rows[:1], step=1).result()
        assert len(source.reads) == before
        # what step 0 decoded is gone
        views.submit("strong", weak.rows[:1], step=0).result()
        assert len(source.reads) == before + 1
    expected, _ = views_of("strong", [9, 7, 9], step=0, slots=np.array([5, 2, 6]))
    assert torch.equal(strong.images, expected)


class Held:
    """Requests to a loader with room for two images, and how many images each had to read."""

    def __init__(self) -> None:
        self.source = Source()
        # of 24 x 20 pixels in four bytes
        self.views = loader(self.source, workers=0, held_bytes=2 * 24 * 20 * 4)

    def reads(self, kind, rows, step) -> int:
        self.source.reads.clear()
        self.views.submit(kind, np.array(rows), step=step).result()
        return len(self.source.reads)


def test_held_images_are_bounded_and_the_earliest_stay() -> None:
    held = Held()
    for step in (0, 1):
        assert held.reads("weak", [1, 3], step) == 2
    assert held.reads("strong", [1, 3], 0) == 0
    assert held.reads("strong", [1, 3], 1) == 2


def test_steps_without_strong_views_give_their_room_back() -> None:
    held = Held()
    held.reads("weak", [1, 3], 0)
    assert held.reads("strong", [5], 1) == 1
    held.reads("weak", [7, 8], 2)
    assert held.reads("strong", [7, 8], 2) == 0


def test_an_image_is_held_once_for_all_its_views() -> None:
    held = Held()
    for step in range(3):
        assert held.reads("weak", [1, 1, 3], step) == 3
        assert held.reads("strong", [1, 3, 1], step) == 0


def test_randaugment_on_the_device_changes_only_rounding() -> None:
    rows = np.tile(UNLABELLED, 6)
    here, _ = views_of("strong", rows, step=0)
    there, _ = views_of("strong", rows, step=0, options={"randaugment_on_device": True})
    far = ((here.int() - there.int()).abs() > 8).float().mean(dim=(1, 2, 3))
    assert not torch.equal(here, there)
    assert far.median() == 0
    assert far.mean() < 0.05
    weak = [views_of("weak", rows, step=0, options={"randaugment_on_device": on})[0] for on in (False, True)]
    assert torch.equal(*weak)


@pytest.mark.gpu
@pytest.mark.parametrize("on_device", [False, True])
def test_batches_arrive_on_the_device(on_device) -> None:
    options = {"randaugment_on_device": on_device}
    rows = np.tile(UNLABELLED, 6)
    for kind in ("weak", "strong"):
        got, _ = views_of(kind, rows, step=0, options={**options, "device": "cuda"})
        expected, _ = views_of(kind, rows, step=0, options=options)
        assert got.is_cuda
        if kind == "weak" or not on_device:
            assert torch.equal(got.cpu(), expected)
        else:
            assert ((got.cpu().int() - expected.int()).abs() > 8).float().mean() < 0.05


def test_an_empty_request() -> None:
    for kind in ("weak", "strong"):
        images, rows = views_of(kind, np.empty(0, dtype=np.int64), step=0)
        assert images.shape == (0, 3, SIZE, SIZE)
        assert rows == []


def test_loader_errors() -> None:
    for options, message in (
        ({"size": 0}, "size must be >= 1 and seed >= 0, got 0 and 3"),
        ({"seed": -1}, "size must be >= 1 and seed >= 0, got 16 and -1"),
        ({"workers": -1}, "threads must be >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            loader(Source(), **options)
    with loader(Source()) as views:
        for kind, rows, options, message in (
            ("test", [1], {}, "kind must be one of labelled, weak, strong, got 'test'"),
            ("weak", [1, 2], {}, "rows must be among those of weak views, got 2"),
            ("weak", [10], {}, "rows must be among those of weak views, got 10"),
            ("weak", [-1], {}, "rows must be among those of weak views, got -1"),
            ("weak", [1], {"slots": np.arange(2)}, "expected 1 slots, got 2"),
            ("weak", [1], {"slots": np.array([-1])}, "step and slots must be >= 0"),
            ("weak", [1], {"progress": 1.5}, r"progress must be in \[0, 1\], got 1.5"),
        ):
            with pytest.raises(ValueError, match=message):
                views.submit(kind, np.array(rows), step=0, **options)


class Gate:
    """A task that waits until it is let through."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.open.wait(10)
        return "through"


def close_while_one_runs(close, gate, waiting) -> None:
    """`close` in a thread; the running task is let through once the waiting one was cancelled."""
    closing = threading.Thread(target=close)
    closing.start()
    for _ in range(1000):
        closing.join(0.01)
        if waiting.cancelled():
            break
    assert closing.is_alive()
    gate.open.set()
    closing.join(10)
    assert not closing.is_alive()


def test_workers_do_the_earliest_step_first() -> None:
    done, gate = [], Gate()
    with Workers(1) as workers:
        first = workers.submit(gate)
        assert gate.begun.wait(10)
        futures = [
            workers.submit(partial(done.append, name), priority=priority)
            for name, priority in (("weak 2", 2), ("weak 1", 1), ("more weak 1", 1), ("strong 0", 0))
        ]
        gate.open.set()
        for future in futures:
            future.result(10)
        assert first.result() == "through"
    assert done == ["strong 0", "weak 1", "more weak 1", "weak 2"]


def test_a_loader_serves_the_earliest_step_first() -> None:
    gate, source = Gate(), Source()
    read = source.read
    source.read = lambda index, _at_least: (index == 1 and gate(), read(index))[1]
    with loader(source, workers=1) as views:
        blocking = views.submit("weak", np.array([1]), step=9)
        assert gate.begun.wait(10)
        pending = [
            views.submit(kind, np.array([row]), step=step)
            for kind, row, step in (("weak", 3, 9), ("labelled", 4, 8), ("strong", 5, 7))
        ]
        gate.open.set()
        for request in (blocking, *pending):
            request.result()
    assert source.reads == [1, 5, 4, 3]


def test_close_cancels_what_waits_and_ends_the_threads() -> None:
    before, gate, done = threading.active_count(), Gate(), []
    workers = Workers(1)
    running = workers.submit(gate)
    assert gate.begun.wait(10)
    waiting = workers.submit(partial(done.append, "late"))
    close_while_one_runs(workers.close, gate, waiting)
    assert running.result(0) == "through"
    assert waiting.cancelled()
    assert done == []
    workers.close()
    with pytest.raises(RuntimeError, match="the loader must be open, got a closed one"):
        workers.submit(gate)
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_in_the_caller_ends_the_threads(error) -> None:
    before = threading.active_count()

    def train() -> None:
        with loader(Source(), workers=3) as views:
            views.submit("weak", UNLABELLED, step=0)
            raise error

    with pytest.raises(error):
        train()
    assert threading.active_count() == before


@pytest.fixture
def interrupted_once() -> Iterator[None]:
    """The first SIGINT raises KeyboardInterrupt, later ones do nothing."""
    seen = []

    def interrupt(*_) -> None:
        seen.append(1)
        if len(seen) == 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupted_once")
def test_an_interrupt_while_waiting_ends_the_threads() -> None:
    before, left, source = threading.active_count(), threading.Event(), Source()

    def read(_index, _at_least) -> Image.Image:
        # again and again: a signal that comes just before the main thread begins to wait does not wake it
        while not left.wait(0.01):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return Image.new("RGB", (8, 8))

    source.read = read

    def train() -> None:
        with loader(source, workers=1) as views:
            try:
                views.submit("weak", UNLABELLED[:1], step=0).result()
            finally:
                left.set()

    with pytest.raises(KeyboardInterrupt):
        train()
    assert threading.active_count() == before


def test_results_after_close_say_so() -> None:
    gate, source = Gate(), Source()
    source.read = lambda _index, _at_least: gate() and Image.new("RGB", (8, 8))
    views = loader(source, workers=1)
    pending = views.submit("weak", UNLABELLED, step=0)
    assert gate.begun.wait(10)
    close_while_one_runs(views.close, gate, pending._futures[-1])
    with pytest.raises(RuntimeError, match="cancelled because the loader was closed"):
        pending.result()


def test_ahead_draws_items_early_and_keeps_their_order() -> None:
    drawn = []

    def items():
        for item in range(5):
            drawn.append(item)
            yield item

    got = ahead(items(), 2)
    assert next(got) == 0
    assert drawn == [0, 1, 2]
    assert next(got) == 1
    assert drawn == [0, 1, 2, 3]
    assert list(got) == [2, 3, 4]
    assert list(ahead(items(), 0)) == list(ahead(items(), 99)) == list(range(5))
    drawn.clear()
    next(ahead(items(), 0))
    assert drawn == [0]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("crops", [1, 5])
def test_evaluation_reads_a_whole_source_in_order(workers, crops) -> None:
    views = {
        1: lambda image: augment.test_views(image, PIPELINE, SIZE),
        5: lambda image: augment.five_crops(image, SIZE, 16),
    }[crops]
    noted = []
    batches = list(
        evaluation_batches(
            Source(unreadable={2, 4, 5}), views, batch_size=2, workers=workers, on_unreadable=noted.append
        )
    )
    assert [len(batch.images) for batch in batches] == [2] * 5
    images = torch.cat([batch.images for batch in batches])
    readable = np.concatenate([batch.readable for batch in batches])
    assert np.flatnonzero(~readable).tolist() == [2, 4, 5]
    assert [error.name for error in noted] == ["images/2.jpg", "images/4.jpg", "images/5.jpg"]
    assert images.shape == (10, crops, 3, SIZE, SIZE)
    for index in range(10):
        expected = views(Source().read(index)) if readable[index] else torch.zeros_like(images[index])
        assert torch.equal(images[index], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_views_of_chosen_images_know_which_image_they_show(workers) -> None:
    def views(image, index) -> torch.Tensor:
        return torch.full((1, 3, SIZE, SIZE), index, dtype=torch.uint8)

    batches = view_batches(
        Source(unreadable={2}), views, [[7], [2, 9, 3], range(1)], shape=(1, 3, SIZE, SIZE), workers=workers
    )
    found = [(images[:, 0, 0, 0, 0].tolist(), errors) for images, errors in batches]
    assert [shown for shown, _ in found] == [[7], [0, 9, 3], [0]]
    unreadable = found[1][1]
    assert [error is None for error in unreadable] == [False, True, True]
    assert unreadable[0].name == "images/2.jpg"
    assert found[0][1] == found[2][1] == [None]


def test_evaluation_ends_with_a_short_batch_and_leaves_no_thread() -> None:
    before = threading.active_count()
    views = partial(augment.test_views, pipeline=PIPELINE, size=SIZE)
    batches = evaluation_batches(Source(images=7), views, batch_size=3, workers=2)
    assert [len(batch.images) for batch in batches] == [3, 3, 1]
    stopped = evaluation_batches(Source(), views, batch_size=3, workers=2)
    next(stopped)
    stopped.close()
    assert threading.active_count() == before


def test_evaluation_shows_its_progress_on_a_terminal(capsys, monkeypatch) -> None:
    views = partial(augment.test_views, pipeline=PIPELINE, size=SIZE)

    def shown(progress) -> str:
        for _ in evaluation_batches(Source(), views, batch_size=5, workers=0, progress=progress):
            pass
        return capsys.readouterr().err

    assert shown(True) == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("ulfine_fast.loader.tqdm", partial(tqdm, mininterval=0))
    assert "encoding: 100%" in shown(True)
    assert shown(False) == ""


@pytest.fixture
def photographs(tmp_path) -> ImageFiles:
    """Two JPEG files, the first ten times the size that its views need."""
    paths = [tmp_path / "large.jpg", tmp_path / "small.jpg"]
    for path, side in zip(paths, (180, 20), strict=True):
        noise = np.random.RandomState(side).randint(0, 256, (9, 9, 3)).astype(np.uint8)
        Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(path)
    return ImageFiles(paths)


@pytest.mark.parametrize("held_bytes", [0, 1 << 20])
@pytest.mark.parametrize("kind", ["labelled", "weak", "strong"])
def test_large_photographs_are_decoded_at_the_size_that_suffices(photographs, kind, held_bytes) -> None:
    rows = np.array([0, 1])
    options = {"labelled": rows, "unlabelled": rows, "held_bytes": held_bytes}
    with loader(photographs, **options) as views:
        if kind == "strong":
            views.submit("weak", rows, step=4).result()
        got = views.submit(kind, rows, step=4).result().images
    side = sufficient_side(PIPELINE, SIZE, 0.0)
    pictures = [photographs.read(row, side) for row in rows]
    assert [picture.size for picture in pictures] == [(23, 23), (20, 20)]
    role = ["labelled", "weak", "strong"].index(kind)
    for slot, picture in enumerate(pictures):
        random = np.random.default_rng((3, role, 4, slot))
        assert torch.equal(got[slot], view(picture, PIPELINE, kind, random, size=SIZE))


def test_the_side_that_suffices_falls_as_crops_grow() -> None:
    source, pipeline = Source(), PIPELINES["lift_plus"]
    with ViewLoader(
        source, pipeline, labelled=LABELLED, unlabelled=UNLABELLED, size=SIZE, seed=3, workers=0
    ) as views:
        for step, progress in enumerate((0.0, 0.5, 1.0)):
            views.submit("weak", np.array([3]), step=step, progress=progress).result()
    assert source.sides == [sufficient_side(pipeline, SIZE, progress) for progress in (0.0, 0.5, 1.0)]
    assert source.sides == sorted(source.sides, reverse=True)


def test_evaluation_reads_at_the_size_that_it_is_told() -> None:
    views = partial(augment.test_views, pipeline=PIPELINE, size=SIZE)
    for at_least in (None, 18):
        source = Source(images=3)
        list(evaluation_batches(source, views, batch_size=2, workers=0, at_least=at_least))
        assert source.sides == [at_least] * 3


def test_evaluation_errors() -> None:
    views = partial(augment.test_views, pipeline=PIPELINE, size=SIZE)

    def read_all(source, batch_size=4) -> None:
        for _ in evaluation_batches(
            source, views, batch_size=batch_size, workers=1, on_unreadable=lambda _: None
        ):
            pass

    for source, batch_size, message in (
        (Source(), 0, "batch_size and images must be >= 1, got 0 and 10"),
        (Source(images=0), 4, "batch_size and images must be >= 1, got 4 and 0"),
        (
            Source(unreadable=range(10)),
            4,
            "images must be readable, at least one of them, got 10 unreadable: images/0.jpg, .*images/4.jpg$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read_all(source, batch_size)
    with pytest.raises(RuntimeError, match=r"^images/7.jpg: OSError: device gone$"):
        read_all(Source(broken={7}))


def test_default_workers_are_the_processors_of_this_process(monkeypatch) -> None:
    for processors, expected in ((1, 1), (6, 6), (64, 16)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, many=processors: set(range(many)))
        assert default_workers() == expected
    assert [default_workers(processes) for processes in (2, 8, 100)] == [16, 8, 1]
