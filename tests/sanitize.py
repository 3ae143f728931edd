"""The CPU kernels under the compiler's sanitizers: python tests/sanitize.py [address] [thread]; `make sanitize` calls it.

address: the extension is built with AddressSanitizer and UndefinedBehaviorSanitizer; the tests of the ops and some
thousand random calls run on it. thread: the kernels run on four threads with ThreadSanitizer, which needs clang and
its OpenMP, for that of gcc hides its barriers from it. A finding ends either with an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "sanitize"
ADDRESS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
# Calls of the fuzzer; the interpreter keeps some memory to its end.
CALLS, OPTIONS = "6000", "detect_leaks=0:abort_on_error=1"


def run(*command: object, **environment: str) -> None:
    """Run in the root of the tree; ends this program with the status of a command that fails."""
    words = [str(word) for word in command]
    print("sanitize:", " ".join(words), flush=True)
    # cmake stands beside the interpreter
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    ended = subprocess.run(words, cwd=ROOT, env={**os.environ, "PATH": path, **environment}).returncode
    if ended:
        sys.exit(f"sanitize: exit status {ended}")


def address() -> None:
    """Build with both sanitizers, and use the build."""
    sys.path.append(str(ROOT / "benchmarks"))
    from gpu import build_commands, link

    link(BUILT)
    options = {"ULFINE_CUDA": "OFF", "CMAKE_CXX_FLAGS": ADDRESS, "CMAKE_MODULE_LINKER_FLAGS": ADDRESS}
    for command in build_commands(BUILT, CMAKE_BUILD_TYPE="RelWithDebInfo", **options):
        run(*command)
    compiler = os.environ.get("CXX", "c++").split()[0]
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names
    ]
    environment = {
        "LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": OPTIONS, "PYTHONPATH": str(BUILT), "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip
    tests = ("tests/ops", "tests/test_head_loss.py", "tests/test_backend.py")
    # Uncaptured, or the report of a finding would be lost with the process.
    run(sys.executable, "-P", "-m", "pytest", "-q", "-s", "-k", "cpp and not compile", *tests, **environment)
    run(sys.executable, "-P", "tests/fuzz_ops.py", CALLS, **environment)


def thread() -> None:
    """Build the kernels of every op for one instruction set, and run each on four threads."""
    compiler = shutil.which("clang++")
    archer = next(iter(Path("/usr/lib").glob("llvm-*/lib/libarcher.so")), None)
    if not (compiler and archer):
        sys.exit("sanitize: thread needs clang++ and libarcher.so; install clang and libomp-dev")
    BUILT.mkdir(parents=True, exist_ok=True)
    driver = BUILT / "threads"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-fopenmp", "-DULFINE_ISA=baseline", "-Icsrc"]
    run(compiler, *flags, "tests/portability.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp")), "-o", driver)
    with (BUILT / "threads.out").open("w") as out:
        environment = {
            **os.environ,
            "OMP_TOOL_LIBRARIES": str(archer),
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
        }
        ended = subprocess.run([driver], stdout=out, env=environment).returncode
    if ended:
        sys.exit(f"sanitize: thread: exit status {ended}")


if __name__ == "__main__":
    stages = {"address": address, "thread": thread}
    wrong = set(sys.argv[1:]) - set(stages)
    if wrong:
        sys.exit(f"sanitize: expected {' or '.join(stages)}, got {', '.join(sorted(wrong))}")
    for stage in sys.argv[1:] or stages:
        stages[stage]()
    print("sanitize: clean")
