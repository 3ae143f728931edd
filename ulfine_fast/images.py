"""Where images come from: files or arrays that give RGB pictures.

A file is read strictly. What is damaged raises `UnreadableImage` and is never filled in; what is unusual (CMYK, 16
bits, transparency, several frames, EXIF orientation) is converted by one documented rule and counted in a
`ReadReport`. Where the machine fails and not the file (a broken mount, too many open files, no memory), reading is
tried again and then raises `MachineError`. Several threads may read from one source. From the first file read,
warnings raised inside Pillow are ignored in the whole process: what they say is in the report or in the error.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import os
import re
import stat
import threading
import time
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from itertools import accumulate, islice
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

# Pillow's other formats include some that run programs (EPS) or are no pictures.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
# More than any image of so many pixels needs, however it is stored.
MAX_BYTES = 1 << 30

# One image of more octets, or of more pixels after a reduced decoding, is worked on at a time.
_LARGE_BYTES = 1 << 26
_LARGE_PIXELS = 1 << 24
_one_large = threading.RLock()
# What opening raises for a path that leads to no image. Any other number is an error of the machine.
_OF_THE_PATH = frozenset({
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EILSEQ, errno.ENXIO, errno.ENODEV, errno.EINVAL, errno.EOPNOTSUPP,
})  # fmt: skip
_PAUSES = (0.1, 0.5, 2.0)  # seconds between two attempts

_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_filter_lock = threading.Lock()
# control characters, line and paragraph separators, and what Python makes of bytes that are not UTF-8
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):  # noqa: N818 (it names an image, not a mistake)
    """An image cannot be had: its `name` in the source and the `reason`, one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class MachineError(OSError):
    """An image could not be read, again and again, for a reason that does not lie in its file."""


class ImageSource(Protocol):
    """Images by index 0..len - 1."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """What to call the image when talking to the user: its path, or "cifar10/train[17]"."""

    def read(self, index: int, at_least: int | None = None) -> Image.Image:
        """The image in mode RGB, upright.

        at_least: a picture whose short side has at least that many pixels will do, so the source may decode
        it at a reduced size; None: full size. The same arguments always give the same pixels. Raises
        UnreadableImage.
        """

    def stamp(self, index: int) -> str:
        """A text that changes when the image does, had without decoding it."""


class ReadReport:
    """Counts the images that could not be read or were converted, each once for a reason. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unreadable: dict[str, set[str]] = {}
        self._converted: dict[str, set[str]] = {}

    def add_unreadable(self, name: str, reason: str) -> None:
        """Note that the image `name` cannot be read, for `reason`."""
        with self._lock:
            self._unreadable.setdefault(reason, set()).add(name)

    def add_converted(self, name: str, conversions: Iterable[str]) -> None:
        """Note what was done to the image `name`."""
        with self._lock:
            for conversion in conversions:
                self._converted.setdefault(conversion, set()).add(name)

    def record(self) -> dict[str, dict[str, list[str]]]:
        """All names by reason and by conversion, as JSON can write them."""
        with self._lock:
            return {
                "unreadable": {reason: sorted(names) for reason, names in self._unreadable.items()},
                "converted": {conversion: sorted(names) for conversion, names in self._converted.items()},
            }

    def add(self, record: Mapping[str, Mapping[str, Iterable[str]]]) -> None:
        """Note everything in the `record` of another report."""
        with self._lock:
            for mine, theirs in ((self._unreadable, "unreadable"), (self._converted, "converted")):
                for reason, names in record[theirs].items():
                    mine.setdefault(reason, set()).update(names)

    def unreadable(self) -> dict[str, int]:
        """Number of unreadable images by reason."""
        return self._counts(self._unreadable)

    def converted(self) -> dict[str, int]:
        """Number of converted images by conversion; an image may count under several."""
        return self._counts(self._converted)

    def names(self, reason: str, count: int = 3) -> list[str]:
        """The first `count` images, in order of name, noted for a reason or conversion; [] if none is."""
        with self._lock:
            return heapq.nsmallest(count, self._unreadable.get(reason) or self._converted.get(reason, ()))

    def summary(self) -> str:
        """One line for the end of a run; empty when nothing was noted."""
        parts = []
        for kind, counts in (("unreadable", self.unreadable()), ("converted", self.converted())):
            reasons = [
                f"{count} {reason} ({', '.join(self.names(reason))}{', ...' if count > 3 else ''})"
                for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            ]
            parts += [f"{kind} images: {', '.join(reasons)}"] if reasons else []
        return "; ".join(parts)

    def _counts(self, images: dict[str, set[str]]) -> dict[str, int]:
        with self._lock:
            return {reason: len(names) for reason, names in images.items()}


