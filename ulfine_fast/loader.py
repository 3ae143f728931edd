"""Views of images, read and augmented in the background.

Threads, not processes: Pillow releases the interpreter lock while it decodes and resizes, and threads share
decoded images, need no shared memory and no fork beside CUDA.

A random view is a pure function of (seed, kind, step, slot) and its image: neither the number of threads nor
their order changes it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from queue import Empty, PriorityQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ulfine_fast.augment import Kind, Pipeline, channels_first, draw_geometry, sufficient_side
from ulfine_fast.images import ImageSource, MachineError, UnreadableImage
from ulfine_fast.randaugment import randaugment

if TYPE_CHECKING:
    from types import TracebackType

LOGGER = logging.getLogger(__name__)
HELD_BYTES = 1 << 29

_ROLE = {"labelled": 0, "weak": 1, "strong": 2}
# Pillow stores a picture in mode RGB as four bytes.
_BYTES_PER_PIXEL = 4
_NAMES_IN_AN_ERROR = 5

Item = TypeVar("Item")


class Views(NamedTuple):
    """Views of a batch and the images they are of."""

    images: Tensor  # [n, 3, S, S] uint8, on the loader's device
    rows: np.ndarray  # [n] int64, rows of the source


class EvaluationBatch(NamedTuple):
    """Views of consecutive images; those of an image that cannot be read are zero."""

    images: Tensor  # [n, k, 3, S, S] uint8, on the device
    readable: np.ndarray  # [n] bool


class ViewLoader:
    """Turns requests for views of rows into batches on a device, in background threads.

    Args:
        source: where the images are; its `read` must be safe to call from several threads.
        pipeline: what the views are.
        labelled: int [n_l], the rows of the source that labelled views are drawn of.
        unlabelled: int [n_u], the same for weak and strong views.
        size: side of a view in pixels.
        seed: >= 0.
        workers: threads; 0 does the work in `submit`.
        device: where batches go, through pinned memory and without waiting if that is CUDA.
        randaugment_on_device: RandAugment changes the device's tensors when `Pending.result` is called, one
            image after another, instead of pictures in the threads; see `randaugment` for the difference.
        held_bytes: decoded images of weak views are held until their step's strong views are submitted, as
            long as all of them take no more than this; beyond it an image is decoded twice.
        on_unreadable: called once for every image that cannot be read, from any thread, one call at a time.

    A source may decode a large image at a reduced size, as far as `sufficient_side` allows it: which size that is
    depends on the image and on how far training is, so that a view still does not depend on what else is asked for.

    A labelled or weak view of an image that cannot be read becomes one of the next readable image in
    `labelled` or `unlabelled`, whose row is in the result. A context manager: leaving it is `close`. Raises
    ValueError for an argument outside its range.
    """

    def __init__(
        self,
        source: ImageSource,
        pipeline: Pipeline,
        *,
        labelled: np.ndarray,
        unlabelled: np.ndarray,
        size: int,
        seed: int,
        workers: int,
        device: torch.device | str = "cpu",
        randaugment_on_device: bool = False,
        held_bytes: int = HELD_BYTES,
        on_unreadable: Callable[[UnreadableImage], object] | None = None,
    ) -> None:
        if size < 1 or seed < 0:
            raise ValueError(f"ViewLoader: size must be >= 1 and seed >= 0, got {size} and {seed}")
        self._source = source
        self._pipeline = pipeline
        self._pool = {"labelled": labelled, "weak": unlabelled, "strong": unlabelled}
        self._belongs = {kind: np.zeros(len(source), dtype=bool) for kind in self._pool}
        for kind, rows in self._pool.items():
            self._belongs[kind][rows] = True
        self._size = size
        self._seed = seed
        self._device = torch.device(device)
        self._randaugment_on_device = randaugment_on_device
        self._on_unreadable = on_unreadable or log_unreadable
        self._held = _HeldImages(held_bytes)
        self._unreadable: dict[int, UnreadableImage] = {}
        self._noting = Lock()
        self._workers = Workers(workers)

    def submit(
        self,
        kind: Kind,
        rows: np.ndarray,
        *,
        step: int,
        slots: np.ndarray | None = None,
        progress: float = 0.0,
    ) -> Pending:
        """Ask for one view of each row; returns at once unless `workers` is 0.

        rows: int [n], of `labelled` or `unlabelled`. step >= 0: the training step; earlier steps are served
        first. slots: int [n] >= 0, which select the draws within a step, default 0..n-1; where strong views
        are asked of kept rows alone, their places in the whole batch make a view independent of what else is
        kept. progress in [0, 1]: see `augment.view`.

        All strong views of a step belong in one request: it frees the images that its weak views decoded.
        Strong views are never of another image, whose pseudo-label would be another: should one become
        unreadable after its weak view, the result raises UnreadableImage.

        Raises ValueError for an argument outside its range, RuntimeError after `close`.
        """
        slots = np.arange(len(rows)) if slots is None else slots
        if kind not in self._pool:
            raise ValueError(f"submit: kind must be one of {', '.join(self._pool)}, got {kind!r}")
        if len(slots) != len(rows):
            raise ValueError(f"submit: expected {len(rows)} slots, got {len(slots)}")
        if step < 0 or (len(slots) and np.min(slots) < 0):
            raise ValueError(f"submit: step and slots must be >= 0, got {step} and {slots}")
        if not 0 <= progress <= 1:
            raise ValueError(f"submit: progress must be in [0, 1], got {progress}")
        for row in rows.tolist():
            if not (0 <= row < len(self._source) and self._belongs[kind][row]):
                raise ValueError(f"submit: rows must be among those of {kind} views, got {row}")
        batch = _host_batch((len(rows), 3, self._size, self._size), self._device)
        held = self._held.release(step) if kind == "strong" else {}
        futures = []
        for pixels, row, slot in zip(batch.numpy(), rows.tolist(), slots.tolist(), strict=True):
            task = partial(self._draw, pixels, kind, row, step, slot, progress, held.get(row))
            futures.append(self._workers.submit(task, priority=step))
        return Pending(futures, partial(self._deliver, batch, kind))

    def close(self) -> None:
        """Cancel what has not begun and wait for what has. Closing twice is allowed."""
        self._workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _draw(
        self,
        pixels: np.ndarray,
        kind: Kind,
        row: int,
        step: int,
        slot: int,
        progress: float,
        image: Image.Image | None,
    ) -> tuple[int, np.random.Generator]:
        """Write a view into `pixels` [3, S, S]; returns the row it is of and what its draws go on with."""
        at_least = sufficient_side(self._pipeline, self._size, progress)
        if image is None and kind == "strong":
            image = _read(self._source, row, at_least)
        elif image is None:
            image, row = self._read_instead(kind, row, at_least)
        if kind == "weak":
            self._held.hold(step, row, image)
        with _naming(self._source, row):
            random = draws(self._seed, kind, step, slot)
            view = draw_geometry(image, self._pipeline, kind, random, size=self._size, progress=progress)
            if kind == "strong" and not self._randaugment_on_device:
                view = randaugment(view, random, cutout_side=self._pipeline.cutout_side(self._size))
            pixels[:] = channels_first(view)
        return row, random

    def _deliver(self, batch: Tensor, kind: Kind, drawn: list[tuple[int, np.random.Generator]]) -> Views:
        images = batch.to(self._device, non_blocking=True)
        if kind == "strong" and self._randaugment_on_device:
            for image, (_, random) in zip(images, drawn, strict=True):
                image.copy_(randaugment(image, random, cutout_side=self._pipeline.cutout_side(self._size)))
        return Views(images, np.array([row for row, _ in drawn], dtype=np.int64))

    def _read_instead(self, kind: Kind, row: int, at_least: int) -> tuple[Image.Image, int]:
        """The image of a row, or of the first row after it in its pool that can be read, and which it was."""
        for candidate in _round_from(row, self._pool[kind]):
            if candidate in self._unreadable:
                continue
            try:
                return _read(self._source, candidate, at_least), candidate
            except UnreadableImage as error:
                with self._noting:
                    if candidate not in self._unreadable:
                        self._unreadable[candidate] = error
                        self._on_unreadable(error)
        raise _nothing_readable(f"ViewLoader: {kind} images", [*self._unreadable.values()])


class Pending:
    """A request under way."""

    def __init__(self, futures: list[Future], deliver: Callable[[list], Views]) -> None:
        self._futures = futures
        self._deliver = deliver

    def result(self) -> Views:
        """Wait for the views; to be called once.

        Raises what a worker raised: ValueError when no image of the pool can be read, UnreadableImage for a strong
        view, MachineError where the machine fails and not a file, RuntimeError with the image's name for anything
        unexpected or when the loader was closed.
        """
        try:
            return self._deliver([future.result() for future in self._futures])
        except CancelledError as error:
            raise RuntimeError(
                "ViewLoader: the request was cancelled because the loader was closed"
            ) from error


def evaluation_batches(
    source: ImageSource,
    views: Callable[[Image.Image], Tensor],
    *,
    batch_size: int,
    workers: int,
    device: torch.device | str = "cpu",
    at_least: int | None = None,
    depth: int = 2,
    on_unreadable: Callable[[UnreadableImage], object] | None = None,
    progress: bool = True,
) -> Iterator[EvaluationBatch]:
    """The views of all images of a source, in order.

    views: from a picture to uint8 [k, 3, S, S], such as `augment.test_views` or `augment.five_crops` with
    their other arguments bound. batch_size >= 1 images. workers, device: as `ViewLoader`. at_least: short side in
    pixels that suffices for the views, None: full size (`ImageSource.read`). depth >= 0: batches that are under way
    ahead of the one handed over. on_unreadable: called in order for every image that cannot be read. progress: show
    a bar on standard error, if that is a terminal.

    Raises ValueError for an argument outside its range and when no image can be read, MachineError where the machine
    fails and not a file, RuntimeError with the image's name for anything unexpected.
    """
    if batch_size < 1 or len(source) < 1:
        raise ValueError(
            f"evaluation_batches: batch_size and images must be >= 1, got {batch_size} and {len(source)}"
        )
    on_unreadable = on_unreadable or log_unreadable
    shape = views(Image.new("RGB", (1, 1))).shape
    unreadable = []
    bar = tqdm(
        total=len(source),
        desc="encoding",
        unit=" images",
        disable=None if progress else True,
        file=sys.stderr,
        leave=False,
    )
    batches = view_batches(
        source,
        lambda image, _: views(image),
        [range(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size)],
        shape=shape,
        workers=workers,
        device=device,
        at_least=at_least,
        depth=depth,
    )
    with closing(batches), bar:
        for images, errors in batches:
            for error in filter(None, errors):
                unreadable.append(error)
                on_unreadable(error)
            yield EvaluationBatch(images, np.array([error is None for error in errors]))
            bar.update(len(errors))
    if len(unreadable) == len(source):
        raise _nothing_readable("evaluation_batches: images", unreadable)


def view_batches(
    source: ImageSource,
    views: Callable[[Image.Image, int], Tensor],
    batches: Iterable[Sequence[int]],
    *,
    shape: Sequence[int],
    workers: int,
    device: torch.device | str = "cpu",
    at_least: int | None = None,
    depth: int = 2,
) -> Generator[tuple[Tensor, list[UnreadableImage | None]], None, None]:
    """Views of the images whose indices are in each of `batches`, in order.

    views: from a picture and its index to uint8 [k, 3, S, S], which is `shape`. workers ... depth: as
    `evaluation_batches`. Yields uint8 [n, k, 3, S, S] on the device, zero where an image cannot be read, and for each
    image what says so, or None. Raises MachineError where the machine fails and not a file, RuntimeError with the
    image's name for anything unexpected.
    """
    device = torch.device(device)

    def write(pixels: np.ndarray, index: int) -> UnreadableImage | None:
        try:
            image = _read(source, index, at_least)
            with _naming(source, index):
                pixels[:] = views(image, index).numpy()
        except UnreadableImage as error:
            pixels[:] = 0
            return error
        return None

    def submitted() -> Iterator[tuple[Tensor, list[Future]]]:
        for indices in batches:
            batch = _host_batch((len(indices), *shape), device)
            tasks = (partial(write, pixels, i) for pixels, i in zip(batch.numpy(), indices, strict=True))
            yield batch, [pool.submit(task) for task in tasks]

    with Workers(workers) as pool:
        for batch, futures in ahead(submitted(), depth):
            errors = [future.result() for future in futures]
            yield batch.to(device, non_blocking=True), errors


def draws(seed: int, kind: Kind, step: int, slot: int) -> np.random.Generator:
    """What the random view of a slot in a step draws from, a generator of its own for each."""
    return np.random.default_rng((seed, _ROLE[kind], step, slot))


def ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The items of an iterable, each drawn when the item `depth` places before it is handed over.

    Over a generator of submitted requests this is prefetching: `depth` of them are under way while the caller
    works on the one it was given. depth >= 0.
    """
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def default_workers(processes: int = 1) -> int:
    """Threads for a loader: as many as processors that this process may use, at most 16.

    processes: of one run, which share the machine; each has at least one thread.
    """
    # macOS binds no process to processors
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(usable // processes, 1), 16)


def log_unreadable(error: UnreadableImage) -> None:
    """Say in a warning of this module's logger that an image cannot be read."""
    LOGGER.warning("unreadable image: %s", error)


class Workers:
    """Threads that run tasks: the smallest priority first, equal ones in the order of submission.

    threads >= 0; with 0 a task runs when it is submitted. A context manager: leaving it is `close`.
    """

    def __init__(self, threads: int) -> None:
        if threads < 0:
            raise ValueError(f"Workers: threads must be >= 0, got {threads}")
        self._queue: PriorityQueue = PriorityQueue()
        self._order = count()
        self._closed = False
        # daemons: an interpreter that exits without `close` does not hang
        self._threads = [Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], object], priority: int = 0) -> Future:
        """The future of what a task returns or raises. Raises RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError("submit: the loader must be open, got a closed one")
        future = Future()
        if self._threads:
            self._queue.put((priority, next(self._order), future, task))
        else:
            _run(future, task)
        return future

    def close(self) -> None:
        """Cancel what has not begun and wait for what has. Closing twice is allowed."""
        self._closed = True
        try:
            while True:
                self._queue.get_nowait()[2].cancel()
        except Empty:
            pass
        for _ in self._threads:
            self._queue.put((0, next(self._order), Future(), None))
        for thread in self._threads:
            thread.join()
        self._threads = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            _, _, future, task = self._queue.get()
            if task is None:
                return
            _run(future, task)
            # an idle thread keeps no image alive
            del future, task


class _HeldImages:
    """Decoded images by step and row, until the step's strong views are asked for."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._images: dict[int, dict[int, Image.Image]] = {}
        self._lock = Lock()

    def hold(self, step: int, row: int, image: Image.Image) -> None:
        with self._lock:
            # what is held stays: a step's images are needed before those that come later
            if self._bytes + _bytes(image) <= self._most_bytes:
                of_step = self._images.setdefault(step, {})
                if row not in of_step:
                    of_step[row] = image
                    self._bytes += _bytes(image)

    def release(self, step: int) -> dict[int, Image.Image]:
        """The images of a step by row; earlier steps are forgotten too."""
        with self._lock:
            held = self._images.get(step, {})
            for past in [key for key in self._images if key <= step]:
                self._bytes -= sum(_bytes(image) for image in self._images.pop(past).values())
            return held


