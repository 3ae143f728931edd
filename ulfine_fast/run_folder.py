"""The folder of a run: whose it is, and whether a run may begin or go on in it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulfine_fast.checkpoint import (
    CHECKPOINT,
    CheckpointError,
    first_difference,
    load_checkpoint,
    replacing,
    temporaries,
)
from ulfine_fast.config import kept_when_continued
from ulfine_fast.report import PICTURES, write_json

if TYPE_CHECKING:
    from torch import Tensor

LOGGER = logging.getLogger(__name__)
CONFIG, EVALUATION, METRICS = "config.json", "evaluation.json", "metrics.json"
REPORTS = (METRICS, "predictions.csv", *PICTURES)
LOCK = ".lock"
# Where images and weights lie; what they are is in the identity of a checkpoint.
PLACES = {
    "images": (
        "labelled", "unlabelled", "test", "table", "root", "train_list", "test_list", "imagenet127", "superclasses",
        "class_names", "features",
    ),
    "encoder": ("model", "pretrained"),
}  # fmt: skip


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Be the one process that writes reports and checkpoints into `folder`, for the length of the block.

    The folder is made if need be, and removed again if it is left empty. What killed processes left half written is
    removed: whoever was to finish it held the folder. The hold of a process ends with it, however it ends. Raises
    FileExistsError, naming the process, where another one holds the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: expected a folder or none, got a file")
    check_writable(folder)
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    lock = _lock(folder)
    try:
        for name in (CHECKPOINT, CONFIG, *REPORTS) if lock is not None else ():
            for path in temporaries(folder / name):
                path.unlink()
        yield
    finally:
        if lock is not None:
            # while it is held: once it is free, the file is another process's
            (folder / LOCK).unlink(missing_ok=True)
            os.close(lock)
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _lock(folder: Path) -> int | None:
    """Descriptor of the lock in `folder`, held until it is closed; None on a file system without locks."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            # a process that left the folder empty has just removed it
            continue
        except PermissionError as error:
            raise PermissionError(
                f"{folder}: expected a folder whose {LOCK} this user may write, got one of another user;"
                " choose another --out"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the process that held it may have removed it since it was opened
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BlockingIOError:
            owner = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            raise FileExistsError(
                f"{folder}: expected a folder that no other run works in, got {owner or 'another process'} at work;"
                " choose another --out, or wait"
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                os.close(descriptor)
                path.unlink()
                LOGGER.warning("%s: this file system has no locks: start no other run in this folder", folder)
                return None
            if error.errno != errno.ENOENT:
                raise
        os.close(descriptor)


@contextmanager
def reserve(run_dir: Path, configuration: dict[str, Any], *, resume: bool, overwrite: bool) -> Iterator[None]:
    """`hold` `run_dir` where it may become, or is, the folder of `configuration`; nothing else is written.

    A run that goes on keeps its method, training and split. It may be longer, report at other steps, and find images
    and weights at another place.
    """
    with hold(run_dir):
        # with `overwrite` it is not read: what is there may be damaged
        if not overwrite:
            _check_claim(run_dir, configuration, resume)
        yield


def _check_claim(run_dir: Path, configuration: dict[str, Any], resume: bool) -> None:
    if (run_dir / CONFIG).exists():
        difference = difference_of_runs(run_dir, configuration, resume=resume)
        if difference:
            raise FileExistsError(
                f"{run_dir} holds another run: {difference}\nchoose another --out, or --overwrite it"
            )
    elif resume:
        raise FileNotFoundError(f"--resume: expected a run in {run_dir}, got no {CONFIG}")
    elif any(path.name != LOCK for path in run_dir.iterdir()):
        raise FileExistsError(f"{run_dir}: expected a run folder or an empty one, got something else")


def difference_of_runs(
    run_dir: Path, configuration: Mapping[str, Any], *, resume: bool = False
) -> str | None:
    """The first field in which the run in `run_dir` has not this configuration, and both values; None: it has.

    resume: only what a run keeps when it goes on.
    """
    kept = _kept if resume else dict
    saved, now = (
        {name: value for name, value in kept(record).items() if name != "began_in"}
        for record in (read_configuration(run_dir), configuration)
    )
    return first_difference(saved, now)


def located(configuration: Mapping[str, Any], at: Sequence[str] = ()) -> dict[str, Any]:
    """`configuration` with the places of its images and weights as they are from here.

    at: NAME=PATH for what was moved. Other relative paths are looked for where the run began. ValueError for a NAME
    that the run has no path by.
    """
    given = dict(text.split("=", 1) for text in at if "=" in text)
    here = dict(configuration)
    for part, names in PLACES.items():
        fields = dict(here.get(part, {}))
        for name in fields.keys() & set(names):
            there = Path(here.get("began_in", "."), fields[name] or "")
            if name in given:
                fields[name] = given.pop(name)
            elif fields[name] is not None and _is_there(name, there):
                fields[name] = str(there)
        if part in here:
            here[part] = fields
    if given or len(at) != sum("=" in text for text in at):
        known = [name for part, names in PLACES.items() if part in here for name in names]
        raise ValueError(
            f"--at: expected NAME=PATH with one of {', '.join(known) or 'none'}, got {', '.join(at)}"
        )
    return here


def _is_there(name: str, path: Path) -> bool:
    """Whether `path` is what a run has by that name: a folder may be called after a model or a tag of weights."""
    if name == "model":
        return (path / "open_clip_config.json").exists()
    return path.is_file() if name == "pretrained" else path.exists()


def _kept(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration a run keeps when it goes on."""
    kept = {**configuration, "training": kept_when_continued(configuration["training"])}
    for part, places in PLACES.items():
        if part in kept:
            kept[part] = {name: value for name, value in kept[part].items() if name not in places}
    return kept


@contextmanager
def claim(run_dir: Path, configuration: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """Make `run_dir`, which is reserved, the folder of `configuration`; checkpoint and evaluation stay only to be resumed.

    A block that ends with an error or a signal before it wrote a checkpoint leaves the folder as it was: to any other
    run, or with the configuration of the checkpoint that is there.
    """
    config, checkpoint = run_dir / CONFIG, run_dir / CHECKPOINT
    before = config.read_bytes() if config.exists() else None
    if not resume:
        for name in (CHECKPOINT, EVALUATION):
            (run_dir / name).unlink(missing_ok=True)
    found = _version(checkpoint)
    write_json(config, configuration)
    try:
        yield
    except BaseException:
        if _version(checkpoint) == found:
            if before is None:
                config.unlink(missing_ok=True)
            elif found is not None:
                with replacing(config) as temporary:
                    temporary.write_bytes(before)
        raise


def _version(path: Path) -> tuple[int, int] | None:
    """What tells whether a file was replaced; None where there is none."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def read_configuration(run_dir: Path) -> dict[str, Any]:
    """What `claim` wrote into `run_dir`; FileNotFoundError or ValueError where it is not there or damaged."""
    path = run_dir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir}: expected the folder of a run, got no {CONFIG} in it")
    try:
        configuration = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    if not isinstance(configuration, dict):
        raise ValueError(f"{path}: expected an object, got {type(configuration).__name__}")
    missing = {"images", "encoder", "name", "method", "training"} - set(configuration)
    if missing:
        raise ValueError(f"{path}: expected {', '.join(sorted(missing))}, got none")
    return configuration


def checkpoint_of(
    run_dir: Path, configuration: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of the checkpoint in `run_dir`; FileNotFoundError where there is none yet.

    CheckpointError where its method or training is not that of `configuration`.
    """
    path = run_dir / CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"{run_dir}: expected {CHECKPOINT}, got none; finish the run with --resume")
    tensors, record = load_checkpoint(path)
    method = dict(configuration["method"])
    if method.get("eta_folds"):
        # the record has the eta that was chosen
        method |= {name: record["method"][name] for name in ("eta", "eta_folds")}
    expected = {"method": method, "training": configuration["training"]}
    # a record has no more than what decides
    now = {part: {name: fields.get(name) for name in record[part]} for part, fields in expected.items()}
    difference = first_difference(now, {part: record[part] for part in expected})
    if difference:
        raise CheckpointError(f"{path}: expected the checkpoint of {CONFIG}, got another one: {difference}")
    return tensors, record


def check_writable(folder: Path) -> None:
    """Raise early, before minutes of work, where `folder` cannot be written or made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise PermissionError(
            f"{folder}: expected a folder that can be written, got {there} without that right"
        )
