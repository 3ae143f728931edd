"""How the benchmarks measure: one process, providers in turn, medians and their spread.

A machine that others use drifts; a ratio within one round does not. In a round every provider is called a few
times in a row, as a training loop calls its step: the first call finds caches that its rivals have filled and
is reported apart, as cold. With one thread the clock is the thread's own CPU time, with more it is wall time.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ulfine_fast import _native

REPORT: list[dict] = []

# Calls of a provider in a round after the cold one.
WARM_CALLS = 4


def peak_memory(function: Callable[[], object]) -> float | None:
    """MiB of resident memory that one call needs beyond what was resident before; None outside Linux."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    _native.release_scratch()
    gc.collect()
    # Freed pages that the allocator keeps would hide the need for them.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    reset.write_text("5")
    function()
    return max(0.0, status("VmHWM") - before)


def quantiles(times: list[float]) -> dict[str, float]:
    """Median and 20th and 80th percentile, in ms."""
    fifths = statistics.quantiles(times, n=5)
    return {"p50": statistics.median(times), "p20": fifths[0], "p80": fifths[3]}


def interleaved(
    providers: dict[str, Callable[[], object]],
    reset: Callable[[str], None],
    threads: int,
    seconds: float = 10.0,
) -> dict[str, dict[str, float]]:
    """Times of all providers, taken in turn for about `seconds`, with the ratio of each to the first.

    `reset(name)` restores what a call of that provider changed, outside the clock. A round gives a provider one
    cold time and the median of its warm ones; the ratio is the median over rounds of the ratio within a round.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter

    def call(name: str) -> float:
        reset(name)
        start = clock()
        providers[name]()
        return (clock() - start) * 1e3

    for name in providers:
        for _ in range(3):
            call(name)
    warm: dict[str, list[float]] = {name: [] for name in providers}
    cold: dict[str, list[float]] = {name: [] for name in providers}
    first = next(iter(providers))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(warm[first]) < 8:
        for name in providers:
            cold[name].append(call(name))
            warm[name].append(statistics.median(call(name) for _ in range(WARM_CALLS)))
    rows = {}
    for name in providers:
        row = quantiles(warm[name]) | {"cold_p50": statistics.median(cold[name])}
        for prefix, times in (("ratio", warm), ("cold_ratio", cold)):
            ratios = [theirs / ours for theirs, ours in zip(times[name], times[first], strict=True)]
            row |= {f"{prefix}_{k}": v for k, v in quantiles(ratios).items()}
        rows[name] = row
    return rows


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest):
    """Threads of torch and of the kernels during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def compare(benchmark, threads: int):
    """`compare(name, shape, providers, reset)` checks, measures, records and reports one contest.

    Every provider returns the tensors it is there to compute; they must agree with those of the first, which
    is the library's and also becomes the test's row in the table of pytest-benchmark. Further keywords are
    notes for the report.
    """

    def run(
        name: str,
        shape: object,
        providers: dict[str, Callable[[], object]],
        reset: Callable[[str], None] = lambda name: None,
        **notes: object,
    ) -> None:
        expected = None
        for provider, function in providers.items():
            reset(provider)
            results = [t.detach().to(torch.float32).clone() for t in function()]
            expected = results if expected is None else expected
            for ours, theirs in zip(expected, results, strict=True):
                size = float(ours.abs().max()) if ours.numel() else 0.0
                torch.testing.assert_close(theirs, ours, rtol=2e-3, atol=2e-4 * size)
        rows = interleaved(providers, reset, threads)
        for provider, function in providers.items():
            reset(provider)
            rows[provider]["peak_mib"] = peak_memory(function)
        reset(next(iter(providers)))
        result = {"op": name, "shape": str(shape), "threads": threads, **notes, "providers": rows}
        REPORT.append(result)
        benchmark.extra_info.update(result)
        benchmark.pedantic(next(iter(providers.values())), rounds=20, warmup_rounds=2)

    return run


def pytest_terminal_summary(terminalreporter) -> None:
    """Print every contest, and write them to ULFINE_BENCHMARK_JSON if that is set."""
    for result in REPORT:
        notes = {k: v for k, v in result.items() if k not in ("op", "shape", "threads", "providers")}
        said = ", ".join(f"{k} {v}" for k, v in notes.items())
        clock = "CPU time" if result["threads"] == 1 else "wall time"
        terminalreporter.write_line("")
        terminalreporter.write_line(
            f"{result['op']} {result['shape']}, {result['threads']} thread(s), {clock}"
            + (f", {said}" if said else "")
        )
        for provider, row in result["providers"].items():
            peak = "" if row["peak_mib"] is None else f"  peak {row['peak_mib']:7.1f} MiB"
            terminalreporter.write_line(
                f"  {provider:16} {row['p50']:9.3f} ms [{row['p20']:.3f}, {row['p80']:.3f}]"
                f"  {row['ratio_p50']:6.2f}x [{row['ratio_p20']:.2f}, {row['ratio_p80']:.2f}]"
                f"  cold {row['cold_p50']:.3f} ms {row['cold_ratio_p50']:.2f}x{peak}"
            )
    path = os.environ.get("ULFINE_BENCHMARK_JSON")
    if path and REPORT:
        machine = {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "isa": _native.isa(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "default"),
        }
        Path(path).write_text(json.dumps({"machine": machine, "contests": REPORT}, indent=1) + "\n")
        terminalreporter.write_line(f"\nwritten: {path}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
