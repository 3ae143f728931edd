"""Endurance, which takes longer than a test may: `make soak`.

`kills`: runs of `train`, on features and on images, are killed at random points and go on with --resume until they end. Every chain
must end with the bits of a run that nobody killed, and with no file beside those of a run.
`memory`: training on cached features for 100,000 steps must not grow.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from photos import photos
from synthetic import cached_run, small_data
from tiny_clip import tiny_clip

from ulfine_fast import report
from ulfine_fast.batches import Batch, FeatureViews
from ulfine_fast.checkpoint import CHECKPOINT, digest_of, load_checkpoint
from ulfine_fast.cli import app
from ulfine_fast.config import METHODS, Training

ON_FEATURES = (
    "train", "--features", "mine.npz", "--steps", "150", "--log-every", "50", "--checkpoint-every", "10",
)  # fmt: skip
ON_IMAGES = (
    "train", "--labelled", "labelled", "--unlabelled", "unlabelled", "--test", "test", "--model", "clip", "--steps",
    "24", "--labelled-batch", "4", "--unlabelled-batch", "8", "--log-every", "10", "--checkpoint-every", "4",
    "--workers", "2", "--ema", "0.9",
)  # fmt: skip
# SIGTERM is to be as safe as SIGKILL, and is sent in one case of so many.
TERMINATED = 10
# Kills of a chain before it may end: a machine that has become slower would kill one chain for ever.
MOST = 10
FIRST_STEPS, STEPS = 1_000, 100_000


def start(words: Sequence[str]) -> int:
    """Run a command in a fork of this process, which has loaded everything but not computed yet; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = open("log.txt", "a")  # noqa: SIM115, PTH123 (open to the end)
        app([*words], prog_name="ulfine-fast")
    except SystemExit as end:
        code = end.code or 0
    finally:
        # no clean-up of the process that this one was forked from
        os._exit(code)


def ending(child: int) -> int:
    """Exit code of a child, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path) -> tuple[str, str, list[str]]:
    """What the bits of a run are, what it measured, and the names of its files."""
    tensors, record = load_checkpoint(folder / CHECKPOINT)
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    measured = json.dumps([record["steps"], metrics], sort_keys=True)
    return digest_of(tensors), measured, sorted(path.name for path in folder.iterdir())


def kills(count: int, seed: int) -> bool:
    """Kill `count` times, in chains of both by turns; whether all chains ended as they had to."""
    draw, killed, at_work, wrong = random.Random(seed), 0, 0, 0
    chains, expected, seconds = 0, {}, {}
    for words in (ON_FEATURES, ON_IMAGES):
        folder = Path("runs") / f"whole{words[1]}"
        began = time.monotonic()
        code = ending(start([*words, "--out", str(folder)]))
        if code:
            sys.exit(f"soak: {folder} ended with {code}, see {Path.cwd() / 'log.txt'}")
        seconds[words] = time.monotonic() - began
        expected[words] = outcome(folder)
    while killed < count:
        words = (ON_FEATURES, ON_IMAGES)[chains % 2]
        folder = Path("runs") / f"chain-{chains}"
        code, left = 1, min(MOST, count - killed)
        while code:
            resumes = ["--resume"] if (folder / "config.json").exists() else []
            child = start([*words, "--out", str(folder), *resumes])
            if left:
                time.sleep(draw.uniform(0.0, 0.5 * seconds[words]))
                number = signal.SIGTERM if draw.randrange(TERMINATED) == 0 else signal.SIGKILL
                os.kill(child, number)
            code = ending(child)
            if code in (-signal.SIGKILL, -signal.SIGTERM, 143):
                killed, left = killed + 1, left - 1
                at_work += (folder / CHECKPOINT).exists()
            elif code:
                print(f"{folder}: ended with {code}, see {Path.cwd() / 'log.txt'}", flush=True)
                wrong += 1
                break
        else:
            if outcome(folder) != expected[words]:
                print(f"{folder}: expected {expected[words]}, got {outcome(folder)}", flush=True)
                wrong += 1
            else:
                shutil.rmtree(folder)
        chains += 1
        if chains % 5 == 0:
            print(f"{killed} kills, {chains} chains, {wrong} wrong", flush=True)
    print(f"kills: {killed} in {chains} chains, {at_work} of them after a checkpoint, {wrong} chains wrong")
    return not wrong


def resident() -> int:
    """Bytes of this process in memory, without what malloc keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def census() -> tuple[int, int, int]:
    """Resident bytes, descriptors and threads of this process."""
    return resident(), *(len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))  # noqa: PTH208


def memory(steps: int) -> bool:
    """Train for so many steps; whether memory, descriptors and threads are those after the first thousand."""
    found: dict[int, tuple[int, int, int]] = {}

    class Watched(FeatureViews):
        def batch(self, step: int, *slots: object) -> Batch:
            if step in (FIRST_STEPS, steps - 1):
                found[step] = census()
            return super().batch(step, *slots)

    schedule = Training(steps=steps, labelled_batch=4, unlabelled_batch=8, log_every=steps)
    cached_run(METHODS["ulfine"], schedule, small_data(), views=Watched.of(small_data(), schedule))
    first, last = found[FIRST_STEPS], found[steps - 1]
    grown, descriptors, threads = (b - a for a, b in zip(first, last, strict=True))
    print(
        f"memory: {steps} steps; from step {FIRST_STEPS} on {grown / 1e6:+.2f} MB of {first[0] / 1e6:.0f} MB,"
        f" {descriptors:+d} descriptors, {threads:+d} threads"
    )
    return grown < 1e6 and descriptors == threads == 0


def main() -> None:
    """Run what is asked for, all by default; exit code 1 if something was not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("kills", "memory", "all"), default="all")
    parser.add_argument("-n", type=int, default=1000, help="kills")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of `memory`")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    given = parser.parse_args()
    torch.set_num_threads(1)
    good = True
    if given.what != "memory":
        # they take most of the time of such a run, and are written as the other files are
        report.save_pictures = lambda *_, **__: []
        here = Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            photos(Path(folder))
            tiny_clip(Path(folder) / "clip")
            data = small_data()
            names = ("labelled", "labels", "weak", "strong", "test", "test_labels", "prototypes")
            np.savez(Path(folder) / "mine.npz", **{name: getattr(data, name).numpy() for name in names})
            os.chdir(folder)
            good = kills(given.n, given.seed)
            os.chdir(here)
    if given.what != "kills":
        good = memory(given.steps) and good
    sys.exit(not good)


if __name__ == "__main__":
    main()
