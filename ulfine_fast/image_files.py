"""Image sets of one's own: folders of classes, tables of paths, and the list files of the long-tailed field.

A class that only the test images have stays a class, without labelled images; one that only the labelled images
have stays too. What a builder leaves out or finds odd is in the `notes` of its `ImageData`.
"""

from __future__ import annotations

import csv
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ulfine_fast.images import MAX_PIXELS, UNKNOWN, ImageData, ImageFiles, ReadReport, shortened
from ulfine_fast.splits import first_per_class

# fmt: off
EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2",
})
# fmt: on
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


class _File(NamedTuple):
    """An image file: its path as the user knows it, the path behind all links, its class, where it is listed."""

    path: str
    real: str
    label: int
    place: str = ""


class _Row(NamedTuple):
    """A row of a table, and where it is."""

    place: str
    path: str
    label: str
    split: str


def folder_data(
    labelled: Path, unlabelled: Path | None, test: Path, *, max_pixels: int = MAX_PIXELS
) -> ImageData:
    """An image set from folders.

    labelled, test: one folder for each class, with its images at any depth; "sea_lion" is the class "sea lion".
    Classes are in order of folder name. unlabelled: images at any depth, or None; a file that is in `labelled`
    too counts as a copy of it. Where every unlabelled image lies in a folder with the name of a class, that
    class is kept as `unlabelled_truth`, for reports only. max_pixels: as `images.ImageFiles`.

    Files and folders whose name begins with a dot are ignored; a folder reached through links is read once.
    Raises OSError for a folder that cannot be read, ValueError where no class folder has an image, for an image
    with two classes, and for what `ImageData` refuses.
    """
    notes: list[str] = []
    by_class = {}
    for part, folder in (("labelled", labelled), ("test", test)):
        by_class[part] = _first_level(part, folder, notes)
        stray = by_class[part].pop("", [])
        if stray:
            notes.append(f"{part}: skipped {len(stray)} images outside a class folder, such as {stray[0][0]}")
        if not any(by_class[part].values()):
            raise ValueError(f"folder_data: {part} must have class folders with images, got none in {folder}")
    names = sorted({*by_class["labelled"], *by_class["test"]})
    index = {name: k for k, name in enumerate(names)}
    files = {
        part: [_File(*file, index[name]) for name in names for file in by_class[part].get(name, [])]
        for part in by_class
    }
    unlabelled_folders = {} if unlabelled is None else _first_level("unlabelled", unlabelled, notes)
    known = all(name in index for name, found in unlabelled_folders.items() if found)
    if known and any(unlabelled_folders.values()):
        notes.append(
            "unlabelled: the folders are those of classes; they are used in reports only, never in training"
        )
    files["unlabelled"] = [
        _File(*file, index[name] if known else UNKNOWN)
        for name, found in unlabelled_folders.items()
        for file in found
    ]
    return _image_data("folder_data", files, names, notes, max_pixels)


