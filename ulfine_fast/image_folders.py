"""An image set from folders of images, one folder for each class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ulfine_fast.image_data import UNKNOWN, ImageData, ImageFile, class_name, data_of_files, shortened
from ulfine_fast.images import FORMATS, MAX_PIXELS, printable

# fmt: off
EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2",
})
# fmt: on
# What archives and file systems put beside the folders of people: of macOS, Synology, ext4 and Windows.
_OF_THE_SYSTEM = frozenset(
    {"__macosx", "@eadir", "#recycle", "lost+found", "$recycle.bin", "system volume information"}
)
# What every run leaves beside its pictures, which are no data.
_OF_A_RUN = frozenset({"metrics.json", "predictions.csv"})


def folder_data(
    labelled: Path,
    unlabelled: Path | None,
    test: Path,
    *,
    classes: Iterable[str] = (),
    max_pixels: int = MAX_PIXELS,
) -> ImageData:
    """An image set from folders.

    labelled, test: one folder for each class, with its images at any depth; "sea_lion" is the class "sea lion",
    see `class_name`. A folder without an image in any part is no class. Classes are in order of name. unlabelled:
    images at any depth, or None; a file that is in `labelled` too counts as a copy of it. Where every unlabelled
    image lies in a folder with the name of a class, that class is kept as `unlabelled_truth`, for reports only.
    classes: names of further classes, which need no image. max_pixels: as `images.ImageFiles`.

    Files and folders whose name begins with a dot are ignored, and so are folders of the system (`__MACOSX`,
    `lost+found`) and, below the given ones, those of runs; a folder reached through links is read once. Raises
    OSError for a folder that cannot be read, ValueError where no class folder has an image and where `unlabelled`
    has none, for an image with two classes, and for what `ImageData` refuses.
    """
    notes: list[str] = []
    by_class = {
        part: _first_level(part, folder, notes)
        for part, folder in (("labelled", labelled), ("test", test), ("unlabelled", unlabelled))
        if folder is not None
    }
    in_folders = by_class.pop("unlabelled", {})
    for part, folder in (("labelled", labelled), ("test", test)):
        stray = by_class[part].pop("", [])
        if stray:
            outside = shortened([path for path, _ in stray], 1)
            notes.append(f"{part}: skipped {len(stray)} images outside a class folder: {outside}")
        if not any(by_class[part].values()):
            raise ValueError(_lacks(f"{part} must have class folders with images", folder, notes))
    if unlabelled is not None and not any(in_folders.values()):
        raise ValueError(_lacks("unlabelled must have images", unlabelled, notes))
    folders = {*by_class["labelled"], *by_class["test"]}
    with_images = (
        name for name in folders if any(found.get(name) for found in (*by_class.values(), in_folders))
    )
    names = sorted({*classes, *with_images})
    empty = sorted(folders.difference(names))
    if empty:
        notes.append(f"no image in any part, so no class: {shortened(empty)}")
    index = {name: k for k, name in enumerate(names)}
    files = {
        part: [ImageFile(*file, index[name]) for name in names for file in by_class[part].get(name, [])]
        for part in by_class
    }
    known = all(name in index for name, found in in_folders.items() if found)
    if known and in_folders:
        notes.append(
            "unlabelled: the folders are those of classes; they are used in reports only, never in training"
        )
    files["unlabelled"] = [
        ImageFile(*file, index[name] if known else UNKNOWN)
        for name, found in in_folders.items()
        for file in found
    ]
    return data_of_files(files, names, notes, max_pixels)


def _lacks(expected: str, folder: Path, notes: list[str]) -> str:
    return "; ".join([f"{expected}, got none in {folder}", *notes])


def _first_level(part: str, folder: Path, notes: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Image files (path, real path) by the class name of the folder that they are in; "": directly in `folder`."""
    skipped: Counter[str] = Counter()
    found: dict[str, list[tuple[str, str]]] = {"": []}
    folders: Counter[str] = Counter()
    try:
        for entry in _entries(str(folder), os.path.realpath(folder)):
            if entry.is_folder:
                name = class_name(entry.name)
                folders[name] += 1
                found.setdefault(name, []).extend(_images_below(entry, set(), skipped))
            elif entry.is_image(skipped):
                found[""].append((entry.path, entry.real))
    except OSError as error:
        raise OSError(f"{part} must be a readable folder, got {error.filename}: {error.strerror}") from error
    if skipped:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(skipped.items()))
        notes.append(
            f"{part}: skipped {skipped.total()} files, by name no images in {', '.join(FORMATS)}: {kinds}"
        )
    several = [name for name, count in folders.items() if count > 1]
    if several:
        notes.append(f"{part}: several folders are one class: {shortened(several)}")
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
        if self.is_file:
            kind = printable(extension) or "without extension"
        else:
            kind = "no regular file" if Path(self.path).exists() else "dead link"
        skipped[kind] += 1
        return False


def _entries(folder: str, real_folder: str) -> Iterator[_Entry]:
    """What is in a folder, in order of name, without what is hidden or of the system."""
    with os.scandir(folder) as listed:
        entries = sorted(listed, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith(".") or entry.name.casefold() in _OF_THE_SYSTEM:
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
    entries = list(_entries(folder.path, folder.real))
    if {entry.name for entry in entries} >= _OF_A_RUN:
        skipped["folder of a run"] += 1
        return
    for entry in entries:
        if entry.is_folder:
            yield from _images_below(entry, seen, skipped)
        elif entry.is_image(skipped):
            yield entry.path, entry.real
