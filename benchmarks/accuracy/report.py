"""Tables and pictures of the study from its rows: python benchmarks/accuracy/report.py

Writes the tables into docs/accuracy.md and the pictures into results/.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from methods import ABLATIONS, BASELINES, SWEEPS
from run import DISTRIBUTIONS, RESULTS, STAGES, choose, key, read

# Choices whose bound is the best of them in every run.
HINDSIGHT = {
    "eta": [f"eta .{i}" for i in (1, 3, 5, 7, 9)],
    "weight of the text": ["fitting: text worth 4", "ulfine_plus", "fitting: text worth 64"],
    "prior of strong rows": ["ulfine_plus", "strong rows: kept prior", "strong rows: labelled prior"],
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "accuracy.md"
Rows = dict[tuple[str, str], dict[int, dict[str, Any]]]  # by cell and seed


def by_method(stage: str) -> dict[str, Rows]:
    found: dict[str, Rows] = defaultdict(lambda: defaultdict(dict))
    chosen = ABLATIONS if stage == "ablation" else choose()
    wanted = {(m, key(c)) for m, c in chosen.items()}
    for row in read(stage):
        if (row["method"], row["key"]) in wanted:
            found[row["method"]][row["pool"], row["distribution"]][row["seed"]] = row
    return {method: found[method] for method in chosen}


def average(rows: Rows, column: str, pool: str | None = None) -> float:
    """Mean over seeds, then over cells; NaN rows are left out."""
    cells = [runs for (own, _), runs in rows.items() if pool in (None, own)]
    values = [[run[column] for run in runs.values() if not math.isnan(run[column])] for runs in cells]
    values = [v for v in values if v]
    return mean(map(mean, values)) if values else float("nan")


def scores(rows: Rows, pools: tuple[str, ...]) -> str:
    """Cells of a table: "overall / few" of each pool, then overall and few of all."""
    cells = [f"{average(rows, 'overall', p):.1f} / {average(rows, 'few', p):.1f}" for p in pools]
    return " | ".join([*cells, *(f"{average(rows, c):.1f}" for c in ("overall", "few"))])


def paired(ours: Rows, theirs: Rows, cell: tuple[str, str], column: str) -> tuple[float, float]:
    """Mean and standard error over seeds of ours - theirs."""
    differences = [ours[cell][seed][column] - theirs[cell][seed][column] for seed in ours[cell]]
    return mean(differences), stdev(differences) / math.sqrt(len(differences))


def final_table(found: dict[str, Rows]) -> str:
    pools = STAGES["final"].pools
    ranks = mean_ranks(found)
    lines = [
        "| method | " + " | ".join(pools) + " | all | few | rank | tried |",
        "|---|" + "---|" * (len(pools) + 4),
    ]
    for method in sorted(found, key=lambda m: -average(found[m], "overall")):
        numbers = scores(found[method], pools)
        lines.append(f"| `{method}` | {numbers} | {ranks[method]:.1f} | {len(SWEEPS[method])} |")
    return "\n".join(lines)


def cell_table(found: dict[str, Rows], ours: str) -> str:
    """Ours against the best baseline of every cell, chosen with hindsight by its overall accuracy there."""
    lines = [
        "| data / encoder | unlabelled | best baseline | its overall | ours | difference | few | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    differences = []
    for cell in found[ours]:
        theirs = {m: mean(r["overall"] for r in found[m][cell].values()) for m in BASELINES}
        best = max(theirs, key=theirs.get)
        overall, error = paired(found[ours], found[best], cell, "overall")
        few, few_error = paired(found[ours], found[best], cell, "few")
        mine = {c: mean(r[c] for r in found[ours][cell].values()) for c in ("overall", "few")}
        differences.append((overall, few))
        lines.append(
            f"| {cell[0]} | {cell[1]} | `{best}` | {theirs[best]:.1f} | {mine['overall']:.1f} "
            f"| {overall:+.1f} ± {error:.1f} | {mine['few']:.1f} | {few:+.1f} ± {few_error:.1f} |"
        )
    lines.append(
        f"| mean | | | | | {mean(d[0] for d in differences):+.1f} | | {mean(d[1] for d in differences):+.1f} |"
    )
    return "\n".join(lines)


def chosen_table() -> str:
    found = by_method("development")
    lines = ["| method | configuration chosen | overall | few |", "|---|---|---|---|"]
    for method, configuration in choose().items():
        shown = ", ".join(f"{k} {v}" for k, v in configuration.items() if k != "preset") or "-"
        rows = found[method]
        lines.append(
            f"| `{method}` | {shown} | {average(rows, 'overall'):.1f} | {average(rows, 'few'):.1f} |"
        )
    return "\n".join(lines)


def precision_table(found: dict[str, Rows]) -> str:
    lines = [
        "| data / encoder | unlabelled | kept | precision: fused | linear | text | few: fused | linear | text |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, runs in found["ulfine_plus"].items():
        numbers = [
            100 * np.nanmean([run[f"{kind}_{branch}"] for run in runs.values()])
            for kind, branches in (("kept", ["fused"]), ("precision", BRANCHES), ("precision_few", BRANCHES))
            for branch in branches
        ]
        lines.append(f"| {cell[0]} | {cell[1]} | " + " | ".join(f"{x:.0f}" for x in numbers) + " |")
    return "\n".join(lines)


BRANCHES = ["fused", "linear", "text"]


def ablation_table(found: dict[str, Rows]) -> str:
    pools = STAGES["ablation"].pools
    lines = ["| choice | " + " | ".join(pools) + " | all | few |", "|---|" + "---|" * (len(pools) + 2)]
    for name, rows in found.items():
        lines.append(f"| {name} | {scores(rows, pools)} |")
    return "\n".join(lines)


def with_hindsight(found: dict[str, Rows], names: list[str]) -> Rows:
    """The best of these configurations by overall accuracy in every run: what choosing them better could give."""
    best: Rows = defaultdict(dict)
    for cell, runs in found[names[0]].items():
        for seed in runs:
            best[cell][seed] = max((found[n][cell][seed] for n in names), key=lambda row: row["overall"])
    return best


def mean_ranks(found: dict[str, Rows]) -> dict[str, float]:
    """Rank of each method within every run's split, by overall accuracy, averaged; 1 is best, ties share."""
    methods = list(found)
    ranks = []
    for cell in found[methods[0]]:
        for seed in found[methods[0]][cell]:
            scores = np.array([found[m][cell][seed]["overall"] for m in methods])
            ranks.append([1 + (scores > s).sum() + ((scores == s).sum() - 1) / 2 for s in scores])
    return dict(zip(methods, np.mean(ranks, axis=0), strict=True))


