"""`make gpu` where there is no GPU: its counts, its table, its stages, and every provider at a tiny shape."""

from __future__ import annotations

import ast
import csv
import json
import math
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import contests
import gpu
import gpu_bench
import gpu_checks
import gpu_table
import numpy as np
import pytest
import torch
from contests import CONTESTS, PROVIDERS, Contest
from gpu_bench import Bout, Machine
from shapes import GPU_SHAPES, Shape, least_work, step_inputs
from triton.runtime.interpreter import GridExecutor

from ulfine_fast import _cuda, backend
from ulfine_fast.fastest import FASTEST, RANGES
from ulfine_fast.ops.dual_cross_entropy import LOSS_ON

(ORTHOGONALITY,) = (contest for contest in CONTESTS if contest.op == "orthogonality")
TINY = Shape(4, 6, 7, 5)
PLAIN = ("naive eager", "smart eager", "reference", "triton", "cuda")
RATES = Machine(ieee=1e12, tf32=2e12, fp16=4e12, copy=1e9)


@pytest.fixture
def on_the_processor(emulated_kernels, monkeypatch):
    """Both GPU back ends run emulated; what needs a device is replaced by its plainest stand-in."""
    monkeypatch.setattr(_cuda, "kernels", emulated_kernels)
    monkeypatch.setattr(contests, "graphed", lambda call: call)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    monkeypatch.setattr(gpu_bench, "block_ms", lambda call, calls: 1.0)
    monkeypatch.setattr(gpu_bench, "calls_per_block", lambda call: 1)
    monkeypatch.setattr(gpu_bench, "peak_mib", lambda call: 8.0)
    monkeypatch.setattr(gpu_bench, "launches", lambda calls: dict.fromkeys(calls, 3))
    monkeypatch.setattr(gpu_bench, "lost", lambda: False)
    with np.errstate(all="ignore"):
        yield


def on_cpu(all_bouts, shapes, seconds, device, *rest):
    return all_bouts(shapes, seconds, "cpu", *rest)


# Statistics


def test_ratios_are_taken_within_a_round():
    # The machine is three times slower in the second round.
    blocks = {"ours": iter([1.0, 3.0, 1.0, 1.0, 1.0]), "theirs": iter([2.0, 6.0, 2.0, 2.0, 4.0])}
    times = gpu_bench.interleaved({name: lambda t=t: next(t) for name, t in blocks.items()}, seconds=0.0)
    assert times == {"ours": [1.0, 3.0, 1.0, 1.0, 1.0], "theirs": [2.0, 6.0, 2.0, 2.0, 4.0]}
    ratios = gpu_bench.ratios(times, "ours", ["theirs", "absent"])
    assert ratios.keys() == {"theirs"}
    assert ratios["theirs"]["p50"] == ratios["theirs"]["p20"] == 2.0
    assert 2.0 < ratios["theirs"]["p80"] < 4.0


def test_providers_take_turns():
    seen = []
    gpu_bench.interleaved({name: lambda name=name: seen.append(name) or 1.0 for name in "abc"}, seconds=0.0)
    assert "".join(seen) == "abc" * gpu_bench.ROUNDS_LEAST


def test_launches_are_device_events_within_the_range_of_a_call():
    def event(cat, ts, dur=1, name=""):
        return {"cat": cat, "ts": ts, "dur": dur, "name": name}

    events = [
        event("user_annotation", 10, 10, "ours"),
        event("user_annotation", 30, 10, "theirs"),
        # Ranges that other libraries mark, also on the device, and what runs on the host.
        event("user_annotation", 0, 100, "step"),
        event("gpu_user_annotation", 11, 8, "ours"),
        event("cuda_runtime", 12),
        event("kernel", 5),
        event("kernel", 12),
        event("gpu_memset", 13),
        event("kernel", 31),
        {"ph": "M"},
    ]
    assert gpu_bench.counted(events, ["ours", "theirs"]) == {"ours": 2, "theirs": 1}


