"""Image sets from tables of paths and from the list files of the long-tailed field."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ulfine_fast.image_data import NUMBERED, UNKNOWN, ImageData, ImageFile, data_of_files, shortened
from ulfine_fast.images import MAX_PIXELS
from ulfine_fast.splits import first_per_class

SPLITS = {
    "train": "train",
    "training": "train",
    "unlabelled": "unlabelled",
    "unlabeled": "unlabelled",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}

_COLUMNS = ("path", "label", "split")


class _Row(NamedTuple):
    """A row of a table, and where it is."""

    place: str
    path: str
    label: str
    split: str


def table_data(path: Path, root: Path | None = None, *, max_pixels: int = MAX_PIXELS) -> ImageData:
    """An image set from a table, .csv, .tsv (both UTF-8, with a header) or .parquet.

    Columns, in any order beside any others: "path", relative to `root` (default: the table's folder) or absolute;
    "label", a class by name or number; "split", one of `SPLITS`, in any case. A training row without a label is
    unlabelled. The label of an unlabelled row is for reports only. An image may stand once under training and
    once under unlabelled: it is then a labelled image that the unlabelled part has too. Classes are in order of
    name, or of number where all labels are numbers. max_pixels: as `images.ImageFiles`.

    Raises FileNotFoundError without a table, ValueError, with line and column, for one that breaks these rules;
    ImportError when pyarrow is missing for a .parquet file.
    """
    root = path.parent if root is None else root
    rows: dict[str, list[_Row]] = {"labelled": [], "unlabelled": [], "test": [], "validation": []}
    for row in _table_rows(path):
        if not row.path:
            raise ValueError(f"{path}, {row.place}, column path: expected a path, got nothing")
        split = SPLITS.get(row.split.lower())
        if split is None:
            raise ValueError(
                f"{path}, {row.place}, column split: expected one of {', '.join(SPLITS)}, got {row.split!r}"
            )
        if split == "train":
            split = "labelled" if row.label else "unlabelled"
        elif not row.label and split != "unlabelled":
            raise ValueError(f"{path}, {row.place}, column label: expected a class, got nothing")
        rows[split].append(row)

    labels = {row.label for part in ("labelled", "test", "validation") for row in rows[part]}
    numbers = all(label.isdecimal() for label in labels)
    names = sorted(labels, key=lambda label: (int(label) if numbers else 0, label))
    index = {name: k for k, name in enumerate(names)}
    notes = [NUMBERED] if numbers else []
    strange = sorted({row.label for row in rows["unlabelled"] if row.label} - labels)
    if strange:
        notes.append(
            f"unlabelled: only unlabelled images have the labels {shortened(strange)}; they are ignored"
        )
    files = {
        part: [_listed(root, row.path, index.get(row.label, UNKNOWN), row.place) for row in found]
        for part, found in rows.items()
    }
    return data_of_files("table_data", files, names, notes, max_pixels)


def list_data(
    train_list: Path,
    test_list: Path,
    root: Path,
    *,
    labelled_share: float = 0.25,
    validation_list: Path | None = None,
    class_names: Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ImageData:
    """A long-tailed set from list files: ImageNet-LT, Places-LT, iNaturalist 2018.

    A list has a line "path label" for each image, path relative to `root`, label in 0..C-1. Of the n_k training
    images of class k the first ceil(labelled_share n_k) are labelled, and all are unlabelled (source: FineSSL,
    labelled_share 0.25). labelled_share: in (0, 1]. class_names: a file with a line for each class; without it
    classes are called by their number. max_pixels: as `images.ImageFiles`.

    Raises ValueError for a share outside its range, and, with the line, for a list or a file of names that breaks
    these rules.
    """
    if not 0 < labelled_share <= 1:
        raise ValueError(f"list_data: labelled_share must be in (0, 1], got {labelled_share}")
    files = {"unlabelled": _read_list(train_list, root), "test": _read_list(test_list, root)}
    if validation_list is not None:
        files["validation"] = _read_list(validation_list, root)
    found = [file.label for part in files.values() for file in part]
    classes = 1 + max(found, default=-1)
    if classes > len(found):
        raise ValueError(f"list_data: labels must be in 0..C-1, got {classes - 1} among {len(found)} images")
    names, notes = [str(k) for k in range(classes)], [NUMBERED]
    if class_names is not None:
        names, notes = read_class_names(class_names), []
        if len(names) < classes:
            raise ValueError(f"{class_names}: expected {classes} class names, got {len(names)}")
    labels = np.array([file.label for file in files["unlabelled"]], dtype=np.int64)
    # 0.07 * 100 comes out above 7, and ceil() would then take an eighth image
    counts = np.ceil(np.round(labelled_share * np.bincount(labels, minlength=len(names)), 9))
    files["labelled"] = [files["unlabelled"][row] for row in first_per_class(labels, counts)]
    return data_of_files("list_data", files, names, notes, max_pixels)


def read_class_names(path: Path) -> list[str]:
    """Class names from a UTF-8 text file, one for each line; empty lines at the end are dropped."""
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]


def _listed(root: Path, path: str, label: int, place: str) -> ImageFile:
    full = os.path.normpath(os.path.join(root, path))  # noqa: PTH118 (a Path for each file is slow)
    return ImageFile(full, full, label, place)


def _read_list(path: Path, root: Path) -> list[ImageFile]:
    files = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip():
            *image, label = line.rsplit(maxsplit=1)
            if not image or not label.isdecimal():
                raise ValueError(f"{path}, line {number}: expected a path and a class number, got {line!r}")
            files.append(_listed(root, image[0], int(label), f"{path.name}, line {number}"))
    return files


def _table_rows(path: Path) -> Iterator[_Row]:
    readers: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, str]]]]] = {
        ".csv": lambda path: _text_rows(path, ","),
        ".tsv": lambda path: _text_rows(path, "\t"),
        ".parquet": _parquet_rows,
    }
    if path.suffix.lower() not in readers:
        raise ValueError(f"table_data: path must end in one of {', '.join(readers)}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"table_data: path must be a file, got {path}")
    for place, row in readers[path.suffix.lower()](path):
        yield _Row(place, *(row[column].strip() for column in _COLUMNS))


def _text_rows(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            _check_columns(path, reader.fieldnames or [])
            for row in reader:
                place = f"line {reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, {place}: expected {len(reader.fieldnames)} columns, got another number"
                    )
                yield place, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError("pyarrow is missing: pip install 'ulfine-fast[images]'") from error
    try:
        _check_columns(path, parquet.read_schema(path).names)
        table = parquet.read_table(path, columns=list(_COLUMNS)).to_pydict()
    except ArrowInvalid as error:
        raise ValueError(f"{path}: expected a Parquet file, got: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(zip(*(table[column] for column in _COLUMNS), strict=True), start=1):
        yield f"row {number}", dict(zip(_COLUMNS, map(_text, row), strict=True))


def _text(value: object) -> str:
    # whole numbers beside missing ones are often stored as floating point, with NaN for the missing
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    missing = [column for column in _COLUMNS if column not in columns]
    if missing:
        raise ValueError(
            f"{path}: expected the columns {', '.join(_COLUMNS)}, got {', '.join(columns) or 'none'}"
        )
