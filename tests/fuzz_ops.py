"""Random calls of every op in processes of their own: python tests/fuzz_ops.py CALLS [FIRST].

A round draws sizes, dtypes, layouts, values and options from its number alone and calls each op once; one call in ten
gets an argument that is wrong. A call ends with a result, whose shapes are looked at, or with one of the errors that
the docstrings name. Anything else is printed with the number of its round: another error, or a process that a signal
ended. Every instruction set of this processor gets its turn, one per process.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Ops, and rounds of one process.
OPS, BLOCK = 6, 5_000
ROWS, CLASSES, DIMS = (0, 1, 2, 5, 17, 33, 70), (1, 2, 3, 10, 37, 130), (1, 2, 3, 16, 17, 64, 100)
REFUSALS = ValueError, TypeError, RuntimeError


def calls_of(number: int) -> list[Callable[[], None]]:
    """The calls of a round; each raises what its op raises."""
    import torch

    import ulfine_fast as uf

    g, drawn = torch.Generator().manual_seed(number), random.Random(number)
    pick = drawn.choice

    def chance(share: float) -> bool:
        return drawn.random() < share

    b, u, c, d = pick(ROWS), pick(ROWS), pick(CLASSES), pick(DIMS)
    dtypes = (torch.float32,) * 4 + (torch.bfloat16, torch.float16, torch.float64)

    def hostile(x: torch.Tensor) -> torch.Tensor:
        """Some entries become what nobody expects."""
        if x.numel() and chance(0.2):
            value = pick((0.0, float("nan"), float("inf"), -float("inf"), 1e30, 1e-30, -1e4))
            x.view(-1)[torch.randint(x.numel(), (1 + x.numel() // 7,), generator=g)] = value
        return x

    def floats(*shape: int) -> torch.Tensor:
        x = hostile(torch.randn(*shape, generator=g)).to(pick(dtypes))
        layout = pick(("plain", "plain", "transposed", "strided"))
        if layout == "transposed" and x.ndim == 2:
            x = x.T.contiguous().T
        if layout == "strided":
            x = torch.stack([x, x], -1)[..., 0]
        return x.requires_grad_(chance(0.5) and len(shape) == 2)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(-2, high + pick((0, 0, 0, 2)), shape, generator=g)

    def maybe(value: Callable[[], object]) -> object:
        return value() if chance(0.4) else None

    options = {
        "align": pick((1.0, 0.5, -2.0, 0.0, 1e6)),
        "eta": pick((0.0, 0.3, 1.0)),
        "linear_scale": pick((1.0, 25.0, 100.0, 1e4)),
        "proto_scale": pick((1.0, 25.0, 100.0)),
        "normalize_linear": chance(0.8),
    }
    x, weak, w, t = floats(b, d), floats(u, d), floats(c, d), floats(c, d)
    limit = pick((0.0, 0.5, 1.0)) if chance(0.7) else torch.rand(c, generator=g)
    loss_on = pick(("branches", "fused"))
    labels = {
        "adjustment": maybe(lambda: floats(c).detach()), "temperature": pick((0.5, 1.0, 4.0)),
        "scale_rows": pick((None, 0, 1, 100)), **options,
    }  # fmt: skip
    groups = pick((1, 2, 5))
    entropy = {
        "adjustment": maybe(lambda: floats(groups, c).detach()), "loss_on": loss_on,
        "group": maybe(lambda: integers(groups, b)), **options,
    }  # fmt: skip
    step = {
        "temperature": pick((0.5, 1.0, 4.0)), "scale_rows": pick((None, 0, 1, 100)), "loss_on": loss_on,
        "unlabelled_weight": pick((0.0, 1.0)), "orthogonality_weight": pick((0.0, 1.0)), **options,
        **{f"{name}adjustment": maybe(lambda: floats(c).detach()) for name in ("weak_", "", "strong_")},
    }  # fmt: skip
    features = torch.cat([x.float(), weak.float()])
    histogram = pick((integers(9, c).clamp_min(0), hostile(torch.rand(c, generator=g))))
    state = [one.detach().float() for one in (t, w)]
    state += [integers(2, c) > 0, hostile(torch.rand(c, generator=g))]
    calls = {
        uf.proto_logits: ([x, t, options["proto_scale"]], {}),
        uf.pseudo_label: ([weak, w, t, limit], labels),
        uf.dual_cross_entropy: (
            [x, integers(c, b), w, t, maybe(lambda: hostile(torch.rand(b, generator=g)))], entropy,
        ),
        uf.proto_fit: ([x.detach(), integers(c, b), histogram, *state], {}),
        uf.orthogonality: ([t], {}),
        uf.head_loss: ([features, weak, integers(c, b), w, t, limit], step),
    }  # fmt: skip

    def call(op: Callable, arguments: list, named: dict) -> None:
        found = op(*arguments, **named)
        outputs = found if isinstance(found, tuple) else (found,)
        outputs = [out for one in outputs for out in (one if isinstance(one, tuple) else (one,))]
        if not all(isinstance(out, torch.Tensor) for out in outputs):
            raise AssertionError(f"{op.__name__} returned {found!r}")
        leaves = [one for one in arguments if isinstance(one, torch.Tensor) and one.requires_grad]
        if not (outputs[0].requires_grad and leaves):
            return
        gradients = torch.autograd.grad(outputs[0].float().sum(), leaves, allow_unused=True)
        for one, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None and gradient.shape != one.shape:
                raise AssertionError(f"{op.__name__}: a gradient is {list(gradient.shape)}")

    for arguments, _ in calls.values():
        if chance(0.1):
            of_no_use = (
                None,
                3,
                "x",
                [1.0],
                1j,
                2**70,
                float("nan"),
                torch.zeros(3, 3, 3),
                torch.zeros(c + 1, d),
            )
            arguments[drawn.randrange(len(arguments))] = pick(of_no_use)
    return [partial(call, op, *given) for op, given in calls.items()]


def block(first: int, count: int, progress: Path) -> int:
    """Rounds of one process; exit status: 0, or 1 if an error is not one that the docstrings name."""
    import torch

    status, refused = 0, 0
    with progress.open("r+b", buffering=0) as file:
        for number in range(first, first + count):
            file.seek(0)
            file.write(number.to_bytes(8, "little"))
            torch.set_num_threads(1 + number % 2)
            for call in calls_of(number):
                try:
                    call()
                except REFUSALS:
                    refused += 1
                except Exception as error:  # noqa: BLE001 every other error is a fault of the op
                    print(f"round {number}: {type(error).__name__}: {error}", flush=True)
                    status = 1
    print(f"{OPS * count} calls from round {first}, {refused} refused", flush=True)
    return status


def main(calls: int, first: int = 0) -> int:
    """Exit status: 0 if every process ended by itself without another error."""
    rounds = -(-calls // OPS)
    names = subprocess.run(
        [sys.executable, "-P", "-c", "from ulfine_fast import _native; print(_native.isa())"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    ladder = ("baseline", "avx2", "avx512")
    sets = itertools.cycle(ladder[: ladder.index(names[0]) + 1] if names[0] in ladder else names)
    bad, begun = 0, time.perf_counter()
    for start in range(first, first + rounds, BLOCK):
        count, isa = min(BLOCK, first + rounds - start), next(sets)
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(bytes(8))
            ended = subprocess.run(
                [sys.executable, "-P", __file__, "block", str(start), str(count), file.name],
                env={**os.environ, "ULFINE_ISA": isa, "OMP_WAIT_POLICY": "passive"},
            )
            if ended.returncode < 0:
                number = int.from_bytes(Path(file.name).read_bytes(), "little")
                print(f"round {number}: signal {-ended.returncode} with {isa}", flush=True)
        bad += ended.returncode != 0
    print(f"{OPS * rounds} calls, {bad} processes with faults, {time.perf_counter() - begun:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    if sys.argv[1] == "block":
        sys.exit(block(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
    sys.exit(main(*map(int, sys.argv[1:])))
