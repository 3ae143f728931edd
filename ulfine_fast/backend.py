"""Which implementation of an op runs: `auto`, or one that the caller names.

`auto` takes the fastest implementation that this project has measured for the device, the dtype and, on a GPU, the
number of classes (fastest.py), and may change its mind; a name never falls back: if it cannot run, the call raises
and says why.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ulfine_fast import _cuda, _native
from ulfine_fast.fastest import FASTEST, fastest

BACKENDS = ("reference", "cpp", "triton", "cuda")

# Every back end has every op, and what is composed of them.
OPS = ("proto_logits", "pseudo_label", "dual_cross_entropy", "proto_fit", "orthogonality")
COMPOSED = ("head_loss",)

_selected = "auto"


class Availability(NamedTuple):
    """Whether a back end was built into this installation, whether it can run here, and why not."""

    built: bool
    available: bool
    reason: str


def availability() -> dict[str, Availability]:
    """State of every back end on this machine."""
    gpu = torch.cuda.is_available()
    no_gpu = "no CUDA device: torch.cuda.is_available() is False"
    cpp = Availability(True, True, f"CPU instruction set: {_native.isa()}")
    if _native.error:
        cpp = Availability(False, False, _native.error)
    built = _native.has_cuda()
    cuda = Availability(built, built and gpu, "" if built and gpu else no_gpu)
    if not built:
        cuda = Availability(False, False, "the extension was built without nvcc (ULFINE_CUDA=ON requires it)")
    has_triton = importlib.util.find_spec("triton") is not None
    triton = Availability(has_triton, has_triton and gpu, "" if gpu else no_gpu)
    if not has_triton:
        triton = Availability(False, False, "the package triton is not installed")
    return {
        "reference": Availability(True, True, "pure PyTorch, every device and dtype"),
        "cpp": cpp,
        "triton": triton,
        "cuda": cuda,
    }


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op without an explicit `backend=` runs on `name`; blocks nest.

    The choice is one per process, not per thread: set it where the program starts, or around a
    measurement.
    """
    global _selected
    _known(name)
    previous, _selected = _selected, name
    try:
        yield
    finally:
        _selected = previous


def _known(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}, got {name!r}")


def choose(op: str, features: Tensor, classes: int, dtype: torch.dtype, requested: str | None = None) -> str:
    """Name of the back end that runs `op` on `features` with arithmetic in `dtype`; raises if it cannot."""
    name = _selected if requested is None else requested
    _known(name)
    if name == "reference":
        return name
    device = features.device.type
    if name == "auto":
        return _automatic(op, features.device, classes) if dtype == torch.float32 else "reference"
    if dtype == torch.float64:
        raise RuntimeError(f"{op}: {name} computes in float32, got float64; use backend='reference'")
    if name == "cpp":
        if _native.error:
            raise RuntimeError(f"{op}: cpp is not available: {_native.error}")
        if device != "cpu":
            raise RuntimeError(f"{op}: cpp needs a CPU tensor, got {device}")
        return name
    refusal = _refusal(name, device)
    if refusal:
        raise RuntimeError(f"{op}: {name} {refusal}")
    return name


def automatic(device: str) -> str:
    """What `auto` takes for float32 on "cpu" or "cuda", and why, for people."""
    if device == "cpu":
        if _native.error:
            return f"reference (cpp is not available: {_native.error})"
        return f"cpp ({_native.isa()})"
    gpu = _gpu(None)
    if gpu not in FASTEST:
        return f"reference (nothing was measured on {gpu})"
    return f"the fastest by op and number of classes, as measured on {gpu}"


def _automatic(op: str, device: torch.device, classes: int) -> str:
    if device.type == "cpu":
        return "reference" if _native.error else "cpp"
    if device.type != "cuda":
        return "reference"
    name = fastest(_gpu(device.index), op, classes)
    return "reference" if name == "reference" or _refusal(name, "cuda") else name


def _gpu(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def _refusal(name: str, device: str) -> str:
    """Why the GPU back end `name` cannot take a tensor on `device`; empty where it can."""
    # Without a GPU: Triton's interpreter, and the tests' emulator of CUDA.
    if device == "cpu" and (_cuda.emulated() if name == "cuda" else _interpreting()):
        return ""
    state = availability()[name]
    if not state.built or (device == "cuda" and not state.available):
        return f"is not available: {state.reason}"
    if device != "cuda":
        here = [b for b in ("reference", "cpp") if availability()[b].available]
        return f"needs a CUDA tensor, got {device}; here: auto, {', '.join(here)}"
    return ""


# A compiler cannot look into the extension or the driver, and need not: the answer never changes. This is all that
# torch.compiler.assume_constant_result does, besides importing the compiler.
_refusal._dynamo_marked_constant = _gpu._dynamo_marked_constant = True


def _interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
