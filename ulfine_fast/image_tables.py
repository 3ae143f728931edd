"""Image sets from tables of paths and from the list files of the long-tailed field."""

from __future__ import annotations

import csv
import io
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ulfine_fast.image_data import (
    NUMBERED,
    UNKNOWN,
    ImageData,
    ImageFile,
    class_name,
    data_of_files,
    shortened,
)
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

# What stands for no label: of scikit-learn and USB; of pandas, numpy, R, SQL and Excel.
MISSING = frozenset({"-1", "nan", "NaN", "None", "<NA>", "NaT", "NA", "N/A", "#N/A", "null", "NULL"})

_COLUMNS = ("path", "label", "split")


class _Row(NamedTuple):
    """A row of a table, and where it is."""

    place: str
    path: str
    label: str
    split: str


def table_data(path: Path, root: Path | None = None, *, max_pixels: int = MAX_PIXELS) -> ImageData:
    """An image set from a table, .csv, .tsv (both UTF-8, with a header and one of , ; tab between columns) or .parquet.

    Columns, in any order beside any others: "path", relative to `root` (default: the table's folder) or absolute;
    "label", a class by name (see `class_name`) or number (1.0 is 1); "split", one of `SPLITS`, in any case. A training
    row without a label, or with one of `MISSING`, is unlabelled. The label of an unlabelled row is for reports only.
    Two paths to one file, by a link or in another form of Unicode, are one image. An image may stand once under
    training and once under unlabelled: it is then a labelled image that the unlabelled part has too. Classes are in
    order of name, or of number where all labels are numbers. max_pixels: as `images.ImageFiles`.

    Raises FileNotFoundError without a table, ValueError, with line and column, for one that breaks these rules;
    ImportError when pyarrow is missing for a .parquet file.
    """
    root = path.parent if root is None else root
    rows: dict[str, list[_Row]] = {"labelled": [], "unlabelled": [], "test": [], "validation": []}
    missing: Counter[str] = Counter()
    for row in _table_rows(path):
        if not row.path:
            raise ValueError(f"{path}, {row.place}, column path: expected a path, got nothing")
        split = SPLITS.get(row.split.lower())
        if split is None:
            raise ValueError(
                f"{path}, {row.place}, column split: expected one of {', '.join(SPLITS)}, got {row.split!r}"
            )
        label = _label(row.label)
        if not label and split not in ("train", "unlabelled"):
            raise ValueError(
                f"{path}, {row.place}, column label: expected a class, got {row.label or 'nothing'}"
            )
        if split == "train":
            split = "labelled" if label else "unlabelled"
            if row.label and not label:
                missing[row.label] += 1
        rows[split].append(row._replace(label=label))

    labels = {row.label for part in ("labelled", "test", "validation") for row in rows[part]}
    numbers = all(label.isdecimal() for label in labels)
    names = sorted(labels, key=lambda label: (int(label) if numbers else 0, label))
    index = {name: k for k, name in enumerate(names)}
    notes = [NUMBERED] if numbers else []
    if missing:
        notes.append(
            f"{missing.total()} training rows are unlabelled: their label is {shortened([*missing])}"
        )
    strange = sorted({row.label for row in rows["unlabelled"] if row.label} - labels)
    if strange:
        notes.append(
            f"unlabelled: only unlabelled images have the labels {shortened(strange)}; they are ignored"
        )
    below = _Below(root)
    files = {
        part: [below.file(row.path, index.get(row.label, UNKNOWN), row.place) for row in found]
        for part, found in rows.items()
    }
    return data_of_files(files, names, notes, max_pixels)


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
        raise ValueError(f"labelled_share must be in (0, 1], got {labelled_share}")
    below = _Below(root)
    files = {"unlabelled": _read_list(train_list, below), "test": _read_list(test_list, below)}
    if validation_list is not None:
        files["validation"] = _read_list(validation_list, below)
    found = [file.label for part in files.values() for file in part]
    classes = 1 + max(found, default=-1)
    if classes > len(found):
        raise ValueError(f"labels must be in 0..C-1, got {classes - 1} among {len(found)} images")
    names, notes = [str(k) for k in range(classes)], [NUMBERED]
    if class_names is not None:
        names, notes = read_class_names(class_names), []
        if len(names) < classes:
            raise ValueError(f"{class_names}: expected {classes} class names, got {len(names)}")
    labels = np.array([file.label for file in files["unlabelled"]], dtype=np.int64)
    # 0.07 * 100 comes out above 7, and ceil() would then take an eighth image
    counts = np.ceil(np.round(labelled_share * np.bincount(labels, minlength=len(names)), 9))
    files["labelled"] = [files["unlabelled"][row] for row in first_per_class(labels, counts)]
    return data_of_files(files, names, notes, max_pixels)


