"""Renders a file that `make bench` wrote as the tables of the README: python benchmarks/table.py FILE."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def head_step_table(contests: list[dict]) -> str:
    """One row per shape, loss and thread count: the fused time, and every provider as a ratio to it."""
    steps = [c for c in contests if c["op"] == "head step"]
    rivals = list(steps[0]["providers"])[1:]
    lines = [
        "| labelled x unlabelled x classes x dims | loss on | threads | ours, ms | "
        + " | ".join(rivals)
        + " |",
        "|---|---|---|---|" + "---|" * len(rivals),
    ]
    for c in sorted(
        steps, key=lambda c: (c["threads"], [int(n) for n in c["shape"].split("x")], c["loss_on"] != "fused")
    ):
        ours = c["providers"]["fused"]
        cells = [
            c["shape"], c["loss_on"], c["threads"], f"{ours['p50']:.2f} [{ours['p20']:.2f}, {ours['p80']:.2f}]"
        ]  # fmt: skip
        cells += [_ratio(c["providers"][name]) for name in rivals]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def op_table(contests: list[dict]) -> str:
    """One row per op and shape with one thread: ratio to the fastest rival, and peak memory of both."""
    lines = [
        "| op | shape | ours, ms | strongest rival | ratio | peak MiB, ours / rival |",
        "|---|---|---|---|---|---|",
    ]
    for c in contests:
        if c["threads"] != 1 or c["op"] == "head step":
            continue
        providers = dict(c["providers"])
        ours = providers.pop("fused")
        name, rival = min(providers.items(), key=lambda item: item[1]["p50"])
        op = c["op"] + (f" ({c['loss_on']})" if "loss_on" in c else "")
        memory = " / ".join("-" if r["peak_mib"] is None else f"{r['peak_mib']:.1f}" for r in (ours, rival))
        lines.append(f"| `{op}` | {c['shape']} | {ours['p50']:.3f} | {name} | {_ratio(rival)} | {memory} |")
    return "\n".join(lines)


def _ratio(row: dict) -> str:
    spread = f"[{row['ratio_p20']:.2f}, {row['ratio_p80']:.2f}]"
    return f"{row['ratio_p50']:.2f}x {spread}, {row['cold_ratio_p50']:.2f}x cold"


if __name__ == "__main__":
    record = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(record["machine"]))
    print(head_step_table(record["contests"]))
    print()
    print(op_table(record["contests"]))
