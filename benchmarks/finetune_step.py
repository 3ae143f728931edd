"""A step of fine-tuning against a plain loop over the joint batch: python benchmarks/finetune_step.py

Both train the same AdaptFormers in the same randomly initialised Vision Transformer on the same views with the head of
`ulfine`. The plain loop encodes labelled, weak and strong views in one batch with gradient, as FineSSL and LoFT do, and
masks what is rejected; ours encodes weak views without gradient and kept strong views alone. The threshold is set so
that the share of kept rows is the one that a row names. Rounds alternate between the two; a ratio is that of one round.
Row passes are counted at the first block of the encoder: a row forward, and a row whose gradient comes back.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from ulfine_fast.config import Training
from ulfine_fast.distributed import World
from ulfine_fast.engine import Engine, Student
from ulfine_fast.learners import LEARNERS, build_learner
from ulfine_fast.towers import Tower, load_tower
from ulfine_fast.tuning import tune

MODEL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 96, "layers": 6, "width": 256, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 2, "layers": 1},
}
CLASSES = 100
KEPT = (1.0, 0.7, 0.4)


class FixedViews:
    """The same batch of random images in every step."""

    def __init__(self, schedule: Training, size: int) -> None:
        random = torch.Generator().manual_seed(0)

        def images(count: int) -> Tensor:
            return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=random)

        self.images = {
            "labelled": images(schedule.labelled_batch),
            "weak": images(schedule.unlabelled_batch),
            "strong": images(schedule.unlabelled_batch),
        }
        self.targets = torch.randint(CLASSES, (schedule.labelled_batch,), generator=random)
        self.unlabelled_truth = torch.full((schedule.unlabelled_batch,), -1)
        self.unlabelled_is_labelled = torch.zeros(schedule.unlabelled_batch, dtype=torch.bool)

    def labelled(self, step: int, slots: range) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (self.images["labelled"], self.targets)

    def weak(self, step: int, slots: range) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (self.images["weak"], torch.arange(len(self.images["weak"])))

    def strong(self, step: int, slots: list[int], views: int) -> Callable[[], Tensor]:
        return lambda: self.images["strong"][slots][None]


class Rows:
    """Row passes of a tower, counted at its first block."""

    def __init__(self, tower: Tower) -> None:
        self.count = 0
        tower.blocks[0].register_forward_hook(self._passed)

    def _passed(self, _block: torch.nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
        self.count += len(output)
        if output.requires_grad:
            output.register_hook(self._came_back)

    def _came_back(self, gradient: Tensor) -> None:
        self.count += len(gradient)


def built(schedule: Training, kept: float) -> tuple[Student, FixedViews]:
    """A student whose threshold keeps the share `kept` of the weak views of its first step."""
    torch.manual_seed(0)
    tower = load_tower("ulfine-benchmark")
    tune(tower, "adaptformer", classes=CLASSES)
    views = FixedViews(schedule, tower.size)
    prototypes = F.normalize(
        torch.randn(CLASSES, tower.dim, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    counts = torch.ones(CLASSES, dtype=torch.int64)
    # prototypes and scales stay: the share of kept rows would move with them
    method = replace(LEARNERS["ulfine"], mu=0.0, scale_decay=1.0)
    learner = build_learner(method, prototypes, counts, seed=0)
    student = Student(tower, learner)
    with torch.no_grad():
        weak = student.encode(views.images["weak"])
    learner.start(weak)
    confidence = learner.head.pseudo_label(weak, 0.0).confidence.sort(descending=True).values
    threshold = float(confidence[max(round(kept * len(weak)) - 1, 0)])
    student.learner = build_learner(
        replace(method, threshold=threshold * (1 - 1e-6)), prototypes, counts, seed=0
    )
    return student, views


def joint_step(student: Student, views: FixedViews, optimizer: torch.optim.Optimizer) -> int:
    """The step of the plain loop; returns the number of kept rows."""
    head, config = student.learner.head, student.learner.config
    labelled, unlabelled = len(views.targets), len(views.unlabelled_truth)
    features = student.tower(torch.cat(list(views.images.values())))
    x = F.normalize(features, dim=-1)
    linear, text = (F.normalize(m, dim=-1) for m in (head.linear, head.state.textual))
    on_linear, on_text = 25.0 * x @ linear.T, 25.0 * x @ text.detach().T
    weak = slice(labelled, labelled + unlabelled)
    with torch.no_grad():
        spread = [z[weak].std(-1, correction=0).mean() for z in (on_linear, on_text)]
        head.state.measure(torch.stack(spread), config.scale_decay)
        align = head.state.align()
        confidence, label = (0.5 * on_linear + 0.5 * align * on_text)[weak].softmax(-1).max(-1)
        keep = confidence >= config.threshold
    fused = 0.5 * on_linear + 0.5 * align * on_text
    strong = F.cross_entropy(fused[weak.stop :], label, reduction="none")
    gram = text @ text.T
    off_diagonal = gram.square().sum() - gram.diagonal().square().sum()
    loss = (
        F.cross_entropy(fused[:labelled] + student.learner.log_prior, views.targets)
        + (strong * keep).mean()
        + off_diagonal / (CLASSES * (CLASSES - 1))
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return int(keep.sum())


def contest(shape: tuple[int, int], kept: float, rounds: int) -> dict[str, object]:
    schedule = Training(labelled_batch=shape[0], unlabelled_batch=shape[1], steps=10**6, learning_rate=1e-9)
    times: dict[str, list[float]] = {"ours": [], "joint": []}
    students = {name: built(schedule, kept) for name in times}
    rows = {name: Rows(student.tower) for name, (student, _) in students.items()}
    engine = Engine(*students["ours"], schedule, World())
    plain, views = students["joint"]
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=1e-9, momentum=0.9)
    found = []
    for step in range(rounds + 2):
        for name in times:
            started = time.perf_counter()
            if name == "ours":
                found.append(int((engine.step(step).weight > 0).sum()))
            else:
                joint_step(plain, views, optimizer)
            times[name].append(time.perf_counter() - started)
    images = sum(shape)
    ratios = [theirs / ours for ours, theirs in zip(*(t[2:] for t in times.values()), strict=True)]
    fifths = statistics.quantiles(ratios, n=5)
    passes = {name: counter.count / (rounds + 2) for name, counter in rows.items()}
    return {
        "batch": f"{shape[0]} + {shape[1]}",
        "kept": f"{statistics.mean(found) / shape[1]:.0%}",
        "passes": f"{passes['joint']:.0f} / {passes['ours']:.0f} = {passes['joint'] / passes['ours']:.2f}x",
        "joint": f"{images / statistics.median(times['joint'][2:]):.1f}",
        "ours": f"{images / statistics.median(times['ours'][2:]):.1f}",
        "ratio": f"{statistics.median(ratios):.2f}x [{fifths[0]:.2f}, {fifths[3]:.2f}]",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    open_clip.factory._MODEL_CONFIGS["ulfine-benchmark"] = MODEL
    print(
        "| labelled + unlabelled | kept | row passes, joint / ours | joint, images/s | ours, images/s | ratio |"
    )
    print("|---|---|---|---|---|---|")
    for kept in KEPT:
        row = contest((32, 224), kept, options.rounds)
        print("| " + " | ".join(map(str, row.values())) + " |", flush=True)


if __name__ == "__main__":
    main()