def test_a_block_has_as_many_calls_as_fill_it(monkeypatch):
    for ms, calls in ((100.0, 1), (1.5, 2), (1e-3, gpu_bench.BLOCK_CALLS)):
        monkeypatch.setattr(gpu_bench, "block_ms", lambda call, calls, ms=ms: ms)
        assert gpu_bench.calls_per_block(lambda: None) == calls


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_disagreement(precision):
    want = (torch.arange(1000.0), torch.tensor([True, False]))
    assert gpu_bench.disagreement(want, want, precision) == ""
    one_off = want[0].clone()
    one_off[10] = 500.0
    found = gpu_bench.disagreement((one_off, want[1]), want, precision)
    # One row in a thousand may be kept by one and not by the other where operands round to TF32.
    assert found == ("" if precision == "tf32" else "result 0 differs in 1 of 1000 values")
    assert "result 1" in gpu_bench.disagreement((want[0], ~want[1]), want, precision)
    assert "nan" not in gpu_bench.disagreement((want[0] * math.nan, want[1]), want, precision)
    assert gpu_bench.disagreement((want[0] * math.nan, want[1]), want, precision)
    assert "is [3]" in gpu_bench.disagreement((want[0][:3], want[1]), want, precision)


# Counts


def test_least_work():
    s = step_inputs(TINY)
    b, u, c, d = TINY
    rows = b + u / 2
    flops = {
        (contest.op, contest.loss_on): least_work(contest.op, contest.loss_on, s).flops
        for contest in CONTESTS
    }
    # A product, forward, is 2 C D for each row; its gradients are one more each.
    assert flops["proto_logits", None] == 3 * 2 * (b + u) * c * d
    assert flops["dual_cross_entropy", "fused"] == 3 * 2 * rows * c * d
    assert flops["dual_cross_entropy", "branches"] == (2 + 2 + 1) * 2 * rows * c * d
    assert flops["orthogonality", None] == (1 + 2) * c * d * min(c, d)
    assert flops["proto_fit", None] == 0
    for loss_on in ("fused", "branches"):
        parts = [
            flops["pseudo_label", None],
            flops["dual_cross_entropy", loss_on],
            flops["orthogonality", None],
        ]
        assert flops["head step", loss_on] == sum(parts)
    assert least_work("proto_fit", None, s).bytes < least_work("head step", "fused", s).bytes
    assert least_work("orthogonality", None, s).bytes == 2 * 4 * c * d


def test_the_roofline_is_the_slower_of_both():
    work = least_work("orthogonality", None, step_inputs(TINY))
    assert RATES.least_ms(work, "ieee") == work.bytes / 1e9 * 1e3
    assert RATES._replace(copy=1e15).least_ms(work, "tf32") == work.flops / 2e12 * 1e3


def test_every_contest_is_scheduled_and_tf32_at_large_shapes_last():
    bouts = gpu_bench.schedule(GPU_SHAPES)
    assert len(set(bouts)) == len(bouts) == len(CONTESTS) * (4 + 2)
    assert [bout.contest.op for bout in bouts[:8]] == ["head step"] * 8
    assert [bout.precision for bout in bouts] == ["ieee"] * 4 * len(CONTESTS) + ["tf32"] * 2 * len(CONTESTS)
    assert {bout.shape for bout in bouts if bout.precision == "tf32"} == {"C", "D"}


def test_inputs_can_be_copied_and_put_back():
    start = step_inputs(TINY)
    s = start.to("cpu")
    assert s.rows.is_leaf and s.rows.requires_grad and not s.weak.requires_grad
    with torch.no_grad():
        s.visual.zero_()
        s.textual.zero_()
    assert start.visual.any() and start.textual.any()
    s.restore(start)
    assert torch.equal(s.visual, start.visual) and torch.equal(s.textual, start.textual)
    assert start.to("cpu", torch.float64).rows.dtype == torch.float64
    assert start.to("cpu", torch.float64).targets.dtype == torch.int64


# Providers


