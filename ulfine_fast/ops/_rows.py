"""Row arithmetic that the references share: the working precision, the direction of a row, sums by class."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

# Squared norm at or below which a row has no direction (algorithm 3.6): it gives logits and gradients of 0.
ZERO_NORM_SQUARED = 1e-12
# The gradient has the cube of an inverse norm, and norms are between 1e-6 and 1e18: times this, about the inverse of
# the norm between them, float32 holds it. A power of two rounds nothing.
TO_MIDDLE = 2.0**-20


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 as soon as one tensor is float64, else float32: half types are storage, never arithmetic."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


def without_autocast(function: Callable) -> Callable:
    """`function` with autocast off on its first argument's device: its products keep the working dtype."""

    @wraps(function)
    def run(*arguments: object, **named: object) -> object:
        first = arguments[0] if arguments else next(iter(named.values()))
        if first.device.type == "meta":  # without arithmetic there is no autocast
            return function(*arguments, **named)
        with torch.autocast(first.device.type, enabled=False):
            return function(*arguments, **named)

    return run


def unit_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows divided by their norm, [N, D] in `dtype`; a zero row stays zero and passes no gradient."""
    rows = rows.to(dtype) * TO_MIDDLE
    squared = rows.square().sum(-1, keepdim=True)
    empty = squared <= ZERO_NORM_SQUARED * TO_MIDDLE**2
    return torch.where(empty, rows.new_zeros(()), rows * squared.masked_fill(empty, 1.0).rsqrt())


def add_by_class_(sums: Tensor, classes: Tensor, rows: Tensor) -> Tensor:
    """Add to row `classes[i]` of `sums` the i-th of `rows`, in an order that is the same in every run."""
    # On a GPU index_add adds in the order in which threads arrive; on a processor index_put may.
    if sums.is_cuda:
        return sums.index_put_((classes,), rows, accumulate=True)
    return sums.index_add_(0, classes, rows)
