"""The goals on a GPU, and a file that `make gpu` wrote as one table: python benchmarks/gpu_table.py FILE.

Below the table stand the lines of the GPU for ulfine_fast/fastest.py.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from shapes import GPU_SHAPES


class Goal(NamedTuple):
    """What a column of our rows of the head step should say."""

    column: str
    limits: dict[str, float]  # by shape
    most: bool = False  # the value should be at most the limit, not at least
    how: str = ""  # "graph": only of rows measured as a CUDA graph, "plain": only of the others
    precision: str = ""


# Set from the roofline and the number of launches before anything was measured.
GOALS = (
    Goal("us", {"A": 20, "B": 32, "C": 190, "D": 1000}, most=True, how="graph"),
    Goal("launches", {"A": 5, "B": 5, "C": 10, "D": 10}, most=True),
    Goal("naive eager", {"A": 50, "B": 35, "C": 12, "D": 15}, how="graph"),
    Goal("naive eager", {"A": 15, "B": 15, "C": 10, "D": 15}, how="plain"),
    Goal("naive reduce-overhead", {"A": 4, "B": 4, "C": 5, "D": 8}, how="graph"),
    Goal("smart reduce-overhead", {"A": 3, "B": 2.5, "C": 1.5, "D": 1.4}, how="graph"),
    Goal("of roofline", {"C": 0.4, "D": 0.5}, how="graph"),
    Goal("memory / naive", {"C": 0.1, "D": 0.03}, most=True, how="plain"),
    Goal("memory / smart", {"C": 0.4, "D": 0.25}, most=True, how="plain"),
    Goal("gradient error", dict.fromkeys("ABCD", 2e-5), most=True, how="plain", precision="ieee"),
    Goal("gradient error", dict.fromkeys("ABCD", 1e-3), most=True, how="plain", precision="tf32"),
)
# The same of our rows of `pseudo_label`, whose logits are then 100 times a cosine.
LABEL_GOALS = (
    Goal("confidence error / autocast", dict.fromkeys("ABCD", 0.2), most=True, how="plain"),
    Goal("argmax flips", dict.fromkeys("ABCD", 1e-3), most=True, how="plain"),
)
GOALS_OF = {"head step": GOALS, "pseudo_label": LABEL_GOALS}

OURS = ("triton", "cuda", "triton graph", "cuda graph")
# Providers that `auto` chooses among.
BACKENDS = ("reference", "triton", "cuda")
RIVALS = (
    "reference",
    "naive eager",
    "naive compiled",
    "naive reduce-overhead",
    "naive graph",
    "smart eager",
    "smart compiled",
    "smart reduce-overhead",
    "smart graph",
)
COLUMNS = (
    "us",
    "launches",
    "of roofline",
    *RIVALS,
    "strongest",
    "memory / naive",
    "memory / smart",
    "confidence error / autocast",
    "argmax flips",
    "gradient error",
)


def place(row: dict) -> str:
    """Op, loss, shape and precision of a row."""
    return " ".join(filter(None, (row["op"], row["loss_on"], row["shape"], row["precision"])))


def defective(row: dict) -> bool:
    """Whether a provider of ours gave a wrong result or none; too little memory or time is no defect."""
    return row["provider"] in OURS and row["status"].startswith(("wrong", "failed"))


def values(row: dict, rivals: dict[str, dict]) -> dict[str, float]:
    """What was measured of a row of ours, by column; `rivals` are the other rows of its place."""
    found = {rival: ratio["p50"] for rival, ratio in row.get("ratios", {}).items()}
    if found:
        found["strongest"] = min(found.values())
    if "p50" in row:
        found["us"] = row["p50"] * 1e3
    for column in ("launches", "of roofline", "argmax flips", "gradient error"):
        key = column.replace(" ", "_")
        if key in row:
            found[column] = row[key]
    if "confidence_error" in row and row["autocast_confidence_error"]:
        found["confidence error / autocast"] = row["confidence_error"] / row["autocast_confidence_error"]
    for family in ("naive", "smart"):
        theirs = rivals.get(f"{family} eager", {}).get("peak_mib")
        if theirs and "peak_mib" in row:
            found[f"memory / {family}"] = row["peak_mib"] / theirs
    return found


def verdict(row: dict, column: str, value: float | None) -> str:
    """What the goal of a column says of a value: met, missed or not measured; empty without a goal."""
    how = "graph" if row["provider"].endswith("graph") else "plain"
    for goal in GOALS_OF.get(row["op"], ()):
        fits = goal.column == column and goal.how in ("", how) and goal.precision in ("", row["precision"])
        if fits and row["shape"] in goal.limits:
            limit = goal.limits[row["shape"]]
            wanted = f"({'<=' if goal.most else '>='} {limit:g})"
            if value is None:
                return f"not measured {wanted}"
            met = value <= limit if goal.most else value >= limit
            return f"{'met' if met else 'MISSED'} {wanted}"
    return ""


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['p50']:.2f}x [{ratio['p20']:.2f}, {ratio['p80']:.2f}]"


def _shown(column: str, value: float, row: dict) -> str:
    if column == "us":
        return f"{value:.1f} [{row['p20'] * 1e3:.1f}, {row['p80'] * 1e3:.1f}]"
    if column == "strongest":
        name, ratio = min(row["ratios"].items(), key=lambda item: item[1]["p50"])
        lost = " LOST" if value < 1.0 else ""
        return f"{name} {_times(ratio)}{lost}"
    if column in RIVALS:
        return f"{value:.2f}x"
    return f"{value:.0f}" if column == "launches" else f"{value:.3g}"


def cell(row: dict, column: str, rivals: dict[str, dict]) -> str:
    """One cell of a row of ours: the value and the verdict, or why there is no value."""
    value = values(row, rivals).get(column)
    if value is None:
        why = rivals.get(column, {}).get("status", "ok") if row["status"] == "ok" else row["status"]
        said = "" if why == "ok" else why
    else:
        said = _shown(column, value, row)
    judged = verdict(row, column, value)
    return " ".join(filter(None, (said, judged))) or "-"


def places(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Rows by place and provider."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(place(row), {})[row["provider"]] = row
    return found


def table(record: dict) -> str:
    """One row per provider of ours and place; the rivals are columns that say how many times longer they take."""
    header = ["op", "loss on", "shape", "precision", "ours", *COLUMNS]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for rivals in places(record["rows"]).values():
        for name in OURS:
            if name in rivals:
                row = rivals[name]
                cells = [row["op"], row["loss_on"] or "-", row["shape"], row["precision"], name]
                cells += [cell(row, column, rivals) for column in COLUMNS]
                lines.append("| " + " | ".join(text.replace("|", "/") for text in cells) + " |")
    return "\n".join([_told(record), "", *lines])


def head_steps(record: dict) -> str:
    """The README's table: our head step by the cuda back end, plain and as a graph, against each rival run alike."""
    graphed = ("naive graph", "smart graph", "naive reduce-overhead", "smart reduce-overhead")
    plain = ("naive eager", "smart eager")
    header = ["labelled x unlabelled x classes x dims", "loss on", "plain, us", *plain]
    header += ["graph, us", *graphed, "of roofline"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for rows in places(record["rows"]).values():
        ours = rows.get("cuda", {}), rows.get("cuda graph", {})
        if ours[0].get("op") != "head step" or "p50" not in ours[0] or "p50" not in ours[1]:
            continue
        cells = [str(GPU_SHAPES[ours[0]["shape"]]), ours[0]["loss_on"]]
        for row, rivals in zip(ours, (plain, graphed), strict=True):
            cells.append(_shown("us", row["p50"] * 1e3, row))
            for rival in rivals:
                ratio = row["ratios"].get(rival)
                cells.append(_times(ratio) if ratio else "-")
        cells.append(f"{100 * ours[1]['of_roofline']:.0f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def backends(record: dict) -> dict[str, list[str]]:
    """The fastest of BACKENDS by op, then at each shape: plain calls, float32 as it is, every loss of the op.

    Plain calls may wait for the host alone. Those that are level within the spread are told apart as graphs.
    """
    wanted = (*BACKENDS, *map(_as_graph, BACKENDS))
    rows = [row for row in record["rows"] if row["precision"] == "ieee" and row["provider"] in wanted]
    by_op: dict[str, list[dict]] = {}
    for row in rows:
        by_op.setdefault("head_loss" if row["op"] == "head step" else row["op"], []).append(row)
    return {
        op: [_fastest_backend([row for row in rows if row["shape"] == shape]) for shape in GPU_SHAPES]
        for op, rows in by_op.items()
    }


def _as_graph(name: str) -> str:
    return f"{name} graph"


def _fastest_backend(rows: list[dict]) -> str:
    def total(name: str, quantile: str) -> float:
        found = [row.get(quantile, math.inf) for row in rows if row["provider"] == name]
        return sum(found) if found else math.inf

    plain = [row for row in rows if row["provider"] in BACKENDS]
    # What had no turn might have been faster.
    if not plain or any(row["status"] == "out of time" for row in plain):
        return "reference"
    fastest = min(BACKENDS, key=lambda name: total(name, "p50"))
    level = [name for name in BACKENDS if total(name, "p50") <= total(fastest, "p80")]
    graphs = {name: total(_as_graph(name), "p50") for name in level}
    return min(graphs, key=graphs.__getitem__) if max(graphs.values()) < math.inf else fastest


def entry(record: dict) -> str:
    """The GPU's lines for ulfine_fast/fastest.py."""
    ops = [
        f"        {json.dumps(op)}: ({json.dumps(names)[1:-1]})," for op, names in backends(record).items()
    ]
    return "\n".join([f"    {json.dumps(record['machine']['gpu'])}: {{", *ops, "    },"])


def report(record: dict) -> str:
    """The table, and what follows from it for `auto`."""
    return f"{table(record)}\n\nFor ulfine_fast/fastest.py:\n\n{entry(record)}"


def _told(record: dict) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    rates = record["rates"]
    reached = ", ".join(f"{key} {rates[key] / 1e12:.0f} TFLOP/s" for key in ("ieee", "tf32", "fp16"))
    return f"{machine}\nmeasured here: {reached}, copy {rates['copy'] / 1e9:.0f} GB/s"


def flat(row: dict) -> dict[str, object]:
    """A row without nesting, for CSV."""
    plain = {key: value for key, value in row.items() if key != "ratios"}
    for rival, ratio in row.get("ratios", {}).items():
        plain |= {f"ratio {rival} {key}": value for key, value in ratio.items()}
    return plain


def write(record: dict, folder: Path) -> list[Path]:
    """Write the record as JSON, CSV and pictures named after the GPU; the paths."""
    stem = re.sub(r"[^a-z0-9]+", "-", record["machine"]["gpu"].lower()).strip("-")
    data, sheet = folder / f"{stem}.json", folder / f"{stem}.csv"
    data.write_text(json.dumps(record, indent=1) + "\n")
    rows = [flat(row) for row in record["rows"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return [data, sheet, *pictures(record, folder, stem)]


def pictures(record: dict, folder: Path, stem: str) -> list[Path]:
    """Of the head step: bars of the ratios to each rival, and the times of all providers, by place."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps = {
        name.removeprefix("head step "): rows
        for name, rows in places(record["rows"]).items()
        if name.startswith("head step") and _fastest(rows)
    }
    best = {name: _fastest(rows) for name, rows in steps.items()}
    bars = {
        "ratios": (
            RIVALS,
            "times longer than our fastest",
            lambda name, rival: best[name].get("ratios", {}).get(rival, {}).get("p50"),
        ),
        "times": ((*OURS, *RIVALS), "ms", lambda name, provider: steps[name].get(provider, {}).get("p50")),
    }
    paths = []
    for what, (names, label, height) in bars.items():
        figure, axes = plt.subplots(figsize=(14, 5), layout="constrained")
        width = 0.85 / len(names)
        for index, name in enumerate(names):
            heights = [height(step, name) or float("nan") for step in steps]
            at = [place + index * width for place in range(len(steps))]
            axes.bar(at, heights, width, label=name, color=mpl.colormaps["tab20"](index))
        if what == "ratios":
            axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_xticks([at + 0.4 for at in range(len(steps))], steps)
        axes.set_ylabel(label)
        axes.set_title(f"Head step, {record['machine']['gpu']}")
        figure.legend(loc="outside lower center", ncols=7, fontsize="small")
        paths.append(folder / f"{stem}-{what}.png")
        figure.savefig(paths[-1], dpi=100)
        plt.close(figure)
    return paths


def _fastest(rows: dict[str, dict]) -> dict:
    timed = [rows[name] for name in OURS if "p50" in rows.get(name, {})]
    return min(timed, key=lambda row: row["p50"], default={})


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())))
