"""One wording for every argument error of the public ops: what was expected, what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def matrix(op: str, name: str, tensor: Tensor, rows: int | None = None, columns: int | None = None) -> None:
    """Raise unless `tensor` is a floating [rows, columns] matrix (None: any size)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    fits = tensor.ndim == 2 and rows in (None, tensor.shape[0]) and columns in (None, tensor.shape[1])
    if not fits:
        want = f"[{'any' if rows is None else rows}, {'any' if columns is None else columns}]"
        raise ValueError(f"{op}: {name} must be {want}, got {_shape(tensor)}")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {_dtype(tensor.dtype)}"
        )


def vector(op: str, name: str, tensor: Tensor, size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless `tensor` is [size] of one of `dtypes`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.ndim != 1 or tensor.shape[0] != size:
        raise ValueError(f"{op}: {name} must be [{size}], got {_shape(tensor)}")
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"{op}: {name} must be {' or '.join(map(_dtype, dtypes))}, got {_dtype(tensor.dtype)}"
        )


def bank(op: str, name: str, tensor: Tensor, features: Tensor) -> None:
    """Raise unless `tensor` is a [C, D] bank with C >= 1 that fits `features` [B, D]."""
    matrix(op, name, tensor, columns=features.shape[1])
    if tensor.shape[0] == 0:
        raise ValueError(f"{op}: {name} must have at least one class, got {_shape(tensor)}")


def same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise unless every tensor lies where `first` lies."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like the rest, got {tensor.device}")


def labels(op: str, name: str, tensor: Tensor, size: int, classes: int) -> None:
    """Raise unless `tensor` is [size] int64 below `classes`; negative means unlabelled and is accepted.

    The values are read only on the CPU outside torch.compile: on a GPU that read would stall the stream,
    and a label that is too large is then treated as unlabelled.
    """
    vector(op, name, tensor, size, (torch.int64,))
    if size and tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        largest = int(tensor.max())
        if largest >= classes:
            row = int(tensor.argmax())
            raise ValueError(f"{op}: {name} must be below {classes} classes, got {largest} at row {row}")


def between(op: str, name: str, value: float, low: float, high: float) -> None:
    """Raise unless low <= value <= high (NaN never fits)."""
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be in [{low:g}, {high:g}], got {value:g}")


def positive(op: str, name: str, value: float) -> None:
    """Raise unless value is a finite number above zero."""
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{op}: {name} must be a finite number above 0, got {value:g}")


def branches(op: str, eta: float, **scales: float) -> None:
    """Raise unless `eta` is in [0, 1] and every scale is a finite number above zero."""
    between(op, "eta", eta, 0.0, 1.0)
    for name, value in scales.items():
        positive(op, name, value)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