def table_data(path: Path, root: Path | None = None, *, max_pixels: int = MAX_PIXELS) -> ImageData:
    """An image set from a table, .csv, .tsv (both UTF-8, with a header) or .parquet.

    Columns, in any order beside any others: "path", relative to `root` (default: the table's folder) or absolute;
    "label", a class by name or number; "split", one of `SPLITS`, in any case. A training row without a label is
    unlabelled. The label of an unlabelled row is for reports only. An image may stand once under training and
    once under unlabelled: it is then a labelled image that the unlabelled part has too. Classes are in order of
    name, or of number where all labels are numbers. max_pixels: as `images.ImageFiles`.

    Raises ValueError, with line and column, for a table that breaks these rules; ImportError when pyarrow is
    missing for a .parquet file.
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
    names = sorted(labels, key=int if numbers else str)
    index = {name: k for k, name in enumerate(names)}
    notes = _nameless() if numbers else []
    strange = sorted({row.label for row in rows["unlabelled"] if row.label} - labels)
    if strange:
        notes.append(
            f"unlabelled: only unlabelled images have the labels {shortened(strange)}; they are ignored"
        )
    files = {
        part: [_listed(root, row.path, index.get(row.label, UNKNOWN), row.place) for row in found]
        for part, found in rows.items()
    }
    return _image_data("table_data", files, names, notes, max_pixels)


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
    classes = 1 + max((file.label for part in files.values() for file in part), default=-1)
    names, notes = [str(k) for k in range(classes)], _nameless()
    if class_names is not None:
        names, notes = read_class_names(class_names), []
        if len(names) < classes:
            raise ValueError(f"{class_names}: expected {classes} class names, got {len(names)}")
    labels = np.array([file.label for file in files["unlabelled"]], dtype=np.int64)
    # 0.07 * 100 comes out above 7, and ceil() would then take an eighth image
    counts = np.ceil(np.round(labelled_share * np.bincount(labels, minlength=len(names)), 9))
    files["labelled"] = [files["unlabelled"][row] for row in first_per_class(labels, counts)]
    return _image_data("list_data", files, names, notes, max_pixels)


def read_class_names(path: Path) -> list[str]:
    """Class names from a UTF-8 text file, one for each line; empty lines at the end are dropped."""
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]


def _image_data(
    function: str, files: dict[str, list[_File]], names: Sequence[str], notes: list[str], max_pixels: int
) -> ImageData:
    """`files` by part: "labelled", "unlabelled", "test" and perhaps "validation"."""
    notes, names = list(notes), [name.replace("_", " ") for name in names]
    distinct: dict[str, dict[str, _File]] = {}
    for part, found in files.items():
        kept: dict[str, _File] = {}
        for file in found:
            first = kept.setdefault(file.real, file)
            if first.label != file.label:
                places = " and ".join(filter(None, (first.place, file.place))) or first.path
                raise ValueError(
                    f"{function}: {part} must give an image one class, got two for {file.path} ({places})"
                )
        if len(kept) < len(found):
            notes.append(f"{part}: {len(found) - len(kept)} images are listed twice and used once")
        if found and not Path(found[0].path).is_file():
            raise ValueError(f"{function}: {part} must name image files, got {found[0].path}, which is none")
        distinct[part] = kept

    labelled, unlabelled, test = (distinct[part] for part in ("labelled", "unlabelled", "test"))
    train = list({**unlabelled, **labelled}.values())
    row = {file.real: index for index, file in enumerate(train)}
    for part in ("test", "validation"):
        leaked = [file.path for real, file in distinct.get(part, {}).items() if real in row]
        if leaked:
            notes.append(f"{part}: {len(leaked)} images are training images too: {shortened(leaked, 3)}")
    for part in ("labelled", "test"):
        present = {file.label for file in distinct[part].values()}
        absent = [name for k, name in enumerate(names) if k not in present]
        if absent:
            notes.append(f"{part}: no image of {len(absent)} classes: {shortened(absent)}")

    report = ReadReport()

    def source(part: Sequence[_File]) -> ImageFiles:
        return ImageFiles([file.path for file in part], max_pixels=max_pixels, report=report)

    def labels(part: dict[str, _File]) -> np.ndarray:
        return np.array([file.label for file in part.values()], dtype=np.int64)

    validation = distinct.get("validation")
    return ImageData(
        train=source(train),
        labelled=np.array([row[real] for real in labelled], dtype=np.int64),
        labels=labels(labelled),
        unlabelled=np.array([row[real] for real in unlabelled], dtype=np.int64),
        unlabelled_truth=labels(unlabelled),
        test=source(list(test.values())),
        test_labels=labels(test),
        class_names=tuple(names),
        validation=source(list(validation.values())) if validation else None,
        validation_labels=labels(validation) if validation else None,
        notes=tuple(notes),
        report=report,
    )


def _nameless() -> list[str]:
    return ["classes are called by their number; text prototypes need names"]


def _first_level(part: str, folder: Path, notes: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Image files (path, real path) by the folder of `folder` that they are in; "": directly in `folder`."""
    skipped: Counter[str] = Counter()
    found: dict[str, list[tuple[str, str]]] = {"": []}
    try:
        for entry in _entries(str(folder), os.path.realpath(folder)):
            if entry.is_folder:
                # one name may be written with composed and with combining characters
                name = unicodedata.normalize("NFC", entry.name)
                found.setdefault(name, []).extend(_images_below(entry, set(), skipped))
            elif entry.is_image(skipped):
                found[""].append((entry.path, entry.real))
    except OSError as error:
        raise OSError(
            f"folder_data: {part} must be a readable folder, got {error.filename}: {error.strerror}"
        ) from error
    if skipped:
        kinds = ", ".join(f"{extension} {count}" for extension, count in sorted(skipped.items()))
        notes.append(
            f"{part}: skipped {skipped.total()} files that are no images by their extension ({kinds})"
        )
    return found


class _Entry(NamedTuple):
    """A file or folder: its path, and the path behind all links."""

    name: str
    path: str
    real: str
    is_folder: bool
    is_file: bool

    def is_image(self, skipped: Counter[str]) -> bool:
        extension = os.path.splitext(self.name)[1].lower()  # noqa: PTH122 (a Path for each file is slow)
        if self.is_file and extension in EXTENSIONS:
            return True
        skipped[(extension or "without") if self.is_file else "dead link"] += 1
        return False


def _entries(folder: str, real_folder: str) -> Iterator[_Entry]:
    """What is in a folder, in order of name, without what is hidden."""
    with os.scandir(folder) as listed:
        entries = sorted(listed, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
            yield _Entry(entry.name, entry.path, real, Path(real).is_dir(), Path(real).is_file())
        else:
            real = f"{real_folder}/{entry.name}"
            yield _Entry(entry.name, entry.path, real, entry.is_dir(), entry.is_file())


def _images_below(folder: _Entry, seen: set[str], skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    # a link may lead back up
    if folder.real in seen:
        return
    seen.add(folder.real)
    for entry in _entries(folder.path, folder.real):
        if entry.is_folder:
            yield from _images_below(entry, seen, skipped)
        elif entry.is_image(skipped):
            yield entry.path, entry.real


def _listed(root: Path, path: str, label: int, place: str) -> _File:
    full = os.path.normpath(os.path.join(root, path))  # noqa: PTH118 (a Path for each file is slow)
    return _File(full, full, label, place)


def _read_list(path: Path, root: Path) -> list[_File]:
    files = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip():
            image, _, label = line.strip().rpartition(" ")
            if not image or not label.isdecimal():
                raise ValueError(f"{path}, line {number}: expected a path and a class number, got {line!r}")
            files.append(_listed(root, image.strip(), int(label), f"{path.name}, line {number}"))
    return files


def _table_rows(path: Path) -> Iterator[_Row]:
    readers: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, str]]]]] = {
        ".csv": lambda path: _text_rows(path, ","),
        ".tsv": lambda path: _text_rows(path, "\t"),
        ".parquet": _parquet_rows,
    }
    if path.suffix.lower() not in readers:
        raise ValueError(f"table_data: path must end in one of {', '.join(readers)}, got {path}")
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
        values = ("" if value is None else str(value) for value in row)
        yield f"row {number}", dict(zip(_COLUMNS, values, strict=True))


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    missing = [column for column in _COLUMNS if column not in columns]
    if missing:
        raise ValueError(
            f"{path}: expected the columns {', '.join(_COLUMNS)}, got {', '.join(columns) or 'none'}"
        )