class ImageFiles:
    """Image files in the formats of `FORMATS`, an `ImageSource` whose names are the paths, made `printable`.

    Conversions, each counted in `report`: alpha and transparent colours lie over white; 16-bit grey keeps its
    high byte; of several frames the first is taken; the EXIF orientation is applied; CMYK and 1-bit pixels go
    to RGB by Pillow's formula; ICC profiles are ignored. Grey and palettes of 8 bits lose nothing in RGB. A JPEG
    file is decoded at 1/2, 1/4 or 1/8 where `at_least` allows it. What is no regular file, such as a pipe, is
    unreadable and not waited for.

    max_pixels: a larger image is unreadable; default `MAX_PIXELS`, above which Pillow warns, and at most twice
    that, above which Pillow refuses. A file of more than `MAX_BYTES` is unreadable too. Raises ValueError outside
    that range, and where Pillow was told to fill in what truncated files lack.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        max_pixels: int = MAX_PIXELS,
        report: ReadReport | None = None,
    ) -> None:
        if not 1 <= max_pixels <= 2 * MAX_PIXELS:
            raise ValueError(f"ImageFiles: max_pixels must be in 1..{2 * MAX_PIXELS}, got {max_pixels}")
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError("ImageFiles: PIL.ImageFile.LOAD_TRUNCATED_IMAGES must be False, got True")
        self._paths = [os.fspath(path) for path in paths]
        self._max_pixels = max_pixels
        self.report = ReadReport() if report is None else report

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The path, made `printable`."""
        return printable(self._paths[index])

    def read(self, index: int, at_least: int | None = None) -> Image.Image:
        """The image in mode RGB, see `ImageSource.read`. MachineError after four attempts in three seconds."""
        path, name = self._paths[index], self.name(index)
        _ignore_pillow_warnings()
        pauses = iter(_PAUSES)
        while True:
            try:
                image, conversions = _picture(path, at_least, self._max_pixels)
            # a damaged file can make a decoder raise anything
            except Exception as error:
                cause = _failure_of_the_machine(error)
                if cause is None:
                    reason = _reason(error)
                    self.report.add_unreadable(name, reason)
                    raise UnreadableImage(name, reason) from error
                pause = next(pauses, None)
                if pause is None:
                    raise MachineError(
                        f"{name}: expected to read it, got {cause} in {1 + len(_PAUSES)} attempts, an error of the"
                        " machine and not of the file"
                    ) from error
                time.sleep(pause)
            else:
                self.report.add_converted(name, conversions)
                return image

    def stamp(self, index: int) -> str:
        """Size and time of change of the file and whether it may be read, or why there is none.

        MachineError where that cannot be known.
        """
        path = self._paths[index]
        try:
            status = Path(path).stat()
        except OSError as error:
            cause = _failure_of_the_machine(error)
            if cause is None:
                return _reason(error)
            raise MachineError(f"{self.name(index)}: expected its size and time, got {cause}") from error
        return f"{status.st_size} {status.st_mtime_ns} {os.access(path, os.R_OK)}"