@pytest.mark.parametrize(
    ("contest", "precision"),
    [*((contest, "ieee") for contest in CONTESTS), (ORTHOGONALITY, "tf32")],
    ids=lambda value: f"{value.op}-{value.loss_on}" if isinstance(value, Contest) else value,
)
def test_every_provider_computes_the_same(on_the_processor, contest, precision):
    with gpu_checks.tf32(precision == "tf32"):
        rows = gpu_bench.measure(Bout(contest, "A", precision), step_inputs(TINY), 60.0, RATES)
    assert [row["status"] for row in rows] == ["ok"] * len(rows)
    names = [row["provider"] for row in rows]
    assert names == [p.name for p in PROVIDERS if p.name in names]
    assert {"naive eager", "naive reduce-overhead", "reference", *gpu_table.OURS} <= set(names)
    for row in rows:
        assert row["p50"] == 1.0 and row["launches"] == 3 and row["precision"] == precision
        assert ("ratios" in row) == (row["provider"] in gpu_table.OURS)
        assert ("peak_mib" in row) == (row["provider"] in PLAIN)
        if "ratios" in row:
            assert set(row["ratios"]) == set(names) - set(gpu_table.OURS)


def test_the_backend_of_a_provider_is_the_one_that_runs(on_the_processor, monkeypatch):
    launched = []
    launch = _cuda._launch
    monkeypatch.setattr(
        _cuda, "_launch", lambda name, *fields: launched.append(name) or launch(name, *fields)
    )
    monkeypatch.setattr(
        gpu_bench, "providers", lambda contest: [p for p in PROVIDERS if p.backend == "triton"]
    )
    gpu_bench.measure(Bout(ORTHOGONALITY, "A", "ieee"), step_inputs(TINY), 60.0, RATES)
    assert not launched
    monkeypatch.setattr(gpu_bench, "providers", lambda contest: [p for p in PROVIDERS if p.backend == "cuda"])
    gpu_bench.measure(Bout(ORTHOGONALITY, "A", "ieee"), step_inputs(TINY), 60.0, RATES)
    assert set(launched) == {"unit_rows", "orthogonality", "finish"}


def test_a_block_starts_from_the_same_state_on_the_backend_of_its_provider(monkeypatch):
    start, seen = step_inputs(TINY), []
    s = start.to("cpu")

    def call():
        seen.append((s.visual[0, 0].item(), backend._selected))
        s.visual.zero_()

    monkeypatch.setattr(gpu_bench, "block_ms", lambda call, calls: [call() for _ in range(calls)])
    monkeypatch.setattr(gpu_bench, "launches", lambda calls: [run() for run in calls.values()] and {})
    block = gpu_bench._block(call, s, "triton", 2, start)
    block()
    block()
    gpu_bench._launches({"cuda": (call, s, "cuda", 2)}, start)
    first = start.visual[0, 0].item()
    assert seen == [(first, "triton"), (0.0, "triton")] * 2 + [(first, "cuda")]


def breaks(error):
    def run(*arguments):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "defect"),
    [
        (RuntimeError("illegal access\nsecond line"), "failed: RuntimeError: illegal access", True),
        (torch.cuda.OutOfMemoryError("too much"), "out of memory", False),
    ],
)
def test_a_provider_that_fails_is_a_row_that_says_so(on_the_processor, monkeypatch, error, status, defect):
    broken = replace(ORTHOGONALITY, ours=(breaks(error),))
    rows = gpu_bench.measure(Bout(broken, "A", "ieee"), step_inputs(TINY), 60.0, RATES)
    ours = {*gpu_table.OURS, "reference"}
    assert {row["status"] for row in rows if row["provider"] in ours} == {status}
    assert {row["status"] for row in rows if row["provider"] not in ours} == {"ok"}
    assert any(map(gpu_table.defective, rows)) == defect


def test_a_wrong_result_is_not_timed_and_is_a_defect(on_the_processor):
    (value_of,) = ORTHOGONALITY.ours
    wrong = replace(ORTHOGONALITY, ours=(lambda prototypes: 2 * value_of(prototypes),))
    rows = gpu_bench.measure(Bout(wrong, "A", "ieee"), step_inputs(TINY), 60.0, RATES)
    ours = [row for row in rows if row["provider"] in gpu_table.OURS]
    assert all(row["status"].startswith("wrong: result 0") and "p50" not in row for row in ours)
    assert all(map(gpu_table.defective, ours))


