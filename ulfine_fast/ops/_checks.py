"""One wording for every argument error of the public ops: what was expected, what came."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

# Of a whole number that float64 holds, whatever it is.
LARGEST_BITS = 1023
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def tensor(op: str, name: str, value: Tensor) -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def of_dtype(op: str, name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless the tensor `value` is of one of `dtypes`."""
    if value.dtype not in dtypes:
        *most, last = map(_dtype, dtypes)
        wanted = f"{', '.join(most)} or {last}" if most else last
        raise TypeError(f"{op}: {name} must be {wanted}, got {_dtype(value.dtype)}")


def matrix(op: str, name: str, value: Tensor, rows: int | None = None, columns: int | None = None) -> None:
    """Raise unless `value` is a floating [rows, columns] matrix (None: any size)."""
    tensor(op, name, value)
    fits = value.ndim == 2 and rows in (None, value.shape[0]) and columns in (None, value.shape[1])
    if not fits:
        want = f"[{'any' if rows is None else rows}, {'any' if columns is None else columns}]"
        raise ValueError(f"{op}: {name} must be {want}, got {_shape(value)}")
    of_dtype(op, name, value, FLOATS)


def vector(op: str, name: str, value: Tensor, size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless `value` is [size] of one of `dtypes`."""
    tensor(op, name, value)
    if value.ndim != 1 or value.shape[0] != size:
        raise ValueError(f"{op}: {name} must be [{size}], got {_shape(value)}")
    of_dtype(op, name, value, dtypes)


def mark(op: str, name: str, value: Tensor) -> None:
    """Raise unless `value` is a [] bool tensor."""
    tensor(op, name, value)
    if value.ndim:
        raise ValueError(f"{op}: {name} must be [], got {_shape(value)}")
    of_dtype(op, name, value, (torch.bool,))


def bank(op: str, name: str, value: Tensor, columns: int | None = None) -> None:
    """Raise unless `value` is a floating [C, columns] bank with C >= 1."""
    matrix(op, name, value, columns=columns)
    if value.shape[0] == 0:
        raise ValueError(f"{op}: {name} must have at least one class, got {_shape(value)}")


def same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise unless every tensor lies where `first` lies."""
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like the rest, got {other.device}")


def labels(op: str, name: str, value: Tensor, size: int, classes: int) -> None:
    """Raise unless `value` is [size] int64 below `classes`; negative means unlabelled and is accepted.

    The values are read only on the CPU outside torch.compile: on a GPU that read would stall the stream,
    and a label that is too large is then treated as unlabelled.
    """
    vector(op, name, value, size, (torch.int64,))
    if size and value.device.type == "cpu" and not torch.compiler.is_compiling():
        largest = int(value.max())
        if largest >= classes:
            row = int(value.argmax())
            raise ValueError(f"{op}: {name} must be below {classes} classes, got {largest} at row {row}")


def number(op: str, name: str, value: float) -> None:
    """Raise unless `value` is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        raise ValueError(f"{op}: {name} must fit float64, got a whole number of {value.bit_length()} bits")


def whole(op: str, name: str, value: int) -> None:
    """Raise unless `value` is a whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{op}: {name} must be a whole number, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{op}: {name} must be at least 0, got {value}")


def flag(op: str, **values: bool) -> None:
    """Raise unless every value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")


def between(op: str, name: str, value: float, low: float, high: float) -> None:
    """Raise unless low <= value <= high (NaN never fits)."""
    number(op, name, value)
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be in [{low:g}, {high:g}], got {value:g}")


def positive(op: str, name: str, value: float) -> None:
    """Raise unless value is a finite number above zero."""
    number(op, name, value)
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{op}: {name} must be a finite number above 0, got {value:g}")


def not_negative(op: str, **values: float) -> None:
    """Raise unless every value is a finite number of at least zero."""
    for name, value in values.items():
        number(op, name, value)
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{op}: {name} must be a finite number of at least 0, got {value:g}")


def branches(op: str, eta: float, **scales: float) -> None:
    """Raise unless `eta` is in [0, 1] and every scale is a finite number above zero."""
    between(op, "eta", eta, 0.0, 1.0)
    for name, value in scales.items():
        positive(op, name, value)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
