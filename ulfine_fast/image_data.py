"""An image set for training: which images are labelled, which are not, and what the user must be told about it."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ulfine_fast.images import ImageFiles, ImageSource, ReadReport, printable

UNKNOWN = -1
NUMBERED = "classes are called by their number; text prototypes need names"


# eq=False: comparing arrays gives an array, which has no truth value.
@dataclass(frozen=True, eq=False)
class ImageData:
    """A long-tailed, partly labelled image set; C is the number of classes.

    train: all training images. labelled [n_l >= 1] int64: rows of `train`, each once; labels [n_l] int64 in 0..C-1.
    unlabelled [n_u] int64: rows of `train`, each once, possibly labelled ones too (ACR's protocol).
    unlabelled_truth [n_u] int64: their classes where known, else -1; for reports only, never for training. test,
    test_labels [n_t >= 1] int64; validation, validation_labels: the same, or both None. class_names: C >= 2
    non-empty names, the same for two classes where these are told apart by their number. notes: what the user must
    be told about the data, one line each. report: what reading met so far; the sources write into it.

    Raises ValueError when a field breaks this contract.
    """

    train: ImageSource
    labelled: np.ndarray
    labels: np.ndarray
    unlabelled: np.ndarray
    unlabelled_truth: np.ndarray
    test: ImageSource
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    validation: ImageSource | None = None
    validation_labels: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    report: ReadReport = field(default_factory=ReadReport)

    def __post_init__(self) -> None:
        names = self.class_names
        if len(names) < 2:
            raise ValueError(f"classes must be at least two, got {shortened(names)}")
        for number, name in enumerate(names):
            if not name.strip():
                raise ValueError(f"class names must not be empty, got {name!r} for class {number}")
        rows, classes = len(self.train), len(names)
        self._check("labelled", self.labelled, None, 0, rows)
        self._check("labels", self.labels, len(self.labelled), 0, classes)
        self._check("unlabelled", self.unlabelled, None, 0, rows)
        self._check("unlabelled_truth", self.unlabelled_truth, len(self.unlabelled), UNKNOWN, classes)
        self._check("test_labels", self.test_labels, len(self.test), 0, classes)
        for name in ("labelled", "unlabelled"):
            if len(np.unique(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"ImageData: {name} must have every row once, got some twice")
        for name in ("labelled", "test"):
            if not len(getattr(self, name)):
                raise ValueError(f"{name} must have at least one image, got none")
        if (self.validation is None) != (self.validation_labels is None):
            raise ValueError("ImageData: validation and validation_labels must be both given or both None")
        if self.validation is not None:
            self._check("validation_labels", self.validation_labels, len(self.validation), 0, classes)

    @property
    def labelled_counts(self) -> np.ndarray:
        """[C] int64: labelled images of each class."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    @property
    def unlabelled_is_labelled(self) -> np.ndarray:
        """[n_u] bool: that image is a labelled one too."""
        return np.isin(self.unlabelled, self.labelled)

    @property
    def unlabelled_counts(self) -> np.ndarray | None:
        """[C] int64: unlabelled images of each class without the labelled ones; None if a truth is unknown."""
        truth = self.unlabelled_truth[~self.unlabelled_is_labelled]
        return None if (truth == UNKNOWN).any() else np.bincount(truth, minlength=len(self.class_names))

    @property
    def identity(self) -> str:
        """32 hexadecimal digits that stand for class names, rows, labels and the names of all images.

        What all image names begin with does not count, so that a moved folder keeps its identity; nor does
        the content of the files. A validation set does not count: it trains nothing.
        """
        digest = hashlib.blake2b(digest_size=16)
        images = [source.name(row) for source in (self.train, self.test) for row in range(len(source))]
        # by character, not by folder: absolute and relative paths may stand side by side
        shared = len(os.path.commonprefix(images))  # noqa: RUF071
        for text in (*self.class_names, *(image[shared:] for image in images)):
            digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
        for rows in (self.labelled, self.labels, self.unlabelled, self.test_labels):
            digest.update(np.int64(len(rows)).tobytes() + np.ascontiguousarray(rows, dtype="<i8").tobytes())
        return digest.hexdigest()

    def _check(self, name: str, values: np.ndarray, length: int | None, low: int, end: int) -> None:
        if not isinstance(values, np.ndarray) or values.dtype != np.int64 or values.ndim != 1:
            got = (
                f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
            )
            raise ValueError(f"ImageData: {name} must be a numpy array of int64 in one dimension, got {got}")
        if length is not None and len(values) != length:
            raise ValueError(f"ImageData: {name} must be of length {length}, got {len(values)}")
        if len(values) and not low <= values.min() <= values.max() < end:
            raise ValueError(
                f"ImageData: {name} must be in {low}..{end - 1}, got {values.min()}..{values.max()}"
            )


class ImageFile(NamedTuple):
    """A file of an image set.

    path: as the user knows it. real: the same for two paths to one file. label: class, or UNKNOWN. place: where it
    is listed, for messages ("line 7"), or "".
    """

    path: str
    real: str
    label: int
    place: str = ""


def data_of_files(
    files: Mapping[str, Sequence[ImageFile]],
    class_names: Sequence[str],
    notes: Sequence[str],
    max_pixels: int,
) -> ImageData:
    """The image set of `files`, by part: "labelled", "unlabelled", "test" and perhaps "validation".

    class_names: as `class_name` gives them. Notes are added on files that are listed twice, test images that are
    training images, names of several classes, and classes without images. Raises ValueError for a file with two
    classes and for a part whose first file is not there.
    """
    notes = [*notes, *repeated_names(class_names)]
    distinct: dict[str, dict[str, ImageFile]] = {}
    with_class: dict[str, ImageFile] = {}
    for part, found in files.items():
        kept: dict[str, ImageFile] = {}
        for file in found:
            kept.setdefault(file.real, file)
            if file.label == UNKNOWN:
                continue
            first = with_class.setdefault(file.real, file)
            if first.label != file.label:
                one, other = (f"{class_names[f.label]} ({f.place or f.path})" for f in (first, file))
                raise ValueError(
                    f"{part}: an image must have one class, got {one} and {other} for {file.path}"
                )
        if len(kept) < len(found):
            notes.append(f"{part}: {len(found) - len(kept)} images are listed twice and used once")
        # what is there and no image is left out when it is read
        if found and not Path(found[0].path).exists():
            raise ValueError(f"{part} must name image files, got {found[0].path}, which is not there")
        distinct[part] = kept

    labelled, unlabelled, test = (distinct[part] for part in ("labelled", "unlabelled", "test"))
    train = list({**unlabelled, **labelled}.values())
    row = {file.real: index for index, file in enumerate(train)}
    for part in ("test", "validation"):
        leaked = [file.path for real, file in distinct.get(part, {}).items() if real in row]
        if leaked:
            notes.append(f"{part}: {len(leaked)} images are training images too: {shortened(leaked, 3)}")

    report = ReadReport()

    def source(part: Sequence[ImageFile]) -> ImageFiles:
        return ImageFiles([file.path for file in part], max_pixels=max_pixels, report=report)

    def labels(part: dict[str, ImageFile]) -> np.ndarray:
        return np.array([file.label for file in part.values()], dtype=np.int64)

    validation = distinct.get("validation")
    for part in ("labelled", "test"):
        notes += absent_classes(part, labels(distinct[part]), class_names)
    return ImageData(
        train=source(train),
        labelled=np.array([row[real] for real in labelled], dtype=np.int64),
        labels=labels(labelled),
        unlabelled=np.array([row[real] for real in unlabelled], dtype=np.int64),
        unlabelled_truth=labels(unlabelled),
        test=source(list(test.values())),
        test_labels=labels(test),
        class_names=tuple(class_names),
        validation=source(list(validation.values())) if validation else None,
        validation_labels=labels(validation) if validation else None,
        notes=tuple(notes),
        report=report,
    )


def class_name(text: str) -> str:
    """The name of the class that a folder, a table or a list calls `text`.

    In the composed form of Unicode, with a space for an underscore, `printable`: ways to write one name that look
    alike are one name.
    """
    return printable(unicodedata.normalize("NFC", text).replace("_", " ")).strip() or printable(text)


def repeated_names(class_names: Sequence[str]) -> list[str]:
    """A note, or none, on the names that several classes have."""
    numbers = defaultdict(list)
    for number, name in enumerate(class_names):
        numbers[name].append(str(number))
    repeated = [f"{name} ({', '.join(found)})" for name, found in numbers.items() if len(found) > 1]
    if not repeated:
        return []
    return [f"classes: several have one name and are told apart by number: {shortened(repeated)}"]


def absent_classes(part: str, labels: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """A note, or none, on the classes that `labels` [n] of that part of a data set do not have."""
    counts = np.bincount(labels, minlength=len(class_names))
    absent = [class_names[k] for k in np.flatnonzero(counts == 0)]
    return [f"{part}: no image of {len(absent)} classes: {shortened(absent)}"] if absent else []


def shortened(names: Sequence[str], count: int = 5) -> str:
    """The first `count` names in one `printable` line, and how many more there are; "none" for no name."""
    more = f", ... ({len(names)} in all)" if len(names) > count else ""
    return (printable(", ".join(names[:count])) or "none") + more
