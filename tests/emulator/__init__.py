"""Builds the CUDA kernels for the processor: the same sources, with the cuda_runtime.h of this folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
HEADERS = [CSRC / "row_math.h", *sorted((CSRC / "cuda").glob("*.h")), *sorted(HERE.glob("*.h"))]

FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden"]
# Fortified, longjmp() refuses to change stacks.
FLAGS += ["-U_FORTIFY_SOURCE"]


def build(folder: Path, *units: Path) -> Path:
    """A shared library of `units` in `folder`, made again only when one of the sources has changed."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*units, *HEADERS))).hexdigest()[:16]
    library = folder / f"{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        paths = [HERE, CSRC, pybind11.get_include(), sysconfig.get_path("include")]
        # Tests that run beside this one may build it too: whole files alone get the name.
        part = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            ["g++", *FLAGS, *(f"-I{path}" for path in paths), "-o", part, "-xc++", *units],
            check=True,
        )
        part.replace(library)
    return library


def load(folder: Path) -> ModuleType:
    """The module of all launchers."""
    library = build(folder, HERE / "module.cpp", CSRC / "cuda/bindings.cpp", *KERNELS)
    spec = importlib.util.spec_from_file_location("emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
