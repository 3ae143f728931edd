"""Times every contest on the GPU: python benchmarks/gpu_bench.py SECONDS; `make gpu` calls it.

Each shape has a process of its own, one after the other. After a fault on the device nothing more can run in that
process: another one goes on with what is left, without the provider that met the fault.

A round gives every provider one block of calls in a row, as a training loop calls its step, between two CUDA
events: what the host takes longer than the device counts, and data of one call may still be in the cache at the
next. A ratio is taken within a round. Before a block the state is put back, so every provider sees the same
prototypes. Whatever was not timed is a row that says why.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import bench_pseudo_label
import gpu_table
import torch
import triton
from contests import COMPILED, CONTESTS, PROVIDERS, Contest, Provider, Results, prepared, providers
from gpu_checks import tf32
from shapes import (
    ALIGN,
    ETA,
    GPU_SHAPES,
    ORTHOGONALITY_WEIGHT,
    SCALE,
    SCALE_ROWS,
    Shape,
    StepInputs,
    Work,
    least_work,
    step_inputs,
)
from torch import Tensor

from ulfine_fast import use_backend
from ulfine_fast.head_loss import head_loss
from ulfine_fast.ops import pseudo_label

RESULTS = Path(__file__).parent / "results"
# Shares of the whole time and of a contest's that go to compiling ahead, and to preparing and checking.
COMPILING, PREPARING = 0.3, 0.75
# A head step has the most rivals to compile.
WEIGHT = {"head step": 3.0}
# Seconds that a shape's process may take longer than it was given, and how it ends after a fault on the device.
LATE, LOST = 60.0, 3
# A block lasts about this long, but has no more calls.
BLOCK_MS, BLOCK_CALLS = 2.0, 50
ROUNDS_LEAST, ROUNDS_MOST = 5, 100
# Of values that may differ: relative, relative to the largest, and the share of them that may be further off.
# Rounding to TF32 may decide whether a row is kept.
TOLERANCE = {"ieee": (2e-3, 2e-4, 0.0), "tf32": (2e-2, 5e-3, 0.01)}
# The scale of the logits for which accuracy is told.
SHARP = 100.0


class Bout(NamedTuple):
    """A contest at a shape and a precision."""

    contest: Contest
    shape: str
    precision: str


class Machine(NamedTuple):
    """What the device reaches, measured in this run: FLOP/s of the largest products, byte/s of a copy."""

    ieee: float
    tf32: float
    fp16: float
    copy: float

    def least_ms(self, work: Work, precision: str) -> float:
        """Milliseconds below which `work` cannot be done."""
        return max(work.flops / getattr(self, precision), work.bytes / self.copy) * 1e3


def schedule(shapes: dict[str, Shape]) -> list[Bout]:
    """All bouts, those that matter most first: whole steps, then ops, then both with TF32 at large shapes."""
    ordered = sorted(CONTESTS, key=lambda contest: contest.op != "head step")
    ieee = [Bout(contest, shape, "ieee") for contest in ordered for shape in shapes]
    large = [shape for shape in shapes if shape not in ("A", "B")]
    return ieee + [Bout(contest, shape, "tf32") for contest in ordered for shape in large]


@cache
def inputs(shape: Shape) -> StepInputs:
    """Inputs of a shape, on the processor."""
    return step_inputs(shape)


# Measuring


class DeviceLost(RuntimeError):
    """After a fault on the device every later call fails; `rows` say whose it was."""

    def __init__(self, rows: list[dict]) -> None:
        super().__init__(rows[0]["status"])
        self.rows = rows


def lost() -> bool:
    """Whether a fault has ended all work on the device in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def block_ms(call: Callable[[], object], calls: int) -> float:
    """Milliseconds per call of `calls` calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def peak_mib(call: Callable[[], object]) -> float:
    """MiB that one call needs beyond what was allocated before."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def launches(calls: dict[str, Callable[[], object]]) -> dict[str, int]:
    """What the device runs in one call of each: kernels, copies and fills."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for name, call in calls.items():
            with torch.profiler.record_function(name):
                call()
                torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return counted(json.loads(path.read_text())["traceEvents"], list(calls))


def counted(events: list[dict], names: list[str]) -> dict[str, int]:
    """How many device events of a trace lie within the range of each name."""
    device = [e["ts"] for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    ranges = {e["name"]: e for e in events if e.get("cat") == "user_annotation" and e["name"] in names}
    return {name: sum(e["ts"] <= ts <= e["ts"] + e["dur"] for ts in device) for name, e in ranges.items()}


def measure_machine() -> Machine:
    """Rates of the device: the best of products of 8192 x 8192 and of copies of 1 GiB."""

    def rate(amount: float, call: Callable[[], object]) -> float:
        call()
        return amount / min(block_ms(call, 3) for _ in range(5)) * 1e3

    def product(dtype: torch.dtype, allowed: bool) -> float:
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        with tf32(allowed):
            return rate(2.0 * 8192**3, lambda: a @ b)

    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = rate(2.0 * source.nbytes, lambda: target.copy_(source))
    return Machine(
        product(torch.float32, False), product(torch.float32, True), product(torch.float16, False), copy
    )


# Comparing


def disagreement(results: Results, expected: Results, precision: str) -> str:
    """Why `results` are not those expected; empty where they are."""
    relative, of_largest, share = TOLERANCE[precision]
    for index, (got, want) in enumerate(zip(results, expected, strict=True)):
        got, want = got.detach().double(), want.detach().double()
        if got.shape != want.shape:
            return f"result {index} is {list(got.shape)}, expected {list(want.shape)}"
        largest = want.abs().max().item() if want.numel() else 0.0
        off = ~((got - want).abs() <= relative * want.abs() + of_largest * largest)
        if off.sum().item() > share * off.numel():
            return f"result {index} differs in {off.sum().item()} of {off.numel()} values"
    return ""


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"p50": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def interleaved(blocks: dict[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every provider in every round; rounds go on for about `seconds`."""
    times = {name: [] for name in blocks}
    end = time.perf_counter() + seconds
    for done in range(ROUNDS_MOST):
        if done >= ROUNDS_LEAST and time.perf_counter() > end:
            break
        for name, block in blocks.items():
            times[name].append(block())
    return times


