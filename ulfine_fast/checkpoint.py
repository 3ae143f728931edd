"""Checkpoints that are either whole or absent, and that say when they do not fit the run.

One safetensors file holds everything: tensors as tensors, the rest as JSON in its metadata, and a digest of
both. It is written beside its place and renamed onto it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 3
CHECKPOINT = "checkpoint.safetensors"  # its name in the folder of a run


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or belongs to another run."""


class Terminated(SystemExit):
    """SIGTERM asked the process to end; its code is 143."""


def stop(number: int, frame: FrameType | None = None) -> NoReturn:
    """Raise what stands for a signal: KeyboardInterrupt for SIGINT, Terminated for SIGTERM. A signal handler, too."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(128 + number)


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM within the block go into a list instead; after the first one they act at once again.

    So a loop can end between two steps, where what it holds is whole. Only the main thread of a process can do
    that: in another one the list stays empty. A signal that is ignored stays so.
    """
    caught: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # None: not set by Python, which could not set it back
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; at the end of the block it is renamed onto `path`.

    Whoever reads `path` finds the old content or the new, never a part. If the block raises, `path` is
    untouched and the temporary file is gone; an OSError names `path`. A process that is killed leaves it: see
    `temporaries`.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # no other process has this file, and no link leads elsewhere
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb") as file:
            # the rename may reach the disk before the data does
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"{path}: expected to write it, got: {error.strerror or error}") from error
    finally:
        # without the folder there is no such file, and a place that cannot be written has none either
        with suppress(OSError):
            temporary.unlink()


def temporaries(path: Path) -> list[Path]:
    """The temporary files of all processes that write `path`, or were killed while they did."""
    name = re.compile(rf"\.{re.escape(path.stem)}\.[0-9a-f]+{re.escape(path.suffix)}")
    return [other for other in path.parent.iterdir() if name.fullmatch(other.name)]


def digest(tensor: Tensor) -> str:
    """16 hexadecimal digits that stand for shape, dtype and content of `tensor`."""
    import torch

    state = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=8)
    state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write named tensors and a JSON record to `path`, atomically."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(record, allow_nan=False)
    metadata = {"format": str(FORMAT), "record": text, "digest": digest_of(tensors, text)}
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def load_checkpoint(
    path: Path, identity: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of `path`.

    CheckpointError, naming the file, if it is damaged or of another format, or if a field of `identity` is not the
    same in the record.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if metadata.get("digest") != digest_of(tensors, metadata.get("record", "")):
            raise CheckpointError(f"{path}: damaged checkpoint: its digest does not fit its content")
    except (SafetensorError, UnicodeDecodeError) as cause:
        raise CheckpointError(f"{path}: damaged checkpoint: {cause}") from cause
    if metadata["format"] != str(FORMAT):
        raise CheckpointError(
            f"{path}: expected checkpoint format {FORMAT}, got {metadata['format']}, of another version"
        )
    record = json.loads(metadata["record"])
    difference = first_difference({name: record.get(name) for name in identity or ()}, identity or {})
    if difference:
        raise CheckpointError(f"{path} belongs to another run: {difference}")
    return tensors, record


def first_difference(saved: Any, now: Any, name: str = "") -> str | None:
    """Dotted name of the first field in which two nested records differ, with both values; None if equal."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in [*now, *(key for key in saved if key not in now)]:
            dotted = f"{name}.{key}" if name else key
            found = first_difference(saved.get(key), now.get(key), dotted)
            if found:
                return found
        return None
    return None if saved == now else f"{name}: expected {saved!r}, got {now!r}"


def digest_of(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """32 hexadecimal digits that stand for named tensors and a text."""
    names = "".join(f"{name}={digest(tensors[name])};" for name in sorted(tensors))
    return hashlib.blake2b((names + text).encode(), digest_size=16).hexdigest()
