"""Builds the CUDA kernels for the processor: the same sources, with the cuda_runtime.h of this folder."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


def load(folder: Path) -> ModuleType:
    """The module of launchers, from `folder` if it was built there from these very sources."""
    units = [HERE / "module.cpp", CSRC / "cuda/bindings.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    headers = [CSRC / "row_math.h", *sorted((CSRC / "cuda").glob("*.h")), *HERE.glob("*.h")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*units, *headers))).hexdigest()[:16]
    built = folder / f"{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not built.exists():
        paths = [HERE, CSRC, pybind11.get_include(), sysconfig.get_path("include")]
        subprocess.run(
            ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared",
             "-fvisibility=hidden", *(f"-I{path}" for path in paths), "-o", built, *units[:2], "-xc++", *units[2:]],
            check=True,
        )  # fmt: skip
    spec = importlib.util.spec_from_file_location("emulated", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
