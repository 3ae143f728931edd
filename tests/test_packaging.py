"""What is built from this tree: the wheel, the source archive, the extension and the installed command."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ulfine_fast
from ulfine_fast import _C

ROOT = Path(__file__).resolve().parents[1]
SYSTEM_LIBRARIES = re.compile(
    r"(libgomp|libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux.*)\.so\.\d+"
)


class Built(NamedTuple):
    tree: Path
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A wheel and a source archive of a copy of the tree, built with the tools of this environment."""
    tree = tmp_path_factory.mktemp("fresh tree")
    ignore = shutil.ignore_patterns("__pycache__", "_C.*.so")
    for folder in ("ulfine_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    # cmake and ninja lie beside the interpreter of a virtual environment that is not activated.
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": tools, "ULFINE_CUDA": "OFF"}
    run(
        [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('out')"],
        cwd=tree,
        env=environment,
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        "out",
        ".",
    ]
    run(pip, cwd=tree, env=environment)
    (wheel,) = (tree / "out").glob("*.whl")
    (sdist,) = (tree / "out").glob("*.tar.gz")
    return Built(tree, wheel, sdist)


def run(command: list, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources(tree: Path, *folders: str) -> set[str]:
    return {path.relative_to(tree).as_posix() for folder in folders for path in (tree / folder).rglob("*.*")}


def test_wheel_holds_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built.wheel).namelist())
    folder = f"ulfine_fast-{ulfine_fast.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"ulfine_fast", folder}
    kernels = {f"ulfine_fast/{name}" for name in sources(built.tree, "kernels")}
    extension = {name for name in names if re.fullmatch(r"ulfine_fast/_C\.[\w-]+\.so", name)}
    assert len(extension) == 1
    packaged = {name for name in names if not name.startswith(folder)}
    assert packaged - extension == sources(built.tree, "ulfine_fast") | kernels
    assert f"{folder}/licenses/LICENSE" in names


def test_wheel_works_without_the_tree(built, tmp_path):
    zipfile.ZipFile(built.wheel).extractall(tmp_path)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, ulfine_fast, ulfine_fast.kernels\n"
        "from ulfine_fast import _C\n"
        "assert all(m.__spec__.submodule_search_locations[0].startswith(sys.argv[1])"
        " for m in (ulfine_fast, ulfine_fast.kernels))\n"
        "print(_C.has_cuda, ulfine_fast.proto_logits(torch.ones(1, 2), torch.ones(1, 2), 3.0, backend='cpp').item())"
    )
    assert run([sys.executable, "-P", "-c", script, str(tmp_path)], cwd=tmp_path).split()[0] == "False"


def test_sdist_can_be_built_from(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = sources(built.tree, "csrc", "kernels", "ulfine_fast")
    assert wanted <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names


@pytest.mark.parametrize("which", ["cpu only", "installed"])
def test_extension_links_only_the_system(built, which, tmp_path):
    path = _C.__file__
    if which == "cpu only":
        (name,) = (n for n in zipfile.ZipFile(built.wheel).namelist() if n.endswith(".so"))
        path = zipfile.ZipFile(built.wheel).extract(name, tmp_path)
    libraries = re.findall(r"\(NEEDED\).*\[(.+)\]", run(["readelf", "-d", path]))
    assert [name for name in libraries if not SYSTEM_LIBRARIES.fullmatch(name)] == []
    # The same name as in torch's wheels: whichever is loaded first serves both, with one pool of threads.
    assert "libgomp.so.1" in libraries
    assert "PyInit__C" in run(["nm", "-D", "--defined-only", path])


def test_instruction_sets_share_no_symbol(built):
    folders = list((built.tree / "build").glob("cmake-*/CMakeFiles/cpu_*.dir"))
    assert "cpu_baseline.dir" in {folder.name for folder in folders}
    for folder in folders:
        isa = folder.name.removeprefix("cpu_").removesuffix(".dir")
        objects = list(folder.rglob("*.o"))
        assert objects
        for line in run(["nm", "--defined-only", "--extern-only", *objects]).splitlines():
            # Undefined and local symbols are not shared; of the rest each must carry its set in its name.
            if len(line.split()) == 3:
                assert f"6ulfine{len(isa)}{isa}" in line.split()[2]


def test_metadata_agrees(built):
    metadata = (
        zipfile.ZipFile(built.wheel)
        .read(f"ulfine_fast-{ulfine_fast.__version__}.dist-info/METADATA")
        .decode()
    )
    assert f"\nVersion: {ulfine_fast.__version__}\n" in metadata
    assert version("ulfine-fast") == ulfine_fast.__version__


def test_every_requirement_has_a_lower_bound_which_the_tested_version_meets():
    file = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = file["project"]["optional-dependencies"].values()
    parts = [file["build-system"]["requires"], file["project"]["dependencies"], *extras]
    lines = (ROOT / "constraints/tested.txt").read_text().splitlines()
    tested = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in map(Requirement, itertools.chain(*parts)):
        if requirement.name != "ulfine-fast":
            assert [bound.operator for bound in requirement.specifier] == [">="], requirement
            # What only `study` and the like ask for is not in the tested set.
            pinned = tested.get(canonicalize_name(requirement.name))
            assert pinned is None or pinned in requirement.specifier, requirement


def test_console_scripts_resolve():
    scripts = [
        entry for entry in distribution("ulfine-fast").entry_points if entry.group == "console_scripts"
    ]
    assert [entry.name for entry in scripts] == ["ulfine-fast"]
    assert all(callable(entry.load()) for entry in scripts)
    command = Path(sys.executable).with_name("ulfine-fast")
    assert "demo" in run([command, "--help"])