def ratios(times: dict[str, list[float]], ours: str, rivals: list[str]) -> dict[str, dict[str, float]]:
    """How many times longer each rival takes than `ours`, round by round."""
    return {
        rival: quantiles([theirs / mine for theirs, mine in zip(times[rival], times[ours], strict=True)])
        for rival in rivals
        if rival in times
    }


def first_line(error: Exception) -> str:
    """Type and first line of the message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


def row_of(bout: Bout, provider: Provider, status: str = "ok") -> dict:
    """What every row says."""
    return {
        "op": bout.contest.op,
        "loss_on": bout.contest.loss_on,
        "shape": bout.shape,
        "precision": bout.precision,
        "provider": provider.name,
        "status": status,
    }


def measure(
    bout: Bout, start: StepInputs, seconds: float, machine: Machine, without: frozenset[str] = frozenset()
) -> list[dict]:
    """One row per provider that is not in `without`; `status` is "ok", or why there is no time."""
    end = time.perf_counter() + seconds
    contest = bout.contest
    given = contest.give(start)
    rows, calls, expected = {}, {}, None
    for provider in providers(contest):
        if provider.name in without:
            continue
        row = rows[provider.name] = row_of(bout, provider)
        if time.perf_counter() > end - (1.0 - PREPARING) * seconds:
            row["status"] = "out of time"
            continue
        try:
            s = start.to(start.rows.device.type)
            with use_backend(provider.backend):
                call = prepared(contest, provider, s, given)
                s.restore(start)
                results = [tensor.detach().clone() for tensor in call()]
                expected = results if expected is None else expected
                wrong = disagreement(results, expected, bout.precision)
                if wrong:
                    row["status"] = f"wrong: {wrong}"
                    continue
                del results
                if provider.how == "eager":
                    row["peak_mib"] = peak_mib(call)
                calls[provider.name] = (call, s, provider.backend, calls_per_block(call))
        except torch.cuda.OutOfMemoryError:
            row["status"] = "out of memory"
        except Exception as error:
            # Whatever a provider raises is its result.
            row["status"] = f"failed: {first_line(error)}"
            if lost():
                raise DeviceLost([row]) from error
    times = interleaved(
        {name: _block(*call, start) for name, call in calls.items()}, end - time.perf_counter()
    )
    least = machine.least_ms(least_work(contest.op, contest.loss_on, start), bout.precision)
    for name, values in times.items():
        rows[name] |= {**quantiles(values), "rounds": len(values)}
        rows[name]["of_roofline"] = least / rows[name]["p50"]
    for provider in providers(contest):
        if provider.family == "ours" and provider.name in times:
            rivals = [other.name for other in providers(contest) if other.family != "ours"]
            rows[provider.name]["ratios"] = ratios(times, provider.name, rivals)
    try:
        for name, count in _launches(calls, start).items():
            rows[name]["launches"] = count
    except RuntimeError as error:
        # Without a profiler the times stand all the same, and the table says what is missing.
        print("launches not counted:", first_line(error), file=sys.stderr)
    return list(rows.values())


def calls_per_block(call: Callable[[], object]) -> int:
    """How many calls make a block; the first few capture what they will replay."""
    for _ in range(3):
        call()
    return max(1, min(BLOCK_CALLS, math.ceil(BLOCK_MS / block_ms(call, 3))))


def _block(
    call: Callable[[], object], s: StepInputs, backend: str, count: int, start: StepInputs
) -> Callable[[], float]:
    def block() -> float:
        s.restore(start)
        with use_backend(backend):
            return block_ms(call, count)

    return block


def _launches(calls: dict, start: StepInputs) -> dict[str, int]:
    def once(call: Callable[[], object], s: StepInputs, backend: str) -> Callable[[], object]:
        def run() -> None:
            with use_backend(backend):
                call()

        s.restore(start)
        return run

    return launches({name: once(call, s, backend) for name, (call, s, backend, _) in calls.items()})


# Accuracy


def accuracy(start: StepInputs, backend: str) -> dict[str, float]:
    """Error of the confidence and share of other labels against float64, ours and those of autocast eager."""
    s, device = start, start.rows.device.type
    arguments = s.weak, s.linear.detach(), s.textual.detach()
    options = {"align": ALIGN, "eta": ETA, "linear_scale": SHARP, "proto_scale": SHARP}
    exact = pseudo_label(*(t.double() for t in arguments), **options, backend="reference")
    ours = pseudo_label(*arguments, **options, backend=backend)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        label, confidence, *_ = bench_pseudo_label.naive(*arguments, 0.5, SHARP)

    def error(confidence: Tensor) -> float:
        return (confidence.double() - exact.confidence).abs().mean().item()

    def flips(label: Tensor) -> float:
        return (label != exact.label).double().mean().item()

    return {
        "confidence_error": error(ours.confidence),
        "argmax_flips": flips(ours.label),
        "autocast_confidence_error": error(confidence),
        "autocast_argmax_flips": flips(label),
    }


def gradient_error(start: StepInputs, backend: str, loss_on: str) -> float:
    """Largest error of the step's gradients against float64, of the largest gradient of each input."""

    def gradients(s: StepInputs, backend: str) -> list[Tensor]:
        loss, _ = head_loss(
            s.rows, s.weak, s.targets, s.linear, s.textual, s.threshold, adjustment=s.adjustment, align=ALIGN,
            eta=ETA, linear_scale=SCALE, proto_scale=SCALE, scale_rows=SCALE_ROWS, loss_on=loss_on,
            orthogonality_weight=ORTHOGONALITY_WEIGHT, backend=backend,
        )  # fmt: skip
        return torch.autograd.grad(loss, (s.rows, s.linear, s.textual))

    device = start.rows.device.type
    exact = gradients(start.to(device, torch.float64), "reference")
    ours = gradients(start.to(device), backend)
    return max(
        ((mine - true).abs().max() / true.abs().max()).item() for mine, true in zip(ours, exact, strict=True)
    )


