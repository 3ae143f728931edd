"""How kernels are cut: tiles of a product, rows of a row pass, and the precision that the user allows.

One table, filled by hand: the autotuner measures within the first call, which CUDA graphs forbid, and may then
choose another order of summation in the next run.
"""

from __future__ import annotations

import torch
import triton

# (rows, classes, dimensions, warps) of one tile of logits. Operands of IEEE products lie in registers: two
# programs share a multiprocessor. TF32 runs on tensor cores: the largest tile of which no register spills.
PRODUCT_TILES = {"ieee": (64, 64, 16, 8), "tf32": (64, 128, 32, 4)}
# Numbers that one program of a row pass holds: a few registers for each thread of four warps.
ROW_PASS = 2048


def product_tile() -> dict[str, int | str]:
    """Constants of a kernel that multiplies; torch's own switch decides whether operands may round to TF32."""
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    rows, classes, dimensions, warps = PRODUCT_TILES[precision]
    return {
        "PRECISION": precision,
        "BLOCK_B": rows,
        "BLOCK_C": classes,
        "BLOCK_D": dimensions,
        "num_warps": warps,
    }


def row_tile(length: int, largest: int | None = None) -> tuple[int, int]:
    """Rows of a program and padded numbers of a row that it holds at a time: all of them, or `largest`."""
    block = triton.next_power_of_2(max(length, 1))
    block = block if largest is None else min(block, largest)
    return max(ROW_PASS // block, 1), block
