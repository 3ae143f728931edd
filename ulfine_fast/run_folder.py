"""The folder of a run: whose it is, and whether a run may begin or go on in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulfine_fast.checkpoint import CHECKPOINT, first_difference, load_checkpoint
from ulfine_fast.report import write_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, EVALUATION = "config.json", "evaluation.json"


def check_claim(run_dir: Path, configuration: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Raise unless `run_dir` may become, or is, the folder of `configuration`."""
    if run_dir.exists() and not run_dir.is_dir():
        raise FileExistsError(f"{run_dir}: expected a run folder or none, got a file")
    check_writable(run_dir)
    if overwrite:
        # what is there may be damaged: it is not read
        return
    if (run_dir / CONFIG).exists():
        difference = first_difference(read_configuration(run_dir), configuration)
        if difference:
            raise FileExistsError(
                f"{run_dir} holds another run: {difference}\nchoose another --out, or --overwrite it"
            )
    elif resume:
        raise FileNotFoundError(f"--resume: expected a run in {run_dir}, got no {CONFIG}")
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise FileExistsError(f"{run_dir}: expected a run folder or an empty one, got something else")


@contextmanager
def claim(run_dir: Path, configuration: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """Make `run_dir` the folder of `configuration`; checkpoint and evaluation stay only to be resumed.

    An error within the block that comes before the first checkpoint leaves the folder to any other run.
    """
    new = not (run_dir / CONFIG).exists()
    if not resume:
        for name in (CHECKPOINT, EVALUATION):
            (run_dir / name).unlink(missing_ok=True)
    write_json(run_dir / CONFIG, configuration)
    try:
        yield
    except Exception:
        if new and not (run_dir / CHECKPOINT).exists():
            (run_dir / CONFIG).unlink(missing_ok=True)
            # what else is there stays
            with suppress(OSError):
                run_dir.rmdir()
        raise


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
    missing = {"images" if "images" in configuration else "data", "name", "method", "schedule"} - set(
        configuration
    )
    if missing:
        raise ValueError(f"{path}: expected {', '.join(sorted(missing))}, got none")
    return configuration


def load_run(run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of the checkpoint in `run_dir`; FileNotFoundError where there is none yet."""
    if not (run_dir / CHECKPOINT).exists():
        raise FileNotFoundError(f"{run_dir}: expected {CHECKPOINT}, got none; finish the run with --resume")
    return load_checkpoint(run_dir / CHECKPOINT)


def check_writable(folder: Path) -> None:
    """Raise early, before minutes of work, where `folder` cannot be written or made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise PermissionError(
            f"{folder}: expected a folder that can be written, got {there} without that right"
        )