def add_accuracy(rows: list[dict], bout: Bout, start: StepInputs) -> None:
    """Write into our rows of pseudo-labels and of steps how far from float64 they are."""
    for row in rows:
        if row["provider"] not in ("triton", "cuda") or row["status"] != "ok":
            continue
        try:
            if bout.contest.op == "pseudo_label":
                row |= accuracy(start, row["provider"])
            elif bout.contest.op == "head step":
                row["gradient_error"] = gradient_error(start, row["provider"], bout.contest.loss_on)
        except torch.cuda.OutOfMemoryError:
            row["accuracy"] = "out of memory"


# All of it


def compile_share(share: int, shares: int) -> None:
    """Compile every `shares`-th bout, so that the compilers' caches on disk have it."""
    for bout in schedule(GPU_SHAPES)[share::shares]:
        start = inputs(GPU_SHAPES[bout.shape]).to("cuda")
        torch.compiler.reset()
        with tf32(bout.precision == "tf32"):
            given = bout.contest.give(start)
            for provider in providers(bout.contest):
                if provider.how in COMPILED or provider.name == "triton":
                    try:
                        with use_backend(provider.backend):
                            prepared(bout.contest, provider, start.to("cuda"), given)()
                    except Exception as error:  # noqa: BLE001 the bout itself will say so in its row
                        print(first_line(error), file=sys.stderr)


