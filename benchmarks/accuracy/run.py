"""Runs the study: every configuration on every cell of a stage, over all cores, resumable.

    python benchmarks/accuracy/run.py development
    python benchmarks/accuracy/run.py final
    python benchmarks/accuracy/run.py ablation
    python benchmarks/accuracy/run.py final --pool cifar10/lite0 --method ulfine_plus --seed 100   # one row again

A row of results/<stage>.csv is one run; a second call adds the rows that are missing. `final` runs, for each method, the
configuration that the rows of `development` choose.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from closed import debiased, discriminant, tip_adapter
from data import draw, load_pool
from engine import recipe, train
from methods import ABLATIONS, SWEEPS, Configuration
from torch import Tensor
from tqdm import tqdm

from ulfine_fast.config import CACHED, Training
from ulfine_fast.features import FeatureData
from ulfine_fast.splits import groups_by_rank

RESULTS = Path(__file__).parent / "results"
DISTRIBUTIONS = ("consistent", "uniform", "reversed")
# Suffix of a preset that is tested on the mean of its logits over the plain and the weak views of an example.
ENSEMBLED = "_tte"


class Stage(NamedTuple):
    """Cells of a stage, and which part of a pool judges."""

    pools: tuple[str, ...]
    seeds: tuple[int, ...]
    held_out: str


DEVELOPMENT = Stage(("fashion-mnist/lite0", "wordnet-verbs/minilm", "mnist/lite0"), (0, 1, 2), "validation")
STAGES = {
    "development": DEVELOPMENT,
    "ablation": DEVELOPMENT._replace(seeds=(0,)),
    "final": Stage(
        ("cifar10/lite0", "cifar10/lite2", "mnist/lite2", "fashion-mnist/lite2", "wordnet-nouns/minilm"),
        (200, 201, 202, 203, 204),
        "test",
    ),
}
DIAGNOSTICS = (
    *(
        f"{kind}_{branch}"
        for branch in ("fused", "linear", "text")
        for kind in ("accuracy", "kept", "precision", "precision_few")
    ),
    "distribution_l1",
    "eta",
)
ACCURACIES = ("overall", "many", "medium", "few", "worst")
COLUMNS = (
    "pool", "distribution", "seed", "method", "key", "configuration", *ACCURACIES, *DIAGNOSTICS, "seconds",
)  # fmt: skip


def key(configuration: Configuration) -> str:
    """Hash that names a configuration in the rows."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:12]