def test_what_time_does_not_suffice_for_is_a_row(on_the_processor):
    rows = gpu_bench.measure(Bout(CONTESTS[0], "A", "ieee"), step_inputs(TINY), 0.0, RATES)
    assert {row["status"] for row in rows} == {"out of time"}
    assert not any(map(gpu_table.defective, rows))


def test_times_stand_without_a_profiler(on_the_processor, monkeypatch):
    monkeypatch.setattr(gpu_bench, "launches", breaks(RuntimeError("no CUPTI")))
    rows = gpu_bench.measure(Bout(ORTHOGONALITY, "A", "ieee"), step_inputs(TINY), 60.0, RATES)
    assert all("p50" in row and "launches" not in row for row in rows)


def test_accuracy_is_told_next_to_that_of_autocast(on_the_processor):
    start = step_inputs(Shape(8, 64, 40, 32))
    found = gpu_bench.accuracy(start, "cuda")
    assert 0 <= found["confidence_error"] < found["autocast_confidence_error"] / 5
    assert found["argmax_flips"] == 0
    for loss_on in ("fused", "branches"):
        assert 0 < gpu_bench.gradient_error(start, "cuda", loss_on) < 2e-5


def test_all_bouts_share_the_time_each_at_its_precision(on_the_processor, monkeypatch):
    def measure(bout, start, seconds, machine, without):
        given.append(seconds)
        assert torch.backends.cuda.matmul.allow_tf32 == (bout.precision == "tf32")
        return [{"provider": ""}]

    given = []
    monkeypatch.setattr(gpu_bench, "measure", measure)
    monkeypatch.setattr(gpu_bench, "add_accuracy", lambda rows, bout, start: None)
    monkeypatch.setattr(gpu_bench, "inputs", lambda shape: step_inputs(TINY))
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(gpu_bench.gc, "collect", lambda: 0)
    monkeypatch.setattr(gpu_bench.time, "perf_counter", lambda: 0.0)
    rows = list(gpu_bench.all_bouts(GPU_SHAPES, 100.0, "cpu", RATES, {}))
    assert len(rows) == len(given) == 6 * len(CONTESTS)
    # 12 head steps of three shares, 36 ops of one; no bout took any time, so the last is offered all of it.
    assert given[0] == pytest.approx(100 * 3 / (12 * 3 + 36))
    assert given[8] == pytest.approx(100 * 1 / (4 * 3 + 36))
    assert given[-1] == 100


def test_a_fault_outside_of_a_provider_is_a_row_of_each(on_the_processor, monkeypatch):
    monkeypatch.setattr(gpu_bench, "inputs", lambda shape: step_inputs(TINY))
    monkeypatch.setattr(gpu_bench.gc, "collect", lambda: 0)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(gpu_bench, "measure", breaks(RuntimeError("CUDA error")))
    rows = list(gpu_bench.all_bouts({"A": TINY}, 1.0, "cpu", RATES, {}))
    assert {row["status"] for row in rows} == {"failed: RuntimeError: CUDA error"}
    assert {row["op"] for row in rows} == {contest.op for contest in CONTESTS}
    assert sum(map(gpu_table.defective, rows)) == len(CONTESTS) * len(gpu_table.OURS)


