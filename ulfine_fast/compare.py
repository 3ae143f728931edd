"""Methods and seeds on one set of data: each run in a folder of its own, side by side, and one table of all."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ulfine_fast import report, run_folder
from ulfine_fast.build import Builder, load_images
from ulfine_fast.config import PRESETS, Encoder, Images
from ulfine_fast.learners import LEARNERS
from ulfine_fast.metrics import GROUPS, mean_and_std
from ulfine_fast.run import UNITS, Recipe, curve, recipe, surroundings
from ulfine_fast.run_folder import METRICS
from ulfine_fast.splits import ClassRow

if TYPE_CHECKING:
    from rich.console import Console

SCALARS = ("overall", "macro", "macro_f1", "worst", "harmonic_mean", "geometric_mean", "calibration_error")
CAPTION = (
    "Test accuracy in %{over}; many / medium / few: thirds of the classes by labelled images. Time: of a run, with what"
    " was encoded before read from the cache."
)


@dataclass(frozen=True)
class Task:
    """One run of a comparison: all that another process needs to do it."""

    run_dir: Path
    recipe: Recipe
    device: str
    threads: int  # 0: as many as torch takes

    def is_done(self) -> bool:
        """Whether the folder has the metrics of this very run."""
        path = self.run_dir / METRICS
        if not path.exists():
            return False
        saved, now = read_metrics(self.run_dir)["configuration"], self.recipe.configuration()
        # as JSON has it: a tuple is a list
        return {**saved, "began_in": ""} == json.loads(json.dumps({**now, "began_in": ""}))

    def check(self) -> None:
        """FileExistsError where the folder has another run: one of other steps, too, would not end as this one."""
        if (self.run_dir / run_folder.CONFIG).exists():
            difference = run_folder.difference_of_runs(self.run_dir, self.recipe.configuration())
            if difference:
                raise FileExistsError(
                    f"{self.run_dir} holds another run: {difference}\nchoose another --out, or remove that folder"
                )

    def do(self) -> None:
        """Train and write what a run leaves, but no pictures; goes on from a checkpoint."""
        if self.threads:
            torch.set_num_threads(self.threads)
        resume = (self.run_dir / run_folder.CONFIG).exists()
        self.recipe.do(self.run_dir, device=self.device, resume=resume, pictures=False, progress=False)


def tasks(
    out: Path,
    images: Images,
    encoder: Encoder,
    given: Mapping[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    device: str,
    threads: int,
) -> list[Task]:
    """A task for each seed and method, seed by seed; a seed is that of the split and of the training.

    given: fields of `Training`; what is not given is as the preset has it, see `recipe`.
    """
    found = []
    for seed in seeds:
        for name in methods:
            own = {**given, "seed": seed}
            if not getattr(LEARNERS[PRESETS[name].learner], "trained", True):
                own["steps"] = 0
            of_seed = images if images.features else replace(images, seed=seed)
            found.append(
                Task(out / f"{name}-{seed}", recipe(of_seed, encoder, method=name, **own), device, threads)
            )
    return found


def do_all(todo: Sequence[Task], jobs: int, console: Console) -> None:
    """Do what is not done yet, `jobs` at a time, each in a process of its own if there are several."""
    left = [task for task in todo if not task.is_done()]
    if len(left) < len(todo):
        console.print(f"{len(todo) - len(left)} of {len(todo)} runs are there already")
    for task in left:
        task.check()
    for images in dict.fromkeys(task.recipe.images for task in left):
        _encode(next(task for task in left if task.recipe.images == images))
    with ExitStack() as stack:
        if jobs > 1:
            pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)
            waiting = [pool.submit(task.do) for task in left]
        for number, task in enumerate(left):
            waiting[number].result() if jobs > 1 else task.do()
            metrics = read_metrics(task.run_dir)
            overall = report.percent(_prediction(metrics)["overall"])
            console.print(f"  {task.run_dir.name:<24} {overall} %  {metrics['seconds']:.1f} s")


def _encode(task: Task) -> None:
    """Bring what a frozen encoder makes of the images into the cache, once for all runs on them."""
    recipe = task.recipe
    if recipe.training.tuning == "none" and recipe.images.features is None:
        method, device = LEARNERS["fixmatch_la"], torch.device(task.device)
        builder = Builder(recipe.encoder, method, recipe.training, device, crops=recipe.crops)
        with builder.setup(load_images(recipe.images)):
            pass


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """What `write_run` wrote; FileNotFoundError or ValueError where it is not there or damaged."""
    path = run_dir / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir}: expected the folder of a finished run, got no {METRICS} in it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["metrics"], found["configuration"]["name"]
    except KeyError as error:
        raise ValueError(f"{path}: expected the metrics of a run, got no {error} in it") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected the metrics of a run, got: {error!r}") from error
    return found


def by_method(run_dirs: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """The metrics of runs by method, and by folder where those of a method differ in more or in less than their seed.

    A folder that is given twice counts once.
    """
    folders = {run_dir.resolve(): run_dir for run_dir in run_dirs}
    names = Counter(folder.name for folder in folders)
    of_method: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for folder, run_dir in folders.items():
        metrics = read_metrics(run_dir)
        shown = folder.name if names[folder.name] == 1 else str(run_dir)
        of_method.setdefault(metrics["configuration"]["name"], []).append((shown, metrics))

    def kind(metrics: Mapping[str, Any]) -> str:
        configuration = json.loads(json.dumps(metrics["configuration"]))
        for part in ("images", "training"):
            configuration.get(part, {}).pop("seed", None)
        return json.dumps({**configuration, "began_in": ""}, sort_keys=True)

    groups: dict[str, list[dict[str, Any]]] = {}
    for name, found in of_method.items():
        runs = [metrics for _, metrics in found]
        seeds = {metrics["configuration"]["training"]["seed"] for metrics in runs}
        if len(seeds) == len(runs) and len({kind(metrics) for metrics in runs}) == 1:
            groups[name] = runs
        else:
            groups |= {shown: [metrics] for shown, metrics in found}
    return groups


def write_comparison(out: Path, runs: Mapping[str, Sequence[dict[str, Any]]], console: Console) -> None:
    """Print the table of `by_method`; metrics.json and pictures, means over seeds, classes by rank, into `out`."""
    summary = {name: summarise(of_method) for name, of_method in runs.items()}
    seeds = sorted({r["configuration"]["training"]["seed"] for of_method in runs.values() for r in of_method})
    drawn = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    over = f", mean ± standard deviation over {drawn}" if len(seeds) > 1 else f", {drawn}"
    console.print(report.accuracy_table(summary, "Results", CAPTION.format(over=over)))
    report.write_json(out / METRICS, {**surroundings(), "units": UNITS, "seeds": seeds, "methods": summary})
    pictures = _pictures(out, runs)
    console.print(f"Wrote {METRICS} and {len(pictures)} pictures to {out}")


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over runs, by branch and by group, and what there is of every run."""
    predictions = [_prediction(metrics) for metrics in runs]

    def over(values: Sequence[float | None]) -> dict[str, float | None]:
        return mean_and_std(list(values))

    return {
        **{key: over([m[key] for m in predictions]) for key in SCALARS},
        **{group: over([m["by_rank"][group] for m in predictions]) for group in GROUPS},
        "by_count": {group: over([m["by_count"][group] for m in predictions]) for group in GROUPS},
        "branches": {
            branch: over([metrics["metrics"][branch]["overall"] for metrics in runs])
            for branch in runs[0]["metrics"]
        },
        "seconds": over([metrics["seconds"] for metrics in runs]),
        "runs": [
            {key: metrics[key] for key in ("configuration", "metrics", "seconds", "eta", "skipped", "digest")}
            for metrics in runs
        ],
    }


