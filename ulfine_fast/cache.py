"""Features of augmented images on disk, computed once and mapped into memory.

An entry is a folder named by the hash of all that determines its content: the encoder's fingerprint,
preprocessing, the images, their indices, the view and its seed. It is written under a temporary name beside
its final one and renamed when complete and on disk, so an entry is there whole or not at all. A builder holds
a file lock in its temporary folder; the lock dies with the process, so the next builder can tell a dead one's
remains from a live one's work. Needs a POSIX system (flock).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from tqdm import tqdm

from ulfine_fast.views import CUTOUT_RATIO, VIEWS_VERSION, View, augment

if TYPE_CHECKING:
    from ulfine_fast.encoder import ImageEncoder

CACHE_VARIABLE = "ULFINE_CACHE"
FORMAT_VERSION = 1

_TEMPORARY_PREFIX = ".building-"
_LOCK_NAME = "lock"
# npy header, meta.json and the blocks that folders take
_OVERHEAD_BYTES = 64 * 1024


class CacheError(RuntimeError):
    """A cache entry cannot be used or written; one line says which, why and what to do."""


def default_cache_dir() -> Path:
    """The folder the environment variable ULFINE_CACHE names, else ~/.cache/ulfine-fast.

    A user without a home, as containers have them, gets a folder among the temporary ones. CacheError where that is
    not possible.
    """
    named = os.environ.get(CACHE_VARIABLE, "")
    try:
        return Path(named).expanduser() if named else Path.home() / ".cache" / "ulfine-fast"
    except RuntimeError as error:
        if named:
            raise CacheError(f"{CACHE_VARIABLE}: expected a folder, got {named}: {error}") from error
    try:
        folder = Path(tempfile.gettempdir()) / f"ulfine-fast-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.lstat().st_uid
    except OSError as error:
        raise CacheError(
            f"expected a home folder or one for temporary files, got: {error}; set {CACHE_VARIABLE} to a folder"
        ) from error
    if owner != os.getuid():
        raise CacheError(
            f"{folder}: expected a folder of this user, who has no home, got one of another;"
            f" set {CACHE_VARIABLE} to a folder"
        )
    return folder


def cached_features(
    encoder: ImageEncoder,
    images: np.ndarray,
    *,
    view: View = "plain",
    copies: int = 1,
    seed: int = 0,
    indices: np.ndarray | None = None,
    cutout_ratio: float = CUTOUT_RATIO,
    size: int = 160,
    invert: bool = False,
    cache_dir: Path | str | None = None,
    batch_size: int = 256,
    progress: bool = True,
    refresh: bool = False,
) -> np.memmap:
    """Features of `copies` independent views of every image, read from the cache or computed into it.

    images: uint8 [N, H, W] or [N, H, W, 3], N >= 1. view, seed, indices [N], cutout_ratio: as in
    `views.augment`; copies must be 1 for the plain view, which ignores seed, indices and cutout_ratio. size,
    invert: as the encoder's `encode_images` takes them. cache_dir: default `default_cache_dir()`. batch_size:
    images augmented and encoded at a time; it does not select the entry. progress: show a bar on standard
    error while encoding, if that is a terminal. refresh: compute again and replace the entry, damaged or not.

    Returns a read-only np.memmap, float16 [copies, N, encoder.dim], whose checksum was verified. Raises
    ValueError for an argument outside its range or an encoder whose output breaks its contract, and
    CacheError for a damaged entry, a disk without room or a folder that cannot be written. An interrupted or
    failed call leaves no entry.
    """
    if len(images) == 0:
        raise ValueError("cached_features: expected at least one image, got 0")
    if copies < 1 or (view == "plain" and copies != 1):
        raise ValueError(
            f"cached_features: copies must be >= 1, and 1 for the plain view, got {copies} of {view}"
        )
    if batch_size < 1:
        raise ValueError(f"cached_features: batch_size must be >= 1, got {batch_size}")
    if indices is None:
        indices = np.arange(len(images))
    # checks view, seed, indices and cutout_ratio before anything is written
    augment(images[:1], view, seed, indices=indices[:1], cutout_ratio=cutout_ratio)
    if len(indices) != len(images):
        raise ValueError(f"cached_features: expected {len(images)} indices, got {len(indices)}")

    request = _Request(
        encoder=encoder,
        images=images,
        view=view,
        copies=copies,
        seed=seed,
        indices=np.asarray(indices, dtype=np.int64),
        cutout_ratio=cutout_ratio,
        size=size,
        invert=invert,
    )
    identity = request.identity()
    root = Path(default_cache_dir() if cache_dir is None else cache_dir)
    entry = root / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    if entry.exists() and not refresh:
        return _open(entry, identity)

    try:
        root.mkdir(parents=True, exist_ok=True)
        with _building(root, request.bytes_needed()) as folder:
            bar = tqdm(
                total=copies * len(images),
                desc=f"encoding {view} views",
                unit=" images",
                disable=None if progress else True,
                file=sys.stderr,
            )
            with bar:
                checksum = _write_features(
                    folder / "features.npy", request.shape, request.rows(batch_size), bar
                )
            _write_meta(folder / "meta.json", {**identity, "sha256": checksum})
            _publish(root, folder, entry, replace=refresh)
    except OSError as error:
        raise _explained(error, root, request.bytes_needed()) from error
    return _open(entry, identity)


@dataclass(frozen=True)
class _Request:
    """What to encode: `cached_features`' arguments that determine the content of an entry."""

    encoder: ImageEncoder
    images: np.ndarray
    view: View
    copies: int
    seed: int
    indices: np.ndarray
    cutout_ratio: float
    size: int
    invert: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.copies, len(self.images), self.encoder.dim

    def bytes_needed(self) -> int:
        return math.prod(self.shape) * np.dtype(np.float16).itemsize + _OVERHEAD_BYTES

    def identity(self) -> dict[str, Any]:
        """The JSON object whose hash names the entry; arguments the view ignores are left out."""
        identity: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "encoder": self.encoder.fingerprint,
            "size": int(self.size),
            "invert": bool(self.invert),
            "images": _digest(self.images),
            "view": self.view,
            "shape": [int(length) for length in self.shape],
        }
        if self.view != "plain":
            identity.update(views=VIEWS_VERSION, seed=int(self.seed), indices=_digest(self.indices))
        if self.view == "strong":
            identity["cutout_ratio"] = float(self.cutout_ratio)
        return identity

    def rows(self, batch_size: int) -> Iterator[np.ndarray]:
        """Blocks of float16 rows, one copy of the image set after the other."""
        for copy in range(self.copies):
            for start in range(0, len(self.images), batch_size):
                batch = slice(start, start + batch_size)
                views = augment(
                    self.images[batch],
                    self.view,
                    self.seed,
                    indices=self.indices[batch],
                    copy=copy,
                    cutout_ratio=self.cutout_ratio,
                )
                features = self.encoder.encode_images(views, size=self.size, invert=self.invert)
                # an overflow is an error below, not a warning here
                with np.errstate(over="ignore"):
                    rows = features.cpu().numpy().astype(np.float16)
                expected = (len(views), self.encoder.dim)
                if rows.shape != expected:
                    raise ValueError(
                        f"cached_features: expected features of shape {expected}, got {rows.shape}"
                    )
                if not np.isfinite(rows).all():
                    raise ValueError(
                        f"cached_features: expected features within float16, got {features.abs().max():.3g}"
                    )
                yield rows


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@contextmanager
def _building(root: Path, bytes_needed: int) -> Iterator[Path]:
    """A temporary folder in `root` that this process alone holds; removed unless it was renamed away."""
    folder = _temporary(root)
    try:
        with _locked(root):
            _remove_stale(root)
            if bytes_needed > shutil.disk_usage(root).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            folder.mkdir()
            lock = (folder / _LOCK_NAME).open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX)
        with lock:
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary(root: Path) -> Path:
    return root / f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}"