def read_class_names(path: Path) -> list[str]:
    """Class names (see `class_name`) from a UTF-8 text file, one for each line; empty lines at the end are dropped.

    Raises ValueError, with the line, for an empty one before the end and for other text than UTF-8.
    """
    names = [class_name(line) for line in _lines(path)]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        raise ValueError(f"{path}, line {names.index('') + 1}: expected a class name, got nothing")
    return names


class _Below:
    """Finds the files that paths from `root` lead to, looking behind the links of a folder once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[str, str] = {}

    # a Path for each file is slow
    def file(self, path: str, label: int, place: str) -> ImageFile:
        full = os.path.join(self._root, path)  # noqa: PTH118
        # behind a link the folder above is another one
        if ".." not in full:
            full = os.path.normpath(full)
        folder, name = os.path.split(full)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        real = f"{self._folders[folder]}/{name}"
        try:
            if stat.S_ISLNK(os.lstat(real).st_mode):
                real = os.path.realpath(real)
        except OSError:
            for form in ("NFC", "NFD"):
                other = unicodedata.normalize(form, path)
                if other != path and os.path.lexists(os.path.join(self._root, other)):  # noqa: PTH118
                    return self.file(other, label, place)
        return ImageFile(full, real, label, place)


def _label(text: str) -> str:
    """The class name behind a label; empty where it stands for none."""
    # whole numbers beside missing ones are often stored as floating point
    text = re.sub(r"^(-?\d+)\.0+$", r"\1", text)
    return "" if text in MISSING else class_name(text)


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}, line {line}: expected UTF-8 text, got the byte 0x{content[error.start]:02x}"
        ) from error


def _lines(path: Path) -> list[str]:
    # not splitlines, which cuts at characters that a name may have
    return re.split(r"\r\n|\r|\n", _text(path))


def _read_list(path: Path, below: _Below) -> list[ImageFile]:
    files = []
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            *image, label = line.rsplit(maxsplit=1)
            if not image or not label.isdecimal():
                raise ValueError(f"{path}, line {number}: expected a path and a class number, got {line!r}")
            files.append(below.file(image[0], int(label), f"{path.name}, line {number}"))
    return files


def _table_rows(path: Path) -> Iterator[_Row]:
    readers: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, str]]]]] = {
        ".csv": _text_rows,
        ".tsv": _text_rows,
        ".parquet": _parquet_rows,
    }
    if path.suffix.lower() not in readers:
        raise ValueError(f"table must end in one of {', '.join(readers)}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"table must be a file, got {path}")
    for place, row in readers[path.suffix.lower()](path):
        yield _Row(place, *(row[column].strip() for column in _COLUMNS))


def _text_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    text = _text(path)
    header = text.partition("\n")[0]
    # spreadsheets write semicolons where the comma is the decimal point
    fitting = (mark for mark in ",;\t" if {*_COLUMNS} <= {name.strip('"\r') for name in header.split(mark)})
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=next(fitting, ","), strict=True)
    try:
        _check_columns(path, reader.fieldnames or [])
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, {place}: expected {len(reader.fieldnames)} columns, got another number"
                )
            yield place, row
    except csv.Error as error:
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
    for number, values in enumerate(zip(*(table[column] for column in _COLUMNS), strict=True), start=1):
        row = dict(zip(_COLUMNS, values, strict=True))
        for column, value in row.items():
            if not isinstance(value, (str, int, float, type(None))):
                raise ValueError(
                    f"{path}, row {number}, column {column}: expected text or a number, got {type(value).__name__}"
                )
        yield f"row {number}", {c: "" if v is None or v != v else str(v) for c, v in row.items()}


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    missing = [column for column in _COLUMNS if column not in columns]
    if missing:
        raise ValueError(
            f"{path}: expected the columns {', '.join(_COLUMNS)}, got {', '.join(columns) or 'none'}"
        )
