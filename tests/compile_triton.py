"""Compile every Triton launch of the ops for GPUs and print what came of it as JSON; see `test_triton.py`.

The launches are recorded from the launchers themselves, on tensors of the CPU and without running a kernel. A
program of its own, because Triton decides once per process whether it compiles or interprets.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from tolerances import seeded
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90)
PRECISIONS = ("ieee", "tf32")
# (B, C, D): less than a row tile and one range of classes; more than a row tile and several ranges.
SHAPES = {"small": (40, 10, 64), "large": (130, 5000, 1024)}


class Launch(NamedTuple):
    """A kernel, the types of what it was launched with, and the values that it is compiled for."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]
    warps: int


TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def launch_of(kernel: JITFunction, arguments: tuple, named: dict) -> Launch:
    """What Triton makes of the arguments of a launch."""
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | {k: v for k, v in named.items() if k in names}
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        specialised = value is None or (isinstance(value, int) and value == 1)
        if parameter.is_constexpr or specialised:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            divisible.append(name)
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            divisible += [name] if isinstance(value, int) and value % 16 == 0 else []
    return Launch(
        kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        named.get("num_warps", 4),
    )


def inputs(b: int, c: int, d: int) -> tuple[torch.Tensor, ...]:
    """Features in a half type, targets, and both banks."""
    g = seeded(b, c, d)
    features, linear, prototypes = (torch.randn(rows, d, generator=g) for rows in (b, c, c))
    return features.bfloat16(), torch.randint(c, (b,), generator=g), linear, prototypes


ONE, LIMIT = torch.ones(()), torch.full((1,), 0.7)


def call_proto_logits(kernels, b, c, d):
    x, _, _, p = inputs(b, c, d)
    kernels.proto_logits_triton(x, p, 25.0)
    kernels.proto_logits_backward_triton(torch.ones(b, c), x, p, 25.0, True, True)


def call_pseudo_label(kernels, b, c, d):
    x, _, w, t = inputs(b, c, d)
    kernels.pseudo_label_triton(x, w, t, LIMIT, ONE, torch.zeros(c), 0.5, 25.0, 25.0, 2.0, True, b)


def call_dual_cross_entropy(kernels, b, c, d):
    x, y, w, t = inputs(b, c, d)
    for fused in (False, True):
        kernels.dual_cross_entropy_triton(
            x, y, w, t, torch.ones(b), torch.zeros(2, c), torch.zeros_like(y), ONE, 0.5, 25.0, 25.0, fused,
            True, True, True,
        )  # fmt: skip


def call_proto_fit(kernels, b, c, d):
    x, y, w, t = inputs(b, c, d)
    seen = torch.zeros(c, dtype=torch.bool)
    kernels.proto_fit_triton_(x, y, torch.ones(c).long(), t, w, seen, torch.zeros(c), 0.1, 0.9, 0.9)


def call_orthogonality(kernels, b, c, d):
    kernels.orthogonality_triton(inputs(b, c, d)[3])


def call_head_loss(kernels, b, c, d):
    x, y, w, t = inputs(b, c, d)
    shift = torch.zeros(c)
    for fused in (False, True):
        kernels.head_loss_triton(
            torch.cat([x, x]), x, y, w, t, LIMIT, ONE, shift, shift, shift, 0.5, 25.0, 25.0, 1.0, True, b,
            fused, 1.0, 1.0, True, True, True,
        )  # fmt: skip


CALLS = {
    "proto_logits": call_proto_logits,
    "pseudo_label": call_pseudo_label,
    "dual_cross_entropy": call_dual_cross_entropy,
    "proto_fit": call_proto_fit,
    "orthogonality": call_orthogonality,
    "head_loss": call_head_loss,
}


class Calls(TorchDispatchMode):
    """Names of the torch functions that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def record(op: str, shape: tuple[int, int, int]) -> tuple[list[Launch], list[str]]:
    """The launches of a call, none of them run, and the torch functions that it calls."""
    launches = []
    JITFunction.run = lambda kernel, *a, grid, warmup, **named: launches.append(launch_of(kernel, a, named))
    with Calls() as calls:
        CALLS[op](importlib.import_module(f"ulfine_fast.kernels.{op}"), *shape)
    return launches, calls.names


@cache
def compiled(launch: Launch, arch: int) -> dict[str, object]:
    """What the compiler says of a launch."""
    names = launch.kernel.arg_names
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        dict(launch.constants),
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    kernel = triton.compile(source, GPUTarget("cuda", arch, 32), {"num_warps": launch.warps})
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [cuobjdump, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "kernel": launch.kernel.__name__,
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
        "tf32": dict(launch.constants).get("PRECISION") == "tf32",
        "tensor cores": re.findall(r"wgmma\.mma_async|mma\.sync", kernel.asm["ptx"])[:1],
    }


def main() -> None:
    found = {}
    for op, precision, (name, shape) in product(CALLS, PRECISIONS, SHAPES.items()):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        launches, calls = record(op, shape)
        found[f"{op} {name} {precision}"] = {
            "calls": calls,
            **{str(arch): [compiled(launch, arch) for launch in launches] for arch in ARCHITECTURES},
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
