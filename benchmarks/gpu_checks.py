"""Every kernel of the GPU back ends, on small inputs: python benchmarks/gpu_checks.py once|twice [LARGEST [BACKEND]].

`once` launches each kernel in each of its forms, for compute-sanitizer to watch. `twice` also compares the bits of
a second run, in memory that held something else, and of a replayed CUDA graph. Only the first LARGEST shapes, and
only that back end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import torch
from contests import graphed
from torch import Tensor

from ulfine_fast import use_backend
from ulfine_fast.head_loss import head_loss
from ulfine_fast.ops import dual_cross_entropy, orthogonality, proto_fit, proto_logits, pseudo_label
from ulfine_fast.state import PrototypeState

BACKENDS = ("triton", "cuda")
# (labelled, unlabelled, classes, dims): either Gram matrix, more than one tile and a last one that is not full.
SHAPES = ((5, 13, 7, 19), (9, 21, 300, 17), (70, 130, 1100, 520), (64, 448, 1000, 512))


def cases(largest: int) -> list[tuple[tuple[int, ...], torch.dtype, bool]]:
    """(shape, dtype of features and banks, whether products may round to TF32)."""
    plain = [(shape, torch.float32, tf32) for shape in SHAPES[:largest] for tf32 in (False, True)]
    # Other dtypes are only loaded, unless their products are of float16.
    half = [(SHAPES[0], dtype, False) for dtype in (torch.bfloat16, torch.float16)]
    return plain + half + [(shape, torch.bfloat16, True) for shape in SHAPES[: min(largest, 2)]]


def with_gradients(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """The value and the gradients of its sum."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def calls(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Every op, forward and backward, by name; they run on the back end that is selected."""
    b, u, c, d = shape
    generator = torch.Generator().manual_seed(b + u + c + d)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    # A strong view is the weak one with noise, a third of the rows have no label.
    w, t, weak = (normal(rows, d, dtype=dtype) for rows in (c, c, u))
    x = torch.cat([normal(b, d, dtype=dtype), weak + 0.3 * normal(u, d, dtype=dtype)])
    y = torch.randint(c, (b,), generator=generator)
    y[::3] = -1
    y = y.to(device)
    shift, strong_shift, limits = normal(c), normal(c), torch.full((c,), 0.3, device=device)
    rows = torch.arange(b + u, device=device)
    shares = torch.rand(c, generator=generator).to(device)
    state = t.float(), normal(c, d), torch.arange(c, device=device) % 2 == 0, shares

    def entropy(loss_on: str, normalize: bool) -> Callable[[], list[Tensor]]:
        return lambda: with_gradients(
            lambda x, w: dual_cross_entropy(
                x, rows % c, w, t, (rows % 3).float(), adjustment=torch.stack([shift, strong_shift]),
                group=rows % 2, align=0.8, loss_on=loss_on, normalize_linear=normalize,
            ),
            x, w,
        )  # fmt: skip

    def step(loss_on: str) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in (x, w, t)]
        loss, labels = head_loss(
            leaves[0], weak, y, *leaves[1:], limits, weak_adjustment=shift, adjustment=shift,
            strong_adjustment=strong_shift, align=0.8, loss_on=loss_on, scale_rows=8,
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, leaves), *labels]

    def advance(posterior: bool) -> list[Tensor]:
        after = PrototypeState(t.float())
        labels = pseudo_label(weak, w, t, limits, scale_rows=8)
        counts = torch.full((c,), 3, device=device)
        after.advance(
            x[:b], y, weak, labels, counts, torch.ones((), dtype=torch.bool, device=device),
            copies=rows[:u] % 5 == 0, mu=0.1, beta=0.9, gamma=0.9, scale_decay=0.9, posterior=posterior,
            normalize=not posterior,
        )  # fmt: skip
        return list(after.state_dict().values())

    return {
        "advance, compounding": lambda: advance(False),
        "advance, posterior": lambda: advance(True),
        "proto_logits": lambda: with_gradients(proto_logits, x, t),
        "pseudo_label": lambda: list(pseudo_label(weak, w, t, limits, adjustment=shift, temperature=2.0)),
        "pseudo_label, one threshold": lambda: list(pseudo_label(weak, w, t, 0.3, normalize_linear=False)),
        "dual_cross_entropy, branches": entropy("branches", True),
        "dual_cross_entropy, fused": entropy("fused", False),
        "proto_fit": lambda: list(proto_fit(x[:b], y, torch.ones(c, device=device), *state)),
        "proto_fit, counts": lambda: list(proto_fit(x[:b], y, (limits > 0).long(), *state)),
        "orthogonality": lambda: with_gradients(orthogonality, t),
        "head_loss, branches": lambda: step("branches"),
        "head_loss, fused": lambda: step("fused"),
    }


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Torch's own switch: whether products of float32 may round their operands to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def scribble(device: str) -> None:
    """Fill free memory with NaN, so that what a kernel reads before it writes differs from the run before."""
    for size in (2**8, 2**14, 2**20, 2**24):
        torch.empty(size, device=device).fill_(float("nan"))


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether the tensors hold the same bytes."""
    return all(
        torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)))
        for a, b in zip(one, other, strict=True)
    )


def differing(call: Callable[[], list[Tensor]], device: str) -> list[str]:
    """What of a second run and of a replayed graph has other bits than the first run."""
    first = [tensor.clone() for tensor in call()]
    scribble(device)
    runs = {"second run": call}
    if device == "cuda":
        runs["replayed graph"] = graphed(call)
    return [name for name, run in runs.items() if not same_bits(first, run())]


def main(
    mode: str, largest: int = len(SHAPES), backends: tuple[str, ...] = BACKENDS, device: str = "cuda"
) -> int:
    """Exit status: 0, or 1 where bits differ."""
    bad = []
    for backend, (shape, dtype, allowed) in product(backends, cases(largest)):
        with use_backend(backend), tf32(allowed):
            for name, call in calls(shape, dtype, device).items():
                where = (
                    f"{name} {backend} {'x'.join(map(str, shape))} {dtype} {'tf32' if allowed else 'ieee'}"
                )
                if mode == "once":
                    call()
                else:
                    bad += [f"{where}: other bits in the {run}" for run in differing(call, device)]
    if device == "cuda":
        torch.cuda.synchronize()
    print(*bad, f"{mode}: {len(bad)} differences" if mode == "twice" else "every kernel ran", sep="\n")
    return int(bool(bad))


if __name__ == "__main__":
    mode, largest, *chosen = sys.argv[1:] if len(sys.argv) > 2 else [sys.argv[1], len(SHAPES)]
    sys.exit(main(mode, int(largest), tuple(chosen) or BACKENDS))