def _bytes(image: Image.Image) -> int:
    return image.width * image.height * _BYTES_PER_PIXEL


def _run(future: Future, task: Callable[[], object]) -> None:
    future.set_running_or_notify_cancel()
    try:
        future.set_result(task())
    except BaseException as error:  # noqa: BLE001 (whatever it is, the caller gets it from the future)
        future.set_exception(error)


def _host_batch(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _round_from(row: int, pool: np.ndarray) -> Iterator[int]:
    """`row`, then those after it in the pool and round to it again."""
    yield row
    place = np.flatnonzero(pool == row)[0]
    # one by one: nearly always the next image can be read
    yield from map(int, pool[place + 1 :])
    yield from map(int, pool[:place])


def _read(source: ImageSource, row: int, at_least: int | None) -> Image.Image:
    with _naming(source, row):
        return source.read(row, at_least)


@contextmanager
def _naming(source: ImageSource, row: int) -> Iterator[None]:
    """Errors from within say which image they came from."""
    try:
        yield
    except (UnreadableImage, MachineError):
        raise
    except Exception as error:
        raise RuntimeError(f"{source.name(row)}: {type(error).__name__}: {error}") from error


def _nothing_readable(what: str, errors: list[UnreadableImage]) -> ValueError:
    names = ", ".join(error.name for error in errors[:_NAMES_IN_AN_ERROR])
    return ValueError(f"{what} must be readable, at least one of them, got {len(errors)} unreadable: {names}")
