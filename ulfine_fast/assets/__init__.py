"""Data files of the package. LICENSES.md holds their notices, build_assets.py made them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

SHA256 = {
    "fashion_mnist_subset.npz": "cfa849e272fd0718b4861b6d3e7a1a4ed91f15fe1422fa25f46bc46b2d6ef716",
    "lite_clip_text.npz": "40610809e6fd3ae2ebb02506a4c724d4ee4a4aad5804a08aa1ddbdcca63dfb44",
}


@lru_cache
def asset(name: str) -> Path:
    """Path of the data file `name`, checked against its sha256 once per process.

    Raises ValueError for an unknown name, and for a file that is missing or not the one this version was made
    with.
    """
    if name not in SHA256:
        raise ValueError(f"asset: name must be one of {', '.join(SHA256)}, got {name!r}")
    return verified(Path(str(files(__package__).joinpath(name))), SHA256[name])


def verified(path: Path, sha256: str) -> Path:
    """`path` itself, when its content has the sha256 (hex) of the file that this version was made with.

    Raises ValueError for a missing file or another content.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a data file, got nothing; reinstall its package")
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != sha256:
        raise ValueError(f"{path}: expected sha256 {sha256}, got {got}; reinstall its package")
    return path
