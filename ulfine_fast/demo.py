"""Every preset on the data that ships with the package: one command, one table, a folder of reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ulfine_fast import report
from ulfine_fast.config import METHODS, Data, Method, Schedule
from ulfine_fast.experiment import UNITS, Outcome, curve, load_data, run, split_rows, surroundings
from ulfine_fast.features import FeatureData
from ulfine_fast.metrics import GROUPS, mean_and_std

if TYPE_CHECKING:
    from rich.console import Console

SEEDS = (0, 1, 2)
SCALARS = ("overall", "macro", "macro_f1", "worst", "harmonic_mean", "geometric_mean", "calibration_error")
CAPTION = (
    "Test accuracy in %, {over}; a seed draws the split and which classes are head and tail. many / medium / few:"
    " thirds of the classes by labelled images. Time: training, per run."
)


def run_demo(
    out: Path,
    *,
    seeds: Sequence[int] = SEEDS,
    methods: Mapping[str, Method] = METHODS,
    data: Data | None = None,
    schedule: Schedule | None = None,
    console: Console,
    progress: bool = True,
) -> dict[str, Any]:
    """Train `methods` once for each seed, print the table and write the reports into `out`.

    Returns what is written to metrics.json. The first run encodes the images, which takes minutes; later
    ones read them from the cache.
    """
    data, schedule = data or Data(), schedule or Schedule()
    drawn = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    console.print(
        f"Data: {data.dataset} at {data.size} px, encoded the first time (about 3 minutes on one core),"
        " then read from the cache"
    )
    splits, outcomes = [], {name: [] for name in methods}
    for seed in seeds:
        features = load_data(replace(data, seed=seed), progress=progress)
        splits.append(features)
        if seed == seeds[0]:
            title = f"Split of seed {seed} ({data.protocol}, {data.unlabelled})"
            console.print(report.split_report(split_rows(features), title))
            console.print(f"Training: {', '.join(methods)}; {schedule.steps} steps each, {drawn}")
        for name, method in methods.items():
            outcome = run(features, method, replace(schedule, seed=seed), progress=progress)
            outcomes[name].append(outcome)
            overall = report.percent(outcome.metrics["fused"]["overall"])
            console.print(f"  seed {seed}  {name:<17} {overall} %  {outcome.seconds:.1f} s")

    summary = {name: summarise(runs) for name, runs in outcomes.items()}
    caption = CAPTION.format(over=f"mean ± standard deviation over {drawn}" if len(seeds) > 1 else drawn)
    console.print(report.accuracy_table(summary, f"Results on {data.dataset}", caption))
    record = {
        **surroundings(),
        "units": UNITS,
        "configuration": {
            "data": asdict(data),
            "schedule": asdict(schedule),
            "seeds": list(seeds),
            "methods": {name: asdict(method) for name, method in methods.items()},
        },
        "classes": {
            str(seed): [row._asdict() for row in sorted(split_rows(features))]
            for seed, features in zip(seeds, splits, strict=True)
        },
        "groups": "many, medium, few: thirds by labelled rank; by_count: > 100, 20..100, < 20 labelled images",
        "predictions_seed": seeds[0],
        "methods": summary,
    }
    pictures = write_reports(Path(out), record, splits, outcomes)
    console.print(f"Wrote metrics.json, predictions.csv (seed {seeds[0]}), {len(pictures)} pictures to {out}")
    return record


def summarise(runs: Sequence[Outcome]) -> dict[str, Any]:
    """Means and standard deviations over seeds, by branch and by group, and the metrics of every run."""
    fused = [outcome.metrics["fused"] for outcome in runs]

    def over(values: Sequence[float | None]) -> dict[str, float | None]:
        return mean_and_std(list(values))

    return {
        **{key: over([m[key] for m in fused]) for key in SCALARS},
        **{group: over([m["by_rank"][group] for m in fused]) for group in GROUPS},
        "by_count": {group: over([m["by_count"][group] for m in fused]) for group in GROUPS},
        "branches": {
            branch: over([outcome.metrics[branch]["overall"] for outcome in runs])
            for branch in runs[0].metrics
        },
        "seconds": over([outcome.seconds for outcome in runs]),
        "runs": [
            {
                "metrics": outcome.metrics,
                "seconds": outcome.seconds,
                "eta": outcome.learner.config.eta,
                "skipped": outcome.training.skipped,
                "last": outcome.training.history[-1] if outcome.training.history else None,
            }
            for outcome in runs
        ],
    }


def write_reports(
    out: Path,
    record: dict[str, Any],
    splits: Sequence[FeatureData],
    outcomes: Mapping[str, Sequence[Outcome]],
) -> list[str]:
    """metrics.json, predictions.csv of the first seed, and pictures: means over seeds, classes by rank.

    Returns the names of the pictures.
    """
    first = splits[0]
    orders = [np.asarray(features.split.class_order) for features in splits]
    names = [f"rank {rank}" for rank in range(1, len(orders[0]) + 1)]
    if len(splits) == 1:
        names = report.names_in_pictures(split_rows(first))

    def by_rank(values: Sequence[Any]) -> np.ndarray:
        """Mean over seeds of one [C] list per seed, head class first."""
        rows = [np.asarray(v, dtype=np.float64)[order] for v, order in zip(values, orders, strict=True)]
        return np.mean(rows, axis=0)

    report.write_json(out / "metrics.json", record)
    report.write_predictions(
        out / "predictions.csv",
        first.test_labels,
        {name: runs[0].predictions for name, runs in outcomes.items()},
        first.class_names,
    )
    curves = {name: mean_curve(runs) for name, runs in outcomes.items()}
    curves = {name: points for name, points in curves.items() if points}
    return report.save_pictures(
        out,
        names,
        labelled=by_rank([data.labelled_counts for data in splits]),
        unlabelled=by_rank([np.bincount(data.unlabelled_truth, minlength=len(names)) for data in splits]),
        truth=by_rank([data.unlabelled_counts for data in splits]),
        accuracy={
            name: by_rank([outcome.metrics["fused"]["per_class"] for outcome in runs])
            for name, runs in outcomes.items()
        },
        curves=curves,
        estimates={
            name: by_rank([outcome.training.history[-1]["distribution"] for outcome in outcomes[name]])
            for name in curves
        },
        note=f", mean of {len(splits)} seeds" if len(splits) > 1 else "",
    )


def mean_curve(runs: Sequence[Outcome]) -> list[dict[str, Any]]:
    """`curve` of the fused head, averaged over runs."""
    together = zip(*(curve(outcome.training.history, "fused") for outcome in runs), strict=True)
    return [{key: mean_and_std([r[key] for r in point])["mean"] for key in point[0]} for point in together]
