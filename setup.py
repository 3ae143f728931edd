"""Builds the extension `ulfine_fast._C` with CMake; everything declarative is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        cuda = os.environ.get("ULFINE_CUDA", "AUTO").upper()
        compilers = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
        if cuda not in ("AUTO", "ON", "OFF"):
            sys.exit(f"ulfine-fast: error: ULFINE_CUDA must be AUTO, ON or OFF, got {cuda!r}")
        if not any(map(shutil.which, compilers)):
            sys.exit(f"ulfine-fast: error: no C++ compiler ({', '.join(compilers)}); install g++ or set CXX")
        if not shutil.which("cmake"):
            sys.exit("ulfine-fast: error: no cmake; pip install cmake")
        tree = Path("build", f"cmake-{sys.implementation.cache_tag}").resolve()
        # An earlier build's cache may name tools of a build environment that is gone; its objects stay.
        (tree / "CMakeCache.txt").unlink(missing_ok=True)
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        defines = [
            f"-DULFINE_CUDA={cuda}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        defines += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}"]
        defines += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        for step in (["-S", ".", "-B", tree, "-G", "Ninja", *defines], ["--build", tree]):
            if subprocess.run(["cmake", *step]).returncode:
                sys.exit("ulfine-fast: error: the C++ build failed; the first error above says why")


setup(ext_modules=[Extension("ulfine_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
