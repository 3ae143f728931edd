"""Triton kernels without a GPU: every launch compiles for one, fits it, and none waits for the device.

That the kernels are right is the matter of `tests/ops`, where Triton's interpreter runs them.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_triton import ARCHITECTURES, CALLS, PRECISIONS, SHAPES

# Shared memory that one program may have, and the instruction that multiplies on tensor cores.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
TENSOR_CORES = {80: ["mma.sync"], 90: ["wgmma.mma_async"]}


@pytest.fixture(scope="module")
def found() -> dict:
    """What `compile_triton.py` says of every launch."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", CALLS)
def test_every_launch_compiles_for_a_gpu_and_fits_it(found, op, shape, arch, precision):
    for launch in found[f"{op} {shape} {precision}"][str(arch)]:
        # Where registers are short, one or two may be spilled: which is the compiler's choice, and costs nothing.
        assert launch["stack"] + launch["local"] <= 16, f"{launch['kernel']} spills"
        assert launch["shared"] <= SHARED[arch], launch["kernel"]
        assert launch["tensor cores"] == (TENSOR_CORES[arch] if launch["tf32"] else []), launch["kernel"]


@pytest.mark.parametrize("op", ["proto_logits", "pseudo_label", "head_loss"])
def test_a_product_with_an_epilogue_may_round_to_tf32(found, op):
    assert any(launch["tf32"] for launch in found[f"{op} small tf32"]["90"])


@pytest.mark.parametrize(
    ("op", "launches", "products"),
    [
        ("proto_logits", 1 + 4, 2),
        ("pseudo_label", 5, 0),
        ("dual_cross_entropy", 2 * 6, 2 * 3),
        ("proto_fit", 2, 0),
        ("orthogonality", 4, 2),
        ("head_loss", 2 * 15, 2 * 5),
    ],
)
def test_launches_are_few_and_none_waits_for_the_device(found, op, launches, products):
    of_op = found[f"{op} small ieee"]
    assert len(of_op["90"]) == launches
    assert of_op["calls"].count("mm.out") == products
    waiting = {"_local_scalar_dense.default", "nonzero.default", "is_nonzero.default", "equal.default"}
    assert not waiting & set(of_op["calls"])


def test_every_masked_load_says_what_it_reads_outside():
    # The interpreter reads zeros there; a GPU reads whatever its registers held.
    bare = []
    for path in (Path(__file__).parents[1] / "kernels").glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            given = {keyword.arg for keyword in call.keywords}
            if ast.unparse(call.func) == "tl.load" and "mask" in given and "other" not in given:
                bare.append(f"{path.name}:{call.lineno}")
    assert not bare