def _publish(root: Path, folder: Path, entry: Path, *, replace: bool) -> None:
    _sync_folder(folder)
    with _locked(root):
        if entry.exists():
            # another process finished the same entry first
            if not replace:
                return
            discarded = _temporary(root)
            entry.rename(discarded)
            folder.rename(entry)
            shutil.rmtree(discarded, ignore_errors=True)
        else:
            folder.rename(entry)
        (entry / _LOCK_NAME).unlink()
    _sync_folder(root)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the lock of the whole cache: no other process creates, publishes or sweeps meanwhile."""
    with (root / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_stale(root: Path) -> None:
    for folder in root.glob(f"{_TEMPORARY_PREFIX}*"):
        try:
            with (folder / _LOCK_NAME).open("rb+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except (BlockingIOError, PermissionError):
            # its builder lives, or it is another user's to remove
            continue
        except FileNotFoundError:
            # killed while it created the folder or discarded an entry, both under the lock that is held here
            shutil.rmtree(folder, ignore_errors=True)


def _write_features(path: Path, shape: tuple[int, int, int], rows: Iterator[np.ndarray], bar: tqdm) -> str:
    """Write a float16 .npy of `shape` row block by row block; returns the sha256 of the whole file."""
    # written, not memory-mapped: a full disk is an error here and would be SIGBUS there
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": shape}
        )
        file.flush()
        digest = hashlib.sha256(path.read_bytes())
        for block in rows:
            content = block.tobytes()
            file.write(content)
            digest.update(content)
            bar.update(len(block))
        _sync(file)
    return digest.hexdigest()


def _write_meta(path: Path, meta: dict[str, Any]) -> None:
    with path.open("wb") as file:
        file.write(json.dumps(meta, indent=1, sort_keys=True).encode())
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(entry: Path, identity: dict[str, Any]) -> np.memmap:
    path = entry / "features.npy"
    try:
        meta = json.loads((entry / "meta.json").read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(entry / "meta.json", "a readable meta.json", error) from error
    if not isinstance(meta, dict) or {name: meta.get(name) for name in identity} != identity:
        raise _damaged(entry / "meta.json", "the description of this entry", "another")
    try:
        with path.open("rb") as file:
            got = _file_sha256(file)
    except OSError as error:
        raise _damaged(path, "a readable file", error) from error
    if got != meta.get("sha256"):
        raise _damaged(path, f"sha256 {meta.get('sha256')}", got)
    return np.load(path, mmap_mode="r")


def _file_sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _damaged(path: Path, expected: str, got: object) -> CacheError:
    return CacheError(
        f"{path}: expected {expected}, got {got}; delete the folder {path.parent} or pass refresh=True"
    )


def _explained(error: OSError, root: Path, bytes_needed: int) -> CacheError:
    remedy = f"set {CACHE_VARIABLE} to another folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need, have = bytes_needed / 1e6, shutil.disk_usage(root).free / 1e6
        return CacheError(
            f"{root}: expected room for {need:.1f} MB, got {have:.1f} MB free ({error.strerror});"
            f" free some or {remedy}"
        )
    return CacheError(f"{root}: expected a writable folder, got {error}; {remedy}")
