"""The CPU kernels on processors that this machine is not, in qemu: without AVX, and of ARM."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pybind11
import pytest

from ulfine_fast import _C

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
# The extension alone: torch would take minutes to load.
OLD = """
import importlib.util, sys
from array import array

spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
row, logit = array("f", range(1, 66)), array("f", [0])
scratch = array("f", bytes(4 * _C.proto_logits_scratch(1, 1, 65, 1)))
x, out, memory = (numbers.buffer_info()[0] for numbers in (row, logit, scratch))
_C.proto_logits(x, x, out, memory, 1, 1, 65, 3.0, 1)
print(_C.isa(), round(logit[0], 5))
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"needs {name}")


def test_a_processor_without_avx_runs_the_baseline() -> None:
    command = sys.executable, "-P", "-c", OLD, _C.__file__
    assert run(tool("qemu-x86_64"), "-cpu", "Nehalem", *command) == "baseline 3.0\n"


def computed(folder: Path, compiler: str, *emulator: str) -> np.ndarray:
    """What the baseline kernels give, built by `compiler` and run by `emulator`."""
    environment = os.environ | {
        "CXX": compiler,
        # cmake and ninja lie beside the interpreter of a virtual environment that is not activated
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    options = "-DCMAKE_BUILD_TYPE=Release", "-DULFINE_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"
    configure = "cmake", "-S", CSRC.parent, "-B", folder, "-G", "Ninja", *options
    run(*configure, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", env=environment)
    run("cmake", "--build", folder, "--target", "cpu_baseline", env=environment)
    units = TESTS / "portability.cpp", CSRC / "cpu/dispatch.cpp", *folder.rglob("cpu_baseline.dir/**/*.o")
    run(compiler, "-std=c++17", "-fopenmp", "-static", f"-I{CSRC}", *units, "-o", folder / "run")
    return np.array(run(*emulator, folder / "run").split(), dtype=np.float64)


def test_arm_computes_the_same(tmp_path: Path) -> None:
    compiler, emulator = tool("aarch64-linux-gnu-g++"), tool("qemu-aarch64")
    here, there = computed(tmp_path / "here", tool("g++")), computed(tmp_path / "there", compiler, emulator)
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-5)