def compile_ahead(seconds: float) -> None:
    """Compile in several processes at once, for one alone would take most of the time."""
    compilers = max(1, (os.cpu_count() or 1) // 2)
    command = [sys.executable, __file__, "compile"]
    workers = [
        subprocess.Popen(
            [*command, str(share), str(compilers)], stderr=subprocess.DEVNULL, start_new_session=True
        )
        for share in range(compilers)
    ]
    end = time.perf_counter() + seconds
    for worker in workers:
        try:
            worker.wait(max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            # With the processes that compile for it.
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def described() -> dict[str, object]:
    """The machine and the versions."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }


def all_bouts(
    shapes: dict[str, Shape], seconds: float, device: str, machine: Machine, done: dict[Bout, frozenset[str]]
) -> Iterator[dict]:
    """Rows of every bout, each with its share of the time that is left, but those of the providers that are done."""
    end = time.perf_counter() + seconds
    bouts = [
        bout for bout in schedule(shapes) if {p.name for p in providers(bout.contest)} - done.get(bout, set())
    ]
    for number, bout in enumerate(bouts):
        without = done.get(bout, frozenset())
        left = max(0.0, end - time.perf_counter())
        try:
            # Graphs of the compiler hold memory of their own.
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
            start = inputs(shapes[bout.shape]).to(device)
            with tf32(bout.precision == "tf32"):
                rows = measure(bout, start, left * weight([bout]) / weight(bouts[number:]), machine, without)
                add_accuracy(rows, bout, start)
        except DeviceLost:
            raise
        except RuntimeError as error:
            failed = f"failed: {first_line(error)}"
            rows = [row_of(bout, p, failed) for p in providers(bout.contest) if p.name not in without]
            if lost():
                raise DeviceLost(rows) from error
        yield from rows


def read_rows(path: Path) -> list[dict]:
    """What `measure_shape` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def measure_shape(shape: str, seconds: float, machine: Machine, path: Path) -> int:
    """Add to `path` the rows of a shape that are not there, a line of JSON each, as soon as they are measured.

    Exit status: 0, or LOST.
    """
    shapes, rows = {shape: GPU_SHAPES[shape]}, read_rows(path)
    done = {
        bout: frozenset(row["provider"] for row in rows if gpu_table.place(row) == place_of(bout))
        for bout in schedule(shapes)
    }
    with path.open("a") as lines:

        def write(row: dict) -> None:
            print(json.dumps(row), file=lines, flush=True)
            if row["status"] != "ok":
                print(gpu_table.place(row), row["provider"], row["status"], file=sys.stderr)

        try:
            for row in all_bouts(shapes, seconds, "cuda", machine, done):
                write(row)
        except DeviceLost as fault:
            for row in fault.rows:
                write(row)
            return LOST
    return 0


def place_of(bout: Bout) -> str:
    """Place of the rows of a bout."""
    return gpu_table.place(row_of(bout, PROVIDERS[0]))


def rows_of_shape(shape: str, seconds: float, machine: Machine, command: list[str]) -> list[dict]:
    """Rows of a shape, measured by `command` in processes of their own; what they did not get to says why."""
    end = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.touch()
        rows, ended, before = [], "", -1
        # One that ends without a row would end so again.
        while len(rows) > before and ended in ("", f"ended with {LOST}"):
            left, before = max(0.0, end - time.perf_counter()), len(rows)
            words = [*command, shape, str(left), json.dumps(machine), str(path)]
            try:
                ended = f"ended with {subprocess.run(words, timeout=left + LATE).returncode}"
            except subprocess.TimeoutExpired:
                ended = "did not end"
            rows = read_rows(path)
    found = {(gpu_table.place(row), row["provider"]) for row in rows}
    missing = (
        row_of(bout, provider, f"failed: the process of the shape {ended}")
        for bout in schedule({shape: GPU_SHAPES[shape]})
        for provider in providers(bout.contest)
    )
    return rows + [row for row in missing if (gpu_table.place(row), row["provider"]) not in found]


def weight(bouts: list[Bout]) -> float:
    """Share of the time, in that of an op."""
    return sum(WEIGHT.get(bout.contest.op, 1.0) for bout in bouts)


def main(seconds: float) -> int:
    """Exit status: 0, or 1 where a provider of ours is wrong or fails."""
    end = time.perf_counter() + seconds
    compile_ahead(COMPILING * seconds)
    machine = measure_machine()
    torch.cuda.empty_cache()
    rows, left = [], {shape: weight(schedule({shape: GPU_SHAPES[shape]})) for shape in GPU_SHAPES}
    for shape in GPU_SHAPES:
        share = left[shape] / sum(left.values())
        rows += rows_of_shape(
            shape, share * (end - time.perf_counter()), machine, [sys.executable, __file__, "shape"]
        )
        del left[shape]
    record = {"machine": described(), "rates": machine._asdict(), "rows": rows}
    for path in gpu_table.write(record, RESULTS):
        print(f"written: {path}")
    print(gpu_table.report(record))
    return int(any(gpu_table.defective(row) for row in rows))


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        compile_share(*map(int, sys.argv[2:]))
    elif sys.argv[1] == "shape":
        name, given, rates, file = sys.argv[2:]
        sys.exit(measure_shape(name, float(given), Machine(*json.loads(rates)), Path(file)))
    else:
        sys.exit(main(float(sys.argv[1])))