def _prediction(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of the branch that predicts."""
    return next(iter(metrics["metrics"].values()))


def _pictures(out: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Means over the runs of each method, classes from head to tail."""
    every = [metrics for of_method in runs.values() for metrics in of_method]
    rows = [_rows(metrics) for metrics in every]
    classes = {len(of_run) for of_run in rows}
    if len(classes) > 1:
        # of other data: there is nothing to lay side by side
        return []
    orders = [[row.id for row in of_run] for of_run in rows]
    same = all(order == orders[0] for order in orders)
    names = report.names_in_pictures(rows[0])
    names = names if same else [f"rank {rank}" for rank in range(1, classes.pop() + 1)]
    seeds = len({metrics["configuration"]["training"]["seed"] for metrics in every})

    def mean(values: Sequence[Sequence[Any]]) -> np.ndarray:
        return np.mean(np.asarray(values, dtype=np.float64), axis=0)

    def by_rank(of_method: Sequence[Mapping[str, Any]], value: Any) -> np.ndarray:
        return mean([[value(metrics)[row.id] for row in _rows(metrics)] for metrics in of_method])

    known = all(row.unlabelled is not None for of_run in rows for row in of_run)
    curves = {name: _mean_curve(of_method) for name, of_method in runs.items()}
    curves = {name: points for name, points in curves.items() if points}
    truths = [metrics.get("unlabelled_counts") for metrics in every]
    return report.save_pictures(
        out,
        names,
        labelled=mean([[row.labelled for row in of_run] for of_run in rows]),
        unlabelled=mean([[row.unlabelled for row in of_run] for of_run in rows]) if known else None,
        truth=by_rank(every, lambda m: m["unlabelled_counts"]) if all(truths) else None,
        accuracy={
            name: by_rank(
                of_method, lambda m: [np.nan if x is None else x for x in _prediction(m)["per_class"]]
            )
            for name, of_method in runs.items()
        },
        curves=curves,
        estimates={
            name: by_rank(runs[name], lambda m: m["history"][-1]["distribution"])
            for name in curves
            if all("distribution" in metrics["history"][-1] for metrics in runs[name])
        },
        note=f", mean of {seeds} seeds" if seeds > 1 else "",
    )


def _rows(metrics: Mapping[str, Any]) -> list[ClassRow]:
    """Classes of a run, most labelled images first."""
    return sorted((ClassRow(**row) for row in metrics["classes"]), key=lambda row: (-row.labelled, row.id))


def _mean_curve(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`curve` of the prediction, averaged over runs as long as all of them go."""
    together = zip(*(curve(metrics["history"], "fused") for metrics in runs), strict=False)
    return [{key: mean_and_std([r[key] for r in point])["mean"] for key in point[0]} for point in together]