def execute(
    configuration: Configuration, data: FeatureData, views: Tensor, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """Logits of the held-out rows, and diagnostics. `views` [K, N, D]: more views of these rows."""
    options = dict(configuration)
    preset = options.pop("preset")
    if preset == "tip_adapter":
        return tip_adapter(data, **options), {}
    if preset == "discriminant":
        return discriminant(data, **options), {}
    rate = {"learning_rate": options.pop("learning_rate")} if "learning_rate" in options else {}
    schedule = Training(seed=seed, steps=CACHED["steps"], **rate)
    if preset == "gla":
        scale = options.pop("scale")
        return debiased(data, recipe("lift", **options), schedule, scale=scale), {}
    if preset.endswith(ENSEMBLED):
        # a view is one more test row: the mean of the logits over views is the ensemble
        everything = replace(data, test=torch.cat([data.test, *views]))
        fitted = train(everything, recipe(preset.removesuffix(ENSEMBLED), **options), schedule)
        return fitted.logits.unflatten(0, (1 + len(views), -1)).mean(0), fitted.diagnostics
    fitted = train(data, recipe(preset, **options), schedule)
    return fitted.logits, fitted.diagnostics


def accuracies(logits: Tensor, data: FeatureData) -> dict[str, float]:
    """Accuracy in % over classes of equal weight, and over thirds of the classes by labelled examples."""
    right = logits.argmax(-1) == data.test_labels
    classes = range(logits.shape[1])
    per_class = torch.stack([right[data.test_labels == k].float().mean() for k in classes]) * 100
    groups = groups_by_rank(data.labelled_counts.numpy())
    by_group = {name: float(per_class[torch.from_numpy(groups == name)].mean()) for name in ACCURACIES[1:4]}
    return {"overall": float(per_class.mean()), **by_group, "worst": float(per_class.min())}


def cell(
    pool: str, distribution: str, seed: int, held_out: str, work: list[tuple[str, Configuration]]
) -> list[dict[str, Any]]:
    """The rows of one split."""
    torch.set_num_threads(1)
    data, views = draw(load_pool(pool, held_out), unlabelled=distribution, seed=seed)
    rows = []
    for method, configuration in work:
        started = time.perf_counter()
        logits, diagnostics = execute(configuration, data, views, seed)
        numbers = {**accuracies(logits, data), **diagnostics, "seconds": time.perf_counter() - started}
        rows.append(
            {
                "pool": pool,
                "distribution": distribution,
                "seed": seed,
                "method": method,
                "key": key(configuration),
                "configuration": json.dumps(configuration, sort_keys=True),
                **{name: f"{value:.4f}" for name, value in numbers.items()},
            }
        )
    return rows


def read(stage: str) -> list[dict[str, Any]]:
    """Rows of a stage, numbers as floats; an empty number is NaN."""
    path = RESULTS / f"{stage}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["seed"] = int(row["seed"])
        row |= {name: float(row[name] or "nan") for name in (*ACCURACIES, *DIAGNOSTICS, "seconds")}
    return rows


def choose() -> dict[str, Configuration]:
    """For each method the configuration that development prefers: highest mean accuracy, ties to the first.

    The configurations of a sweep are listed from the plain one on; one within 0.1 points of the best that comes
    before it is chosen instead.
    """
    scores = defaultdict(list)
    for row in read("development"):
        scores[row["method"], row["key"]].append(row["overall"])
    stage = STAGES["development"]
    cells = len(stage.pools) * len(stage.seeds) * len(DISTRIBUTIONS)
    chosen = {}
    for method, sweep in SWEEPS.items():
        found = [scores[method, key(c)] for c in sweep]
        if any(len(s) != cells for s in found):
            raise SystemExit(f"{method}: development is not complete; run: run.py development")
        best = max(map(mean, found))
        chosen[method] = next(c for c, s in zip(sweep, found, strict=True) if mean(s) >= best - 0.1)
    return chosen


def configurations(stage: str) -> list[tuple[str, Configuration]]:
    """Method and configuration of every run of a cell."""
    if stage == "final":
        return list(choose().items())
    if stage == "ablation":
        return list(ABLATIONS.items())
    return [(method, c) for method, sweep in SWEEPS.items() for c in sweep]


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    stage = STAGES[options.stage]
    for pool in stage.pools:
        for distribution in DISTRIBUTIONS:
            for seed in stage.seeds:
                chosen = (options.pool, pool), (options.distribution, distribution), (options.seed, seed)
                if all(wanted in (None, own) for wanted, own in chosen):
                    yield pool, distribution, seed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--pool", help="only this data set and encoder")
    parser.add_argument("--distribution", choices=DISTRIBUTIONS, help="only this one")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--method", help="only this one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, default one per core")
    parser.add_argument(
        "--print", action="store_true", help="print the rows instead of keeping them, and run all"
    )
    options = parser.parse_args()

    wanted = [(m, c) for m, c in configurations(options.stage) if options.method in (None, m)]
    if not wanted:
        raise SystemExit(f"no method {options.method!r} in {options.stage}")
    names = ("pool", "distribution", "seed", "method", "key")
    done = set() if options.print else {tuple(row[name] for name in names) for row in read(options.stage)}
    tasks = []
    for place in cells(options):
        work = [(m, c) for m, c in wanted if (*place, m, key(c)) not in done]
        if work:
            tasks.append((*place, STAGES[options.stage].held_out, work))
    path = RESULTS / f"{options.stage}.csv"
    RESULTS.mkdir(exist_ok=True)
    if not options.print and not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    with (
        ProcessPoolExecutor(options.jobs) as workers,
        tqdm(total=sum(len(t[4]) for t in tasks), unit=" runs") as bar,
    ):
        for future in as_completed([workers.submit(cell, *task) for task in tasks]):
            rows = future.result()
            bar.update(len(rows))
            if options.print:
                for row in rows:
                    bar.write("  ".join(f"{name} {row[name]}" for name in (*names[:4], *ACCURACIES)))
                continue
            # a cell is written at once: a run that is cut loses the cells it was in, never half a row
            with path.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