def test_a_fault_on_the_device_costs_the_provider_that_met_it(on_the_processor, monkeypatch, tmp_path):
    def lost_device(*arguments):
        raise RuntimeError("illegal access")

    broken = replace(ORTHOGONALITY, smart=(lost_device,))
    monkeypatch.setattr(gpu_bench, "CONTESTS", (broken,))
    monkeypatch.setattr(gpu_bench, "inputs", lambda shape: step_inputs(TINY))
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(gpu_bench.gc, "collect", lambda: 0)
    monkeypatch.setattr(gpu_bench, "all_bouts", partial(on_cpu, gpu_bench.all_bouts))
    monkeypatch.setattr(gpu_bench, "lost", lambda: True)
    statuses = []

    def process(words, timeout):
        shape, seconds, rates, path = words[1:]
        machine = Machine(*json.loads(rates))
        status = gpu_bench.measure_shape(shape, float(seconds), machine, Path(path))
        statuses.append(status)
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(gpu_bench.subprocess, "run", process)
    rows = gpu_bench.rows_of_shape("A", 60.0, RATES, ["measure"])
    smart = [provider.name for provider in PROVIDERS if provider.family == "smart"]
    # Each of them ends a process; the last process measures the rest.
    assert statuses == [gpu_bench.LOST] * len(smart) + [0]
    failed = {row["provider"] for row in rows if row["status"] != "ok"}
    assert failed == set(smart) and len(rows) == len(PROVIDERS)


def test_a_process_that_ends_without_a_row_is_told(monkeypatch):
    monkeypatch.setattr(gpu_bench.subprocess, "run", lambda words, timeout: SimpleNamespace(returncode=-11))
    rows = gpu_bench.rows_of_shape("A", 60.0, RATES, ["measure"])
    assert {row["status"] for row in rows} == {"failed: the process of the shape ended with -11"}
    assert len(rows) == sum(
        len(gpu_bench.providers(bout.contest)) for bout in gpu_bench.schedule({"A": GPU_SHAPES["A"]})
    )


# Checks


def test_every_op_has_the_same_bits_twice(on_the_processor, monkeypatch, capsys):
    monkeypatch.setattr(gpu_checks, "cases", lambda largest: [(gpu_checks.SHAPES[0], torch.float16, False)])
    assert gpu_checks.main("twice", device="cpu") == 0
    assert capsys.readouterr().out.strip() == "twice: 0 differences"


def test_checks_call_every_op_in_both_loss_modes():
    names = gpu_checks.calls(gpu_checks.SHAPES[0], torch.float32, "cpu").keys()
    assert {name.partition(",")[0] for name in names} == {*backend.OPS, *backend.COMPOSED, "advance"}
    assert {f"{op}, {mode}" for op in ("dual_cross_entropy", "head_loss") for mode in LOSS_ON} < names


