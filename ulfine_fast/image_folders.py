"""An image set from folders of images, one folder for each class."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ulfine_fast.image_data import UNKNOWN, ImageData, ImageFile, data_of_files
from ulfine_fast.images import MAX_PIXELS

# fmt: off
EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2",
})
# fmt: on


def folder_data(
    labelled: Path, unlabelled: Path | None, test: Path, *, max_pixels: int = MAX_PIXELS
) -> ImageData:
    """An image set from folders.

    labelled, test: one folder for each class, with its images at any depth; "sea_lion" is the class "sea lion".
    Classes are in order of folder name. unlabelled: images at any depth, or None; a file that is in `labelled`
    too counts as a copy of it. Where every unlabelled image lies in a folder with the name of a class, that
    class is kept as `unlabelled_truth`, for reports only. max_pixels: as `images.ImageFiles`.

    Files and folders whose name begins with a dot are ignored; a folder reached through links is read once.
    Raises OSError for a folder that cannot be read, ValueError where no class folder has an image and where
    `unlabelled` has none, for an image with two classes, and for what `ImageData` refuses.
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
        part: [ImageFile(*file, index[name]) for name in names for file in by_class[part].get(name, [])]
        for part in by_class
    }
    unlabelled_folders = {} if unlabelled is None else _first_level("unlabelled", unlabelled, notes)
    if unlabelled is not None and not any(unlabelled_folders.values()):
        raise ValueError(f"folder_data: unlabelled must have images, got none in {unlabelled}")
    known = all(name in index for name, found in unlabelled_folders.items() if found)
    if known and unlabelled_folders:
        notes.append(
            "unlabelled: the folders are those of classes; they are used in reports only, never in training"
        )
    files["unlabelled"] = [
        ImageFile(*file, index[name] if known else UNKNOWN)
        for name, found in unlabelled_folders.items()
        for file in found
    ]
    return data_of_files("folder_data", files, names, notes, max_pixels)


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
