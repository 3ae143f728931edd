"""What every test stands on: one thread, a fixed seed, every back end that runs here, and poisoned memory."""

from __future__ import annotations

import math
import os
from pathlib import Path

# Idle OpenMP workers sleep instead of spinning on a shared machine; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Without a GPU, Triton kernels run in their interpreter; read when the module of a kernel is loaded.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A graph that was compiled before an op changed would pass, or fail, for the op as it was then.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

from collections.abc import Callable, Iterator
from types import ModuleType

import emulator
import numpy as np
import pytest
import torch
from hypothesis import Phase, settings

from ulfine_fast import _cuda, _native
from ulfine_fast.backend import COMPOSED, OPS
from ulfine_fast.cache import CACHE_VARIABLE

torch.set_num_threads(1)
# Asked before a test hides the device: the driver counts devices once in a process.
HAS_DEVICE = torch.cuda.is_available()

# The same examples in every run, so that a red test is red for everyone.
settings.register_profile("ulfine", derandomize=True, deadline=None, database=None, max_examples=30)
settings.load_profile("ulfine")

FENCE = 256


# Back ends whose kernels run on this machine. Without the extension the tests of cpp fail: it is not optional.
KERNELS = ("cpp", "triton", "cuda") if os.environ.get("TRITON_INTERPRET") == "1" else ("cpp", "cuda")
# Triton's interpreter takes a hundred times as long, so it gets no shape with more products than this, and so
# many examples of a property.
INTERPRETED = ("triton",)
LARGEST_PRODUCT, EXAMPLES = 300_000, 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `kernel` on every kernel of its op; `backend` is those and the reference.

    The op is what the test file is named after.
    """
    op = metafunc.module.__name__.rpartition("test_")[2]
    if op not in (*OPS, *COMPOSED):
        return
    for name, choice in (("kernel", KERNELS), ("backend", ("reference", *KERNELS))):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, choice)


def _kernels_of(item: pytest.Item) -> set[object]:
    # What is marked for a GPU runs there, in no interpreter and no emulator.
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if item.get_closest_marker("gpu"):
        return set()
    return {parameters.get("kernel"), parameters.get("backend")}


def _is_interpreted(item: pytest.Item) -> bool:
    return bool(_kernels_of(item) & set(INTERPRETED))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the shapes that take an interpreted kernel too long."""

    def large(item: pytest.Item) -> bool:
        sizes = [item.callspec.params.get(name, 1) for name in "bcd"]
        return math.prod(sizes) > LARGEST_PRODUCT

    left_out = [item for item in items if _is_interpreted(item) and large(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _hold_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    # MKL stands in for cuBLAS here, and unlike it may round differently with another number of threads.
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not _is_interpreted(request.node):
        yield
        return
    # hypothesis keeps one setting per function, whatever it is parametrised with. To shrink takes minutes here.
    if hasattr(request.function, "hypothesis"):
        few = settings(settings.default, max_examples=EXAMPLES, phases=(Phase.explicit, Phase.generate))
        monkeypatch.setattr(request.function, "_hypothesis_internal_use_settings", few)
    _hold_threads(monkeypatch)
    # A product of numpy is one of the processor's BLAS, which may round as it likes; this one has an order.
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype=None: np.einsum("ik,kj->ij", a, b, dtype=dtype))
    # The interpreter computes in numpy, which warns of what a GPU does in silence.
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session")
def emulated_kernels(request: pytest.FixtureRequest) -> ModuleType:
    """The CUDA launchers in the emulator; built again when a source of theirs has changed."""
    return emulator.load(request.config.cache.mkdir("emulator"))


@pytest.fixture(autouse=True)
def _emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cuda" in _kernels_of(request.node):
        monkeypatch.setattr(_cuda, "kernels", request.getfixturevalue("emulated_kernels"))
        _hold_threads(monkeypatch)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is marked for a GPU needs one; from all other tests, and from processes of theirs, it is hidden."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    elif not HAS_DEVICE:
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products of float32 may round to TF32 on a GPU; where there is none, only the tiles change."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a module encodes goes into a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def poisoned() -> Callable:
    """`poisoned(f)` is f() with every fresh output and scratch buffer full of NaN (or -6e18) and fenced.

    A value that the kernel does not write, or reads before it writes it, shows in the result; a write
    outside the buffer raises here.
    """

    def run(function: Callable[[], object]) -> object:
        allocations = []
        plain_empty = torch.empty

        def empty(*size, dtype=None, device=None, **_):
            shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            dtype = dtype or torch.get_default_dtype()
            octet = 0xFF if dtype.is_floating_point else 0xAB
            count = torch.Size(shape).numel() * dtype.itemsize
            raw = plain_empty(count + 2 * FENCE, dtype=torch.uint8).fill_(octet)
            allocations.append((raw, octet))
            return raw[FENCE : FENCE + count].view(dtype).view(shape)

        _native.release_scratch()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            patch.setattr(
                torch, "empty_like", lambda t, dtype=None, **_: empty(t.shape, dtype=dtype or t.dtype)
            )
            result = function()
        _native.release_scratch()
        assert allocations, "the function allocated nothing"
        for raw, octet in allocations:
            fences = torch.cat([raw[:FENCE], raw[-FENCE:]])
            assert (fences == octet).all(), "written outside an output or the scratch memory"
        return result

    return run