def colour(method: str) -> str:
    ours = {"ulfine": "tab:orange", "ulfine_plus": "tab:red", "ulfine_plus_tte": "darkred"}
    return ours.get(method, "tab:blue")


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    plt.close(figure)
    print(f"wrote {RESULTS / name}.png")


def ranks_picture(found: dict[str, Rows]) -> None:
    """Critical-difference diagram over the cells (Demsar 2006): methods within the bar do not differ at 5 %."""
    cells = list(found["ulfine_plus"])
    methods = list(found)
    scores = np.array([[mean(r["overall"] for r in found[m][c].values()) for m in methods] for c in cells])
    order = (scores[:, None, :] > scores[:, :, None]).sum(-1) + 1
    ranks = dict(zip(methods, order.mean(0), strict=True))
    # studentised range at infinite degrees of freedom over sqrt 2, Nemenyi's test
    from scipy.stats import studentized_range

    k, n = len(methods), len(cells)
    difference = studentized_range.ppf(0.95, k, np.inf) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))
    names = sorted(ranks, key=ranks.get)
    figure, axis = plt.subplots(figsize=(7.5, 0.32 * k + 1.2))
    axis.barh(range(k), [ranks[m] for m in names], color=[colour(m) for m in names], alpha=0.85)
    axis.axvspan(
        ranks[names[0]], ranks[names[0]] + difference, color="grey", alpha=0.2, label="critical difference"
    )
    axis.set_yticks(range(k), names)
    axis.invert_yaxis()
    axis.set_xlabel(f"mean rank over {n} final cells by overall accuracy, 1 is best")
    axis.legend(loc="lower right")
    save(figure, "ranks")


def gains_picture(found: dict[str, Rows], base: str = "lift") -> None:
    figure, axis = plt.subplots(figsize=(8, 5.5))
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.axvline(0, color="grey", linewidth=0.8)
    gains = {
        m: [average(rows, c) - average(found[base], c) for c in ("overall", "few")]
        for m, rows in found.items()
    }
    # the untrained ones lie far to the lower left and would squeeze the rest
    shown = sorted((g[1], g[0], m) for m, g in gains.items() if g[0] > -3)
    label = -math.inf
    for y, x, method in shown:
        axis.scatter(x, y, color=colour(method), zorder=3)
        label = max(y, label + 0.9)  # a line of text
        axis.annotate(
            method, (x, y), xytext=(4.0, label), fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "color": "lightgrey"},
        )  # fmt: skip
    axis.set_xlim(right=5.6)
    axis.set_xlabel(f"overall accuracy above {base}, points, mean of the final cells")
    axis.set_ylabel(f"few-shot accuracy above {base}, points")
    save(figure, "gains")


def ablation_picture(found: dict[str, Rows]) -> None:
    base = found["ulfine_plus"]
    names = [name for name in found if name != "ulfine_plus"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.24 * len(names) + 1), sharey=True)
    for axis, column in zip(axes, ("overall", "few"), strict=True):
        gains = [average(found[name], column) - average(base, column) for name in names]
        axis.barh(range(len(names)), gains, color=["tab:green" if g > 0 else "tab:blue" for g in gains])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"{column} accuracy against ulfine_plus, points")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].margins(y=0.01)
    axes[0].invert_yaxis()
    save(figure, "ablation")


def distributions_picture(found: dict[str, Rows]) -> None:
    """Few-shot accuracy by distribution of the unlabelled data."""
    methods = ["lift", "fixmatch_la", "ulfine", "ulfine_plus"]
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for i, method in enumerate(methods):
        values = [
            mean(
                mean(r["few"] for r in runs.values()) for (_, own), runs in found[method].items() if own == d
            )
            for d in DISTRIBUTIONS
        ]
        axis.bar(np.arange(3) + 0.2 * i, values, 0.18, label=method)
    axis.set_xticks(np.arange(3) + 0.3, DISTRIBUTIONS)
    axis.set_ylabel("few-shot accuracy, %")
    axis.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    save(figure, "distributions")


def write(tables: dict[str, str]) -> None:
    """Put each table between its marks in the document."""
    text = DOCUMENT.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    DOCUMENT.write_text(text)
    print(f"wrote the tables of {DOCUMENT}")


if __name__ == "__main__":
    final, ablation = by_method("final"), by_method("ablation")
    for name, of in HINDSIGHT.items():
        ablation[f"best {name} of every run"] = with_hindsight(ablation, of)
    write(
        {
            "chosen": chosen_table(),
            "final": final_table(final),
            "cells": cell_table(final, "ulfine_plus"),
            "cells tte": cell_table(final, "ulfine_plus_tte"),
            "precision": precision_table(final),
            "ablation": ablation_table(ablation),
        }
    )
    ranks_picture(final)
    gains_picture(final)
    distributions_picture(final)
    ablation_picture(ablation)