class ImageArray:
    """Images of one size in memory or in a memory-mapped file, an `ImageSource`.

    images: uint8 [N, H, W] (grey) or [N, H, W, 3] (RGB). name: image i is called "name[i]". invert: give
    255 - x, for light items on dark. Raises ValueError for another array.
    """

    def __init__(self, images: np.ndarray, name: str, invert: bool = False) -> None:
        check_pixels(f"ImageArray {name}", images)
        self._images = images
        self._name = name
        self._invert = invert

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """For example "cifar10/train[17]"."""
        return f"{self._name}[{index}]"

    def read(self, index: int, at_least: int | None = None) -> Image.Image:
        """The image in mode RGB and full size."""
        pixels = self._images[index]
        return Image.fromarray(255 - pixels if self._invert else pixels).convert("RGB")

    def stamp(self, index: int) -> str:
        """A hash of the pixels."""
        pixels = self._images[index]
        digest = hashlib.blake2b(f"{pixels.shape} {self._invert}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(pixels))
        return digest.hexdigest()


class GivenImages:
    """Paths and PIL pictures as a caller hands them over, an `ImageSource` that holds a few of them at a time.

    Image i is called "images[i]", and a file by its path. It can be read once, after the range that it is in was drawn
    from `batches`; conversions are those of `ImageFiles`.
    """

    def __init__(self, images: Iterable[str | os.PathLike[str] | Image.Image]) -> None:
        self._images = enumerate(images)
        self._drawn: dict[int, str | os.PathLike[str] | Image.Image] = {}

    def __len__(self) -> int:
        raise TypeError("GivenImages: their number is not known before they are drawn")

    def batches(self, size: int) -> Iterator[range]:
        """The indices of the images, `size` at a time; TypeError for what is neither a path nor a picture."""
        while drawn := dict(islice(self._images, size)):
            for image in drawn.values():
                if not isinstance(image, (str, os.PathLike, Image.Image)):
                    raise TypeError(f"images must be paths or PIL images, got {type(image).__name__}")
            self._drawn |= drawn
            yield range(min(drawn), max(drawn) + 1)

    def name(self, index: int) -> str:
        """For example "images[17]"."""
        return f"images[{index}]"

    def read(self, index: int, at_least: int | None = None) -> Image.Image:
        """The image in mode RGB, see `ImageSource.read`."""
        image = self._drawn.pop(index)
        if not isinstance(image, Image.Image):
            return ImageFiles([image]).read(0, at_least)
        try:
            return _upright(image)[0]
        # a file that was opened and not yet read can make a decoder raise anything
        except Exception as error:
            cause = _failure_of_the_machine(error)
            if cause is not None:
                raise MachineError(f"{self.name(index)}: expected to read it, got {cause}") from error
            raise UnreadableImage(self.name(index), _reason(error)) from error


def check_pixels(who: str, images: np.ndarray) -> None:
    """ValueError that begins with `who` unless `images` is uint8 [N, H, W] (grey) or [N, H, W, 3] (RGB)."""
    shape = images.shape
    if images.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
        raise ValueError(f"{who}: images must be uint8 [N, H, W] or [N, H, W, 3], got {images.dtype} {shape}")


def printable(text: str) -> str:
    r"""`text` in one line that every file and terminal takes: what would break it is escaped, a line feed as "\n".

    Escaped are control characters, line and paragraph separators, and the bytes of a file name that is not UTF-8
    ("\xff").
    """
    return _UNPRINTABLE.sub(lambda found: _escaped(found[0]), text)


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()


class JoinedImages:
    """Several sources one after the other, an `ImageSource`."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self._sources = tuple(sources)
        self._ends = list(accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        """The name that the image has in its own source."""
        source, row = self._at(index)
        return source.name(row)

    def read(self, index: int, at_least: int | None = None) -> Image.Image:
        """The image in mode RGB, see `ImageSource.read`."""
        source, row = self._at(index)
        return source.read(row, at_least)

    def stamp(self, index: int) -> str:
        """The stamp in the image's own source."""
        source, row = self._at(index)
        return source.stamp(row)

    def _at(self, index: int) -> tuple[ImageSource, int]:
        source = bisect_right(self._ends, index)
        return self._sources[source], index - (self._ends[source - 1] if source else 0)


class ChosenImages:
    """Some rows of a source, an `ImageSource`. rows [n] int: image i here is image rows[i] there."""

    def __init__(self, source: ImageSource, rows: np.ndarray) -> None:
        self._source = source
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """The name that the image has in the whole source."""
        return self._source.name(int(self._rows[index]))

    def read(self, index: int, at_least: int | None = None) -> Image.Image:
        """The image in mode RGB, see `ImageSource.read`."""
        return self._source.read(int(self._rows[index]), at_least)

    def stamp(self, index: int) -> str:
        """The stamp in the whole source."""
        return self._source.stamp(int(self._rows[index]))


def _ignore_pillow_warnings() -> None:
    # warnings.catch_warnings is not for threads: the first reader to leave would undo what the others set
    with _filter_lock:
        if _PILLOW_WARNINGS not in warnings.filters:
            warnings.filterwarnings("ignore", module=r"PIL\.")


def _picture(path: str, at_least: int | None, max_pixels: int) -> tuple[Image.Image, list[str]]:
    # without waiting for whoever would write into a pipe
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        with _one_at_a_time(large=status.st_size > _LARGE_BYTES):
            # all of it before the decoder begins: what fails later is its content
            content = file.read()
            if not content:
                raise ValueError("empty file")
            return _decode(content, at_least, max_pixels)


def _one_at_a_time(*, large: bool) -> AbstractContextManager[object]:
    """Threads that decode large images together could fill any memory."""
    return _one_large if large else nullcontext()


def _decode(content: bytes, at_least: int | None, max_pixels: int) -> tuple[Image.Image, list[str]]:
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"more than {max_pixels} pixels")
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        with _one_at_a_time(large=image.width * image.height > _LARGE_PIXELS):
            return _upright(image)


def _upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """The picture of an opened file in mode RGB, and what was done to it."""
    conversions = []
    if getattr(image, "is_animated", False):
        conversions.append("first of several frames")
    if "icc_profile" in image.info:
        conversions.append("ICC profile ignored")
    # some plugins turn the image themselves when it is loaded, and then there is no orientation left
    image.load()
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 (damaged tags can raise anything, and the pixels are whole)
        turn = None
        conversions.append("damaged EXIF ignored")
    # 16 and 32 bits: Pillow's own conversion cuts off at 255
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if not 0 <= values.min() <= values.max() < 2**16:
            raise ValueError(f"pixels of mode {image.mode} outside 0..65535")
        picture = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
        conversions.append("16-bit grey")
    elif image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    elif image.has_transparency_data:
        picture = image.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        conversions.append("alpha over white")
    else:
        picture = image.convert("RGB")
        if image.mode not in ("RGB", "L", "P"):
            conversions.append(f"mode {image.mode}")
    if turn is not None:
        picture = picture.transpose(turn)
        conversions.append("EXIF orientation")
    return picture, conversions


def _failure_of_the_machine(error: Exception) -> str | None:
    """What failed on the machine, or None where the file is to blame."""
    if isinstance(error, MemoryError):
        return "no memory"
    if isinstance(error, OSError) and error.errno is not None and error.errno not in _OF_THE_PATH:
        return error.strerror
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # numbers in parentheses would make every file a reason of its own, and so would the address of a buffer
    text = re.sub(r" *\([^()]*\)| at 0x[0-9a-f]+", "", " ".join(str(error).split()))
    return text or type(error).__name__
