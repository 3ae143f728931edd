"""Builds, tests, checks and times the GPU back ends: python benchmarks/gpu.py [STAGE ...]; `make gpu` calls it.

Stages are build, test, sanitize, determinism and bench; without a name all of them run, in this order. A stage that
fails does not keep the later ones from running, except the build. Nothing is downloaded or installed: CMake builds
the extension for the interpreter that runs this, and build/gpu holds it beside links to the Python files.
SANITIZER=skip leaves sanitize out. BUDGET=seconds is the time of bench, else what the others leave of nine minutes,
five at most.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "gpu"
# What each stage needs beside torch: packages that Python finds, programs on the path.
PACKAGES = {
    "build": ("pybind11",),
    "test": ("pytest", "triton"),
    "sanitize": ("pytest", "triton"),
    "determinism": ("pytest", "triton"),
    "bench": ("pytest", "triton", "matplotlib"),
}
PROGRAMS = {"build": ("cmake", "nvcc"), "sanitize": ("compute-sanitizer",)}
STAGES = tuple(PACKAGES)
# Seconds of all stages, and of bench.
WHOLE, BENCH = 540, 300
WITH_CUDA = "from ulfine_fast import _native; assert _native.has_cuda(), 'built without CUDA'"
# The toolkit's programs are not always on the path.
TOOLKITS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def environment() -> dict[str, str]:
    """That of every stage: our build is found first, and programs beside the interpreter are found."""
    inherited = os.environ
    path = [str(Path(sys.executable).parent), inherited.get("PATH", ""), *TOOLKITS]
    python = [str(BUILT), *filter(None, [inherited.get("PYTHONPATH")])]
    return {
        **inherited,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join(python),
        # Compiled kernels of an earlier call are used again.
        "TORCHINDUCTOR_CACHE_DIR": inherited.get("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor")),
    }


def missing(stage: str) -> list[str]:
    """What the stage needs and this machine lacks."""
    if stage != "build" and not (BUILT / "ulfine_fast").is_dir():
        return ["the build: run STAGE=build first"]
    packages = [f"Python package {name}" for name in PACKAGES[stage] if not importlib.util.find_spec(name)]
    path = environment()["PATH"]
    programs = PROGRAMS.get(stage, ())
    return packages + [f"program {name}" for name in programs if not shutil.which(name, path=path)]


def gpu_tests() -> list[str]:
    """Files with a test that wants a GPU."""
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text()
    ]


def link(built: Path) -> None:
    """Lay links to the Python files out in `built` as the installed package has them."""
    shutil.rmtree(built, ignore_errors=True)
    package = built / "ulfine_fast"
    package.mkdir(parents=True)
    for path in (ROOT / "ulfine_fast").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")


def build_commands(built: Path, **options: str) -> list[list[str]]:
    """Configure with these options of CMake and build into `built`, which has links, as setup.py does."""
    import pybind11

    tree = str(built.with_name(f"cmake-{built.name}-{sys.implementation.cache_tag}"))
    defines = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(built / "ulfine_fast"),
        **options,
    }
    return [
        ["cmake", "-S", ".", "-B", tree, *(f"-D{name}={value}" for name, value in defines.items())],
        ["cmake", "--build", tree, "--parallel", str(os.cpu_count())],
    ]


def commands(stage: str, left: float) -> list[list[str]]:
    """What the stage runs in the root of the tree, in `left` seconds; it fails with the first that does."""
    python, here = sys.executable, str(Path(__file__).parent)
    checks = [python, f"{here}/gpu_checks.py"]
    if stage == "build":
        # Built, and the kernels are in it.
        return [*build_commands(BUILT, ULFINE_CUDA="ON"), [python, "-P", "-c", WITH_CUDA]]
    if stage == "test":
        # Without -P the root would be on the path, and `kernels` a package of its own. Only conftest.py wants
        # hypothesis, and nothing of conftest.py is for a GPU.
        bare = [] if importlib.util.find_spec("hypothesis") else ["--noconftest"]
        return [[python, "-P", "-m", "pytest", "-q", "-m", "gpu", *bare, *gpu_tests()]]
    if stage == "sanitize":
        # The first run compiles what the next two find.
        plain = [*checks, "once", "2"]
        # Several threads of a Triton program hold one sum, which each may round its own way, and all write it to
        # one place of its compiler's choice: racecheck calls that a race.
        watched = {"memcheck": plain, "racecheck": [*plain, "cuda"]}
        sanitizer = ["compute-sanitizer", "--error-exitcode", "99", "--tool"]
        return [plain, *([*sanitizer, tool, *command] for tool, command in watched.items())]
    if stage == "determinism":
        return [[*checks, "twice"]]
    seconds = os.environ.get("BUDGET") or f"{min(BENCH, left):.0f}"
    return [[python, f"{here}/gpu_bench.py", seconds]]


def run(stage: str, left: float = WHOLE) -> str:
    """How the stage ended: "passed", "skipped", or why it failed."""
    if stage == "sanitize" and os.environ.get("SANITIZER") == "skip":
        return "skipped: SANITIZER=skip"
    lacking = missing(stage)
    if lacking:
        hint = "; SANITIZER=skip leaves this stage out" if stage == "sanitize" else ""
        return f"failed: needs {', '.join(lacking)}{hint}"
    if stage == "build":
        link(BUILT)
    given = environment()
    if stage == "sanitize":
        # One allocation per tensor, or a write past its end would land in another and not be seen.
        given["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    for command in commands(stage, left):
        try:
            code = subprocess.run(command, cwd=ROOT, env=given, timeout=2 * WHOLE).returncode
        except subprocess.TimeoutExpired:
            return f"failed: {' '.join(command)} does not end"
        if code:
            return f"failed: exit status {code} of {' '.join(command)}"
    return "passed"


def no_gpu() -> str:
    """Why nothing can run here; empty where there is a GPU."""
    if not importlib.util.find_spec("torch"):
        return f"{sys.executable} has no torch"
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device: torch.cuda.is_available() is False"


def main(stages: list[str]) -> int:
    """Exit status: 0 if no stage failed, 2 if none could run."""
    unknown = sorted(set(stages) - set(STAGES))
    reason = f"STAGE must be of {', '.join(STAGES)}, got {', '.join(unknown)}" if unknown else no_gpu()
    if reason:
        print(f"gpu: {reason}", file=sys.stderr)
        return 2
    ended, end = {}, time.perf_counter() + WHOLE
    for stage in stages or STAGES:
        begun = time.perf_counter()
        print(f"gpu: {stage}", flush=True)
        ended[stage] = f"{run(stage, end - begun)} ({time.perf_counter() - begun:.0f} s)"
        if stage == "build" and ended[stage].startswith("failed"):
            break
    for stage, how in ended.items():
        print(f"gpu: {stage} {how}")
    return int(any(how.startswith("failed") for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
