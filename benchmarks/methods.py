"""Every method of image training on the offline encoder: python benchmarks/methods.py [--seeds N] [--method NAME ...]

Adds a row for each run to benchmarks/results/methods.csv, leaves out those that are there, and prints the Markdown
table of docs/finetuning.md. One setting for all: no method was tuned.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import torch

from ulfine_fast.build import load_images
from ulfine_fast.config import DEMO_IMAGES, PRESETS, Encoder, Training
from ulfine_fast.learners import LEARNERS
from ulfine_fast.metrics import mean_and_std
from ulfine_fast.report import percent
from ulfine_fast.run import run

RESULTS = Path(__file__).parent / "results" / "methods.csv"
ENCODER = Encoder(size=96)
BATCH = {"labelled_batch": 32, "unlabelled_batch": 64, "log_every": 25}
STEPS = 150
FIELDS = ("method", "seed", "overall", "many", "medium", "few", "seconds")


def rows() -> list[dict[str, str]]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add(row: dict[str, object]) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def measure(method: str, seed: int) -> dict[str, object]:
    preset = PRESETS[method]
    schedule = Training(**{"steps": STEPS, **preset.training, **BATCH, "seed": seed})
    outcome = run(
        load_images(replace(DEMO_IMAGES, seed=seed)),
        ENCODER,
        LEARNERS[preset.learner],
        schedule,
        crops=preset.crops,
        workers=0,
        progress=False,
    )
    metrics = next(iter(outcome.metrics.values()))
    accuracy = {"overall": metrics["overall"], **metrics["by_rank"]}
    return {
        "method": method,
        "seed": seed,
        **{name: f"{value:.4f}" for name, value in accuracy.items()},
        "seconds": f"{outcome.training.seconds:.1f}",
    }


def table() -> str:
    lines = ["| method | overall | many | medium | few | s / run |", "|---|---|---|---|---|---|"]
    for method in PRESETS:
        of_method = [row for row in rows() if row["method"] == method]
        if of_method:
            columns = (mean_and_std([float(row[name]) for row in of_method]) for name in FIELDS[2:-1])
            cells = [percent(column["mean"], column["std"]) for column in columns]
            seconds = mean_and_std([float(row["seconds"]) for row in of_method])["mean"]
            lines.append(f"| `{method}` | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", action="append", choices=PRESETS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    there = {(row["method"], int(row["seed"])) for row in rows()}
    for seed in range(options.seeds):
        for method in options.method or PRESETS:
            if (method, seed) not in there:
                add(measure(method, seed))
    print(table())


if __name__ == "__main__":
    main()
