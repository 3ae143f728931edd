"""The back end that `auto` takes on a GPU: the fastest one that was measured there.

`make gpu STAGE=bench` ends with the lines of its GPU for this table. Where nothing was measured the reference runs.
"""

from __future__ import annotations

# Most classes of each range but the last; one of the shapes that are measured lies in each.
RANGES = (300, 3000, 13000)

# GPU as torch names it: op: back end in each range.
FASTEST: dict[str, dict[str, tuple[str, ...]]] = {
    "NVIDIA H100 80GB HBM3": {
        "head_loss": ("cuda", "cuda", "cuda", "cuda"),
        "proto_logits": ("cuda", "cuda", "cuda", "reference"),
        "pseudo_label": ("cuda", "cuda", "cuda", "cuda"),
        "dual_cross_entropy": ("cuda", "cuda", "cuda", "cuda"),
        "proto_fit": ("cuda", "cuda", "cuda", "cuda"),
        "orthogonality": ("cuda", "reference", "cuda", "reference"),
    },
}


def fastest(gpu: str, op: str, classes: int) -> str:
    """Name of the back end of `op` for this number of classes."""
    measured = FASTEST.get(gpu, {}).get(op)
    return measured[sum(classes > most for most in RANGES)] if measured else "reference"
