"""The one accuracy policy of the suite, with the shapes, dtypes and layouts that every op is held to.

A kernel may not be less accurate than the eager PyTorch it replaces: against the reference in float64 its
largest error is at most RATIO times that of the reference in the dtype of the inputs, plus FLOOR times the
size of the values that are summed. Labels and keep masks are equal, except inside BAND of a tie or of the
threshold, where rounding decides.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RATIO = 1.25
FLOOR = 1e-6
BAND = 1e-3

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (B, C, D): every size of the list 0, 1, 5, 37, 130 x 1, 2, 10, 100, 1000 x 1, 3, 17, 64, 100, 257 occurs; the
# last four have more rows than a chunk of 256, one row on either side of its end, and C * D of no round size.
SHAPES = (
    (0, 1, 1),
    (0, 10, 17),
    (1, 1, 3),
    (1, 2, 257),
    (1, 1000, 17),
    (5, 2, 1),
    (5, 10, 3),
    (5, 100, 100),
    (37, 1, 64),
    (37, 10, 257),
    (37, 100, 17),
    (130, 2, 100),
    (130, 10, 64),
    (130, 1000, 64),
    (255, 7, 5),
    (257, 37, 19),
    (513, 11, 33),
    (700, 101, 13),
)


def seeded(*sizes: int) -> torch.Generator:
    """Generator that depends on the sizes alone: a case draws the same numbers whatever ran before it."""
    seed = 17
    for size in sizes:
        seed = (seed * 1_000_003 + size) % 2**31
    return torch.Generator().manual_seed(seed)


def assert_no_worse(got: Tensor, eager: Tensor, exact: Tensor, scale: float | None = None) -> None:
    """Hold `got` to the policy; `eager` is the reference in its dtype, `exact` the reference in float64.

    `scale` is the size of the values that were summed into the result, where they cancel; None is the
    largest exact value.
    """
    assert got.shape == exact.shape, f"shape {list(got.shape)}, expected {list(exact.shape)}"
    assert got.dtype == eager.dtype, f"dtype {got.dtype}, expected {eager.dtype}"
    if exact.numel() == 0:
        return
    assert torch.equal(got.isnan(), exact.isnan()), "NaN in other places than the reference"
    got, eager, exact = (t.detach().double().nan_to_num(nan=0.0) for t in (got, eager, exact))
    if scale is None:
        scale = exact.abs().max().item()
    error = (got - exact).abs().max().item()
    eager_error = (eager - exact).abs().max().item()
    bound = RATIO * eager_error + FLOOR * scale
    assert error <= bound, f"error {error:.3g} > {bound:.3g} (eager has {eager_error:.3g})"


def assert_same_outside_band(got: Tensor, exact: Tensor, distance: Tensor) -> None:
    """Raise unless `got` equals `exact` wherever `distance`, that of the exact decision to its tie, is large."""
    assert got.dtype == exact.dtype
    differs = got != exact
    wrong = differs & ~(distance < BAND)
    assert not wrong.any(), (
        f"rows {wrong.nonzero().flatten().tolist()} differ {distance[wrong].tolist()} off a tie"
    )


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Raise unless both tensors hold the same bytes; a NaN equals itself, -0.0 is not 0.0."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    got, expected = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (got, expected))
    assert torch.equal(got, expected), f"{(got != expected).sum()} of {got.numel()} bytes differ"


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    """Raise unless the block leaves every byte and every version counter of `tensors` as it was."""
    before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    yield
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert_same_bits(tensor, value)
        assert tensor._version == version


@contextmanager
def never_waits() -> Iterator[None]:
    """Raise where the block waits for the GPU, as far as torch sees it."""
    with warnings.catch_warnings():
        # Torch says that its detector does not find everything.
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_threads(threads: int, function: Callable[[], object]) -> object:
    """Result of `function()` with that many torch threads."""
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function()
    finally:
        torch.set_num_threads(previous)


def compiled(function: Callable, **options: object) -> Callable:
    """`torch.compile` without a graph break, from an empty cache."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


# Memory layouts: each holds the values of a contiguous tensor, and NaN (or -99) wherever it must not be read.


def _poison(shape: tuple[int, ...], like: Tensor) -> Tensor:
    value = float("nan") if like.is_floating_point() else like.dtype is torch.bool or -99
    return torch.full(shape, value, dtype=like.dtype)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T if tensor.ndim == 2 else _strided(tensor)


def _strided(tensor: Tensor) -> Tensor:
    view = _poison(tuple(2 * n + 1 for n in tensor.shape), tensor)[
        tuple(slice(1, None, 2) for _ in tensor.shape)
    ]
    return view.copy_(tensor)


def _offset(tensor: Tensor) -> Tensor:
    view = _poison((tensor.numel() + 7,), tensor)[3 : 3 + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


LAYOUTS = {"transposed": _transposed, "strided": _strided, "offset": _offset}