def test_checks_launch_every_kernel(on_the_processor, monkeypatch, capsys):
    started = set()
    launch, run = _cuda._launch, GridExecutor.__call__
    monkeypatch.setattr(_cuda, "_launch", lambda name, *fields: started.add(name) or launch(name, *fields))
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *a, **k: started.add(self.fn.__name__) or run(self, *a, **k)
    )
    assert gpu_checks.main("once", 1, device="cpu") == 0
    assert capsys.readouterr().out.strip() == "every kernel ran"
    kernels = [path.read_text() for path in (gpu.ROOT / "kernels").glob("*.py")]
    ours = {name for text in kernels for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    header = (gpu.ROOT / "csrc/cuda/kernels.h").read_text()
    ours |= set(re.findall(r"^const char\* (\w+)\(", header, re.MULTILINE))
    assert len(ours) > 20 and started == ours


def test_other_bits_are_found(on_the_processor, monkeypatch, capsys):
    noisy = {"an op": lambda: [torch.rand(3)]}
    monkeypatch.setattr(gpu_checks, "calls", lambda *arguments: noisy)
    assert gpu_checks.main("twice", 1, device="cpu") == 1
    assert (
        "an op triton 5x13x7x19 torch.float32 ieee: other bits in the second run" in capsys.readouterr().out
    )
    assert not gpu_checks.same_bits([torch.tensor(0.0)], [torch.tensor(-0.0)])
    assert gpu_checks.same_bits([torch.tensor(math.nan)], [torch.tensor(math.nan)])


# Table


def row(provider, shape="A", op="head step", loss_on="fused", precision="ieee", **more):
    measured = {"status": "ok", "p50": 0.1, "p20": 0.09, "p80": 0.11, "launches": 4, "of_roofline": 0.5}
    place = {"op": op, "loss_on": loss_on, "shape": shape, "precision": precision, "provider": provider}
    return place | (measured if "status" not in more else {}) | more


def ratio(value):
    return {"p50": value, "p20": value - 0.1, "p80": value + 0.1}


RECORD = {
    "machine": {"gpu": "NVIDIA Some GPU", "torch": "2"},
    "rates": RATES._asdict(),
    "rows": [
        row("naive eager", peak_mib=100.0),
        row("cuda", peak_mib=10.0, gradient_error=1e-6, ratios={"naive eager": ratio(16.0)}),
        row("cuda graph", p50=0.015, ratios={"naive eager": ratio(60.0), "smart graph": ratio(0.7)}),
        row("triton", status="failed: RuntimeError: a | b"),
        row("naive reduce-overhead", status="out of time"),
        row("smart reduce-overhead", status="failed: RuntimeError: no"),
        row("cuda", "D", precision="tf32", peak_mib=50.0, launches=11, gradient_error=1e-2),
        row("smart eager", "D", precision="tf32", peak_mib=100.0),
        row(
            "cuda", op="pseudo_label", loss_on=None, confidence_error=3e-4, autocast_confidence_error=1e-3,
            argmax_flips=0.0, autocast_argmax_flips=0.01,
        ),
    ],
}  # fmt: skip


def cells(provider, **place):
    lines = [line for line in gpu_table.table(RECORD).splitlines() if line.startswith("|")]
    header, _, *rows = ([text.strip() for text in line.split("|")[1:-1]] for line in lines)
    found = [dict(zip(header, row, strict=True)) for row in rows]
    (match,) = (
        row
        for row in found
        if row["ours"] == provider and all(row[key] == value for key, value in place.items())
    )
    return match


def test_the_table_says_met_missed_or_not_measured():
    graph = cells("cuda graph", op="head step")
    assert graph["us"] == "15.0 [90.0, 110.0] met (<= 20)"
    assert graph["naive eager"] == "60.00x met (>= 50)"
    assert graph["launches"] == "4 met (<= 5)"
    assert graph["naive reduce-overhead"] == "out of time not measured (>= 4)"
    assert graph["smart reduce-overhead"] == "failed: RuntimeError: no not measured (>= 3)"
    assert graph["naive compiled"] == "-"
    plain = cells("cuda", shape="A", op="head step")
    assert plain["naive eager"] == "16.00x met (>= 15)"
    assert plain["gradient error"] == "1e-06 met (<= 2e-05)"
    assert plain["memory / naive"] == "0.1"
    large = cells("cuda", shape="D")
    assert large["launches"] == "11 MISSED (<= 10)"
    assert large["memory / smart"] == "0.5 MISSED (<= 0.25)"
    assert large["memory / naive"] == "not measured (<= 0.03)"
    assert large["gradient error"] == "0.01 MISSED (<= 0.001)"
    labels = cells("cuda", op="pseudo_label")
    assert labels["confidence error / autocast"] == "0.3 MISSED (<= 0.2)"
    assert labels["argmax flips"] == "0 met (<= 0.001)"


def test_the_table_shows_where_we_lose_and_what_failed():
    assert cells("cuda graph", op="head step")["strongest"] == "smart graph 0.70x [0.60, 0.80] LOST"
    assert cells("cuda", op="head step", shape="A")["strongest"] == "naive eager 16.00x [15.90, 16.10]"
    failed = cells("triton")
    assert failed["us"] == "failed: RuntimeError: a / b"
    assert failed["naive eager"].endswith("not measured (>= 15)")


def test_every_goal_is_of_a_column_and_a_shape():
    for goals in gpu_table.GOALS_OF.values():
        for goal in goals:
            assert goal.column in gpu_table.COLUMNS and set(goal.limits) <= set(GPU_SHAPES)
    assert set(gpu_table.GOALS_OF) <= {contest.op for contest in CONTESTS}
    names = Counter(provider.name for provider in PROVIDERS)
    assert names == Counter([*gpu_table.OURS, *gpu_table.RIVALS])


# What follows for `auto`


def of_shapes(op, loss_on=None, **times):
    """Rows of the back ends, with these times at each shape; None is a failure."""
    return [
        row(name, shape, op, loss_on, **({"p50": value, "p80": value} if value else {"status": "failed: no"}))
        for name, values in times.items()
        for shape, value in zip(GPU_SHAPES, values, strict=True)
    ]


def test_the_entry_of_a_gpu_names_the_fastest_backends():
    rows = [
        *of_shapes("proto_fit", reference=(4, 1, 4, 4), triton=(3, 2, 2, None), cuda=(2, 3, 3, 9)),
        # Together triton is faster at A, and at B nothing else runs both losses.
        *of_shapes("head step", "fused", reference=(9, 9, 9, 9), triton=(3, 3, 3, 3), cuda=(2, 1, 9, 9)),
        *of_shapes(
            "head step", "branches", reference=(9, 9, 9, 9), triton=(3, 3, 3, 3), cuda=(5, None, 1, 1)
        ),
        # Other ways to run are no back ends, and another precision is another question.
        row("cuda graph", "B", "proto_fit", None, p50=0.1),
        row("reference", "B", "proto_fit", None, precision="tf32", p50=9),
        # Not all had their turn.
        row("reference", "A", "orthogonality", None, status="out of time"),
        row("triton", "A", "orthogonality", None, p50=1),
        row("cuda", "A", "orthogonality", None, p50=2),
        *(row(name, "B", "orthogonality", None, status="failed: no") for name in gpu_table.BACKENDS),
    ]
    record = {"machine": {"gpu": "NVIDIA Some GPU"}, "rows": rows}
    found = gpu_table.backends(record)
    assert found == {
        "proto_fit": ["cuda", "reference", "triton", "reference"],
        "head_loss": ["triton", "triton", "triton", "triton"],
        "orthogonality": ["reference"] * 4,
    }
    pasted = ast.literal_eval("{" + gpu_table.entry(record) + "}")
    assert pasted == {"NVIDIA Some GPU": {op: tuple(names) for op, names in found.items()}}


def test_what_is_level_in_plain_calls_is_told_apart_as_a_graph():
    rows = [
        row("reference", "A", "proto_fit", None, p50=9, p80=9),
        row("triton", "A", "proto_fit", None, p50=3, p80=4),
        row("cuda", "A", "proto_fit", None, p50=3.5, p80=5),
        row("triton graph", "A", "proto_fit", None, p50=2),
        row("cuda graph", "A", "proto_fit", None, p50=1),
    ]
    assert gpu_table.backends({"rows": rows})["proto_fit"][0] == "cuda"
    without_graph = [one for one in rows if one["provider"] != "cuda graph"]
    assert gpu_table.backends({"rows": without_graph})["proto_fit"][0] == "triton"
    rows[1]["p80"] = 3.4
    assert gpu_table.backends({"rows": rows})["proto_fit"][0] == "triton"


def test_the_readme_has_the_table_of_every_gpu_that_was_measured():
    readme = (gpu.ROOT / "README.md").read_text()
    files = [path for path in (gpu.ROOT / "benchmarks/results").glob("*.json") if path.stem[:3] != "cpu"]
    assert files
    for path in files:
        record = json.loads(path.read_text())
        assert gpu_table.head_steps(record) in readme
        assert FASTEST[record["machine"]["gpu"]] == {
            op: tuple(names) for op, names in gpu_table.backends(record).items()
        }


def test_the_bench_ends_with_the_entry():
    assert gpu_table.report(RECORD).endswith(gpu_table.entry(RECORD))


def test_one_shape_lies_in_each_range_of_classes():
    places = [sum(shape.classes > most for most in RANGES) for shape in GPU_SHAPES.values()]
    assert places == list(range(len(RANGES) + 1))


def test_the_table_of_auto_is_complete():
    for ops in FASTEST.values():
        assert set(ops) == {*backend.OPS, *backend.COMPOSED}
        for names in ops.values():
            assert len(names) == len(RANGES) + 1 and set(names) <= set(gpu_table.BACKENDS)


def test_what_is_written(tmp_path):
    paths = gpu_table.write(RECORD, tmp_path)
    stem = "nvidia-some-gpu"
    assert [path.name for path in paths] == [
        f"{stem}.json", f"{stem}.csv", f"{stem}-ratios.png", f"{stem}-times.png"
    ]  # fmt: skip
    assert json.loads(paths[0].read_text()) == RECORD
    with paths[1].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(RECORD["rows"])
    assert rows[2]["ratio smart graph p50"] == "0.7" and rows[4]["status"] == "out of time"
    assert all(path.stat().st_size > 1000 for path in paths[2:])


# Stages


@pytest.fixture
def stages(monkeypatch):
    """`stages(*names, fail=...)` is the exit status and what was run."""

    def run(*names, fail=()):
        ran = []
        monkeypatch.setattr(gpu, "no_gpu", lambda: "")
        monkeypatch.setattr(
            gpu, "run", lambda stage, left: ran.append(stage) or ("failed: x" if stage in fail else "passed")
        )
        return gpu.main(list(names)), ran

    return run


def test_all_stages_run_in_order_also_after_one_that_fails(stages):
    assert stages() == (0, ["build", "test", "sanitize", "determinism", "bench"])
    assert stages(fail=["test"]) == (1, ["build", "test", "sanitize", "determinism", "bench"])
    assert stages("bench", "test") == (0, ["bench", "test"])


def test_nothing_runs_on_what_was_not_built(stages):
    assert stages(fail=["build"]) == (1, ["build"])


def test_an_unknown_stage_or_no_gpu_is_said_in_one_line(capsys):
    assert gpu.main(["tests"]) == 2
    assert gpu.main([]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "gpu: STAGE must be of build, test, sanitize, determinism, bench, got tests",
        "gpu: no CUDA device: torch.cuda.is_available() is False",
    ]


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: None)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.run("build") == "failed: needs Python package pybind11, program cmake, program nvcc"
    monkeypatch.setattr(gpu, "BUILT", tmp_path)
    assert gpu.run("test") == "failed: needs the build: run STAGE=build first"
    (tmp_path / "ulfine_fast").mkdir()
    assert "program compute-sanitizer; SANITIZER=skip" in gpu.run("sanitize")
    monkeypatch.setenv("SANITIZER", "skip")
    assert gpu.run("sanitize") == "skipped: SANITIZER=skip"


