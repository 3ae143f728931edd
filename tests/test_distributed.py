from __future__ import annotations

import pytest
import torch
from processes import run_together

from ulfine_fast.distributed import World, gather_rows, world

SCRIPT = """
import sys
import torch
from ulfine_fast.distributed import check_equal, gather_octets, gather_rows, largest, process_group, world

here = world()
with process_group(here, torch.device("cpu"), timeout=20):
    # part m of process r has the rows 10 m + 5 r + (0, 1)
    rows = torch.tensor([[10 * m + 5 * here.rank + n for n in range(2)] for m in range(3)])
    nan = torch.full((3, 2, 4), float("nan") if here.rank else -0.0)
    ints, halves, masks, empty, floats = gather_rows(
        [rows, rows.to(torch.bfloat16)[..., None] / 8, rows % 2 == 0, torch.empty(3, 0, 4), nan], here
    )
    print(ints.tolist(), halves.dtype, halves.flatten().tolist() == [x / 8 for x in ints.tolist()])
    print(masks.tolist() == [x % 2 == 0 for x in ints.tolist()], list(empty.shape))
    print(floats.isnan().any(1).tolist(), torch.signbit(floats[0]).all().item())
    cpu = torch.device("cpu")
    check_equal("00ff", "weights", here, cpu)
    try:
        check_equal(f"00f{here.rank}", "weights", here, cpu)
    except RuntimeError as error:
        print(error)
    print(largest(torch.tensor(1.0 - here.rank), here).item())
    print(gather_octets(b"first" if here.leads else b"", here, cpu), flush=True)
    if here.rank == 1:
        sys.exit(3)
    gather_rows([rows], here)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes, of which the second one ends."""
    return run_together(SCRIPT, 2, folder=tmp_path_factory.mktemp("pair"))


def test_one_process_is_its_own_world(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert world() == World(1, 0, 0, 1)
    assert world().leads
    rows = torch.arange(12.0).view(3, 2, 2)
    assert torch.equal(gather_rows([rows], World())[0], rows.view(6, 2))


def test_half_a_world_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="expected WORLD_SIZE, RANK, LOCAL_RANK, LOCAL_WORLD_SIZE of torchrun, got no RANK"
    ):
        world()


def test_rows_of_all_processes_come_back_in_the_order_of_the_batch(pair):
    for process in pair:
        assert process.out.splitlines() == [
            "[0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26] torch.bfloat16 True",
            "True [0, 4]",
            f"{[False, False, True, True] * 3} True",
            "expected the same weights in all processes, got others in [1]",
            "1.0",
            "[b'first', b'']",
        ], process.error


def test_a_process_that_ended_ends_the_others_with_a_message(pair):
    assert [process.code for process in pair] == [1, 3]
    last = pair[0].error.strip().splitlines()[-1].removeprefix("[rank0]: ")
    assert last.startswith(
        "ulfine_fast.distributed.ProcessError: process 0 of 2: expected an answer of the others"
    )
    assert last.endswith("continue with --resume")