@pytest.mark.parametrize(
    ("codes", "ended"),
    [([0, 0], "passed"), ([0, 99], "failed: exit status 99 of second"), ([1, 0], "failed")],
)
def test_a_stage_fails_with_its_first_command_that_fails(monkeypatch, codes, ended):
    commands = dict(zip(("first", "second"), codes, strict=True))
    monkeypatch.setattr(gpu, "missing", lambda stage: [])
    monkeypatch.setattr(gpu, "commands", lambda stage, left: [[name] for name in commands])
    monkeypatch.setattr(
        gpu.subprocess,
        "run",
        lambda command, **options: SimpleNamespace(returncode=commands[command[0]]),
    )
    assert gpu.run("determinism").startswith(ended)


def test_commands():
    for stage in gpu.STAGES:
        for command in gpu.commands(stage, 100.0):
            scripts = [part for part in command if part.endswith(".py") and "/" in part]
            assert all((gpu.ROOT / script).exists() for script in scripts)
    (tests,) = gpu.commands("test", 100.0)
    assert "tests/test_gpu.py" in tests and "tests/test_layout.py" not in tests
    _, memcheck, racecheck = gpu.commands("sanitize", 100.0)
    assert memcheck[:5] == ["compute-sanitizer", "--error-exitcode", "99", "--tool", "memcheck"]
    assert racecheck[4] == "racecheck" and racecheck[-1] == "cuda" and memcheck[-1] != "cuda"
    assert gpu.commands("bench", 100.0)[0][-1] == "100" and gpu.commands("bench", 500.0)[0][-1] == "300"
    assert Path(gpu.environment()["PYTHONPATH"].split(":")[0]) == gpu.BUILT
