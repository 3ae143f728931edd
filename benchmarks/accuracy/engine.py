"""The study's own engine: one plain PyTorch loop for every method, open choices included.

It shares batches, presets, schedule and learning rate with the trainer of the library and no arithmetic, so that a
preset run by both checks either (tests/test_accuracy_study.py). A `Recipe` is a `Method` with the choices that only
the study has; their defaults are what the library does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ulfine_fast.batches import Batch, FeatureViews
from ulfine_fast.config import METHODS, Method, Training
from ulfine_fast.features import FeatureData
from ulfine_fast.learners.dual import SMALLEST_KEPT_SHARE
from ulfine_fast.losses import labelled_log_prior
from ulfine_fast.optimizer import MOMENTUM, learning_rate
from ulfine_fast.splits import groups_by_rank
from ulfine_fast.validation import ETAS, SCALE_DECAY, STEPS

SMALLEST_SHARE = 1e-4


@dataclass(frozen=True)
class Recipe(Method):
    """A `Method` with the open choices of the study."""

    summary: str = ""
    # Pseudo-labels
    soft_prior: bool = False  # the prior that `prior_shift` adds counts probabilities, not pseudo-labels
    thresholds: str = "fixed"  # "class": FreeMatch's self-adaptive ones
    soft: bool = False  # the target is the whole distribution
    ramp: float = 0.0  # share of the steps over which the unlabelled weight grows
    warm_up: float = 0.0  # share of the steps before the first unlabelled loss
    weak_view: str = "one"  # of a row, drawn anew at every step; "mean": of all its weak views
    oracle: bool = False  # true labels of the kept rows: a bound, not a method
    semantic: bool = False  # DASO: blend with a similarity classifier by the class's share of pseudo-labels
    smooth_rejected: float = 0.0  # LoFT: weight of the soft loss on rejected rows
    # Estimate of the unlabelled distribution
    estimate: str = (
        "labels"  # "labels": pseudo-labels; "probabilities": mean softmax; "kept"; "truth": a bound
    )
    # Fitting of the textual prototypes
    anchored: bool = False  # "compounding" steps from the text each time, not from the last prototype
    confidence: str = "share"  # alpha of "compounding": mu * P_u / max P_u; "constant": mu
    exact_means: bool = False  # "posterior" over the means of all labelled rows, not over running ones
    # Alignment and fusion
    alignment: str = "global"  # "row": the ratio of every row; "none"
    fusion: str = "fixed"  # "class": less of the linear branch where fewer labelled; "entropy": by certainty
    predict_eta: float | None = None  # of the prediction, None: eta
    orthogonality: str = "off_diagonal"  # "frobenius": squared distance of the Gram matrix from I, over C
    start: str = "text"  # "posterior": both branches start from the posterior means of the labelled rows


ON_UNLABELLED = {
    "adjust_unlabelled", "threshold", "temperature", "prior_shift", "unlabelled_mass", "soft_prior", "thresholds",
    "soft", "ramp", "warm_up", "weak_view", "oracle", "estimate", "predict_eta", "exact_means",
}  # fmt: skip


def recipe(name: str, **changes: Any) -> Recipe:
    """The preset `name` of the library, with changes."""
    preset = METHODS[name]
    return Recipe(**{**{f.name: getattr(preset, f.name) for f in fields(Method)}, **changes})


class Fitted(NamedTuple):
    """What a run leaves: balanced logits of the held-out rows and what the pseudo-labels were like."""

    logits: Tensor  # [N, C] of `FeatureData.test`
    diagnostics: dict[str, float]


def unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1)


class Learner:
    """State of a run and its step; `train` is the loop."""

    def __init__(self, data: FeatureData, recipe: Recipe, schedule: Training) -> None:
        self.data, self.recipe, self.schedule = data, recipe, schedule
        classes = len(data.class_names)
        self.text = unit(data.prototypes)
        start = self.text
        if recipe.linear_init == "random":
            generator = torch.Generator().manual_seed(schedule.seed)
            start = unit(torch.rand(self.text.shape, generator=generator) * 2.0 - 1.0)
        self.visual = torch.zeros_like(self.text)
        self.seen = torch.zeros(classes, dtype=torch.bool)
        self.share = torch.zeros(classes)  # P_u
        self.kept_share = torch.zeros(classes)
        self.prior = torch.full(
            (classes,), 1.0 / classes
        )  # unlabelled prior, by online expectation-maximisation
        self.sums = torch.zeros_like(self.text)  # running sums of kept weak rows, and their number
        self.counts = torch.zeros(classes)
        self.scales: Tensor | None = None
        self.global_confidence, self.class_confidence = 1.0 / classes, torch.full((classes,), 1.0 / classes)
        self.log_prior = labelled_log_prior(data.labelled_counts)
        self.labelled_counts = data.labelled_counts.float()
        mean = torch.zeros_like(self.text).index_add_(0, data.labels, data.labelled[0])
        self.labelled_sums = mean
        # Text and class means point apart: the text is as long as its best fit to them.
        self.gap = float(
            (mean * self.text).sum() / (self.labelled_counts[:, None] * self.text.square()).sum()
        )
        prototypes = self.text
        if recipe.start == "posterior":
            prototypes = self.labelled_posterior()
            start = prototypes
        self.linear = start.clone().requires_grad_()
        self.textual = prototypes.clone().requires_grad_(recipe.orthogonality_weight > 0)

    def labelled_posterior(self) -> Tensor:
        """Posterior means of the labelled rows alone, [C, D] unit rows."""
        return unit(self.labelled_sums + self.recipe.strength * self.gap * self.text)

    # Logits

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = unit(self.linear) if self.recipe.normalize_linear else self.linear
        return self.recipe.linear_scale * x @ weight.T, self.recipe.proto_scale * x @ unit(
            self.textual.detach()
        ).T

    def scales_of(self, branches: tuple[Tensor, Tensor]) -> Tensor:
        """[2] mean standard deviation over classes of either branch, of the first rows."""
        return torch.stack([z[: self.recipe.scale_rows].std(-1, correction=0).mean() for z in branches])

    def ratio(self) -> float:
        if self.scales is None or self.recipe.alignment == "none":
            return 1.0
        return float((self.scales[0] / self.scales[1]).clamp(0.01, 100.0))

    def weights(self, linear: Tensor, text: Tensor, eta: float) -> Tensor | float:
        """Share of the linear branch."""
        if self.recipe.fusion == "class":
            # a class with fewer labelled examples than the mean leans on its prototype
            share = self.labelled_counts / (self.labelled_counts + self.labelled_counts.mean())
            return (2 * eta * share).clamp_max(1.0)
        if self.recipe.fusion == "entropy":
            sure = [-(z.softmax(-1) * z.log_softmax(-1)).sum(-1, keepdim=True) for z in (linear, text)]
            return sure[1] / (sure[0] + sure[1]).clamp_min(1e-9)
        return eta

    def fuse(self, linear: Tensor, text: Tensor, eta: float | None = None) -> Tensor:
        w = self.weights(linear, text, self.recipe.eta if eta is None else eta)
        ratio = self.ratio()
        if self.recipe.alignment == "row":
            spread = [z.detach().std(-1, correction=0, keepdim=True) for z in (linear, text)]
            ratio = (spread[0] / spread[1].clamp_min(1e-9)).clamp(0.01, 100.0)
        return w * linear + (1.0 - w) * ratio * text

    # One step

    @torch.no_grad()
    def pseudo(self, weak: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Label, keep mask and distribution of weak rows."""
        recipe = self.recipe
        branches = self.branches(weak)
        if self.scales is None:
            self.scales = self.scales_of(branches)
        z = self.fuse(*branches)
        if not recipe.prior_shift:
            p = (z / recipe.temperature).softmax(-1)
        else:
            prior = self.truth_share() if recipe.estimate == "truth" else self.prior
            p = (z / recipe.temperature + recipe.prior_shift * prior.clamp_min(SMALLEST_SHARE).log()).softmax(
                -1
            )
            gamma = recipe.gamma
            counted = p if recipe.soft_prior else F.one_hot(p.argmax(-1), p.shape[1]).float()
            self.prior = gamma * self.prior + (1.0 - gamma) * counted.mean(0)
        if recipe.semantic:
            blend = (self.share / self.share.max().clamp_min(1e-9)).sqrt()[p.argmax(-1), None]
            prototypes = torch.where(self.seen[:, None], unit(self.visual), self.text)
            similar = (recipe.proto_scale * weak @ prototypes.T).softmax(-1)
            p = (1.0 - blend) * p + blend * similar
        confidence, label = p.max(-1)
        threshold = recipe.threshold
        if recipe.thresholds == "class":
            self.global_confidence += 0.01 * (float(confidence.mean()) - self.global_confidence)
            self.class_confidence += 0.01 * (p.mean(0) - self.class_confidence)
            threshold = self.global_confidence * (self.class_confidence / self.class_confidence.max())[label]
        keep = confidence >= threshold
        scales = self.scales_of(branches)
        self.scales = recipe.scale_decay * self.scales + (1.0 - recipe.scale_decay) * scales
        return label, keep, p

    def truth_share(self) -> Tensor:
        counts = self.data.unlabelled_counts.float()
        return counts / counts.sum()

    def strong_adjustment(self) -> Tensor | float:
        if self.recipe.adjust_unlabelled == "labelled":
            return self.recipe.adjust_labelled * self.log_prior
        kept = self.kept_share.clamp_min(SMALLEST_KEPT_SHARE)
        log_kept = (kept / kept.sum()).log()
        if self.recipe.adjust_unlabelled == "both":
            return (log_kept + self.recipe.adjust_labelled * self.log_prior) / 2
        return log_kept if self.recipe.adjust_unlabelled == "kept" else 0.0

    def loss(self, x: Tensor, target: Tensor, adjustment: Tensor | float) -> Tensor:
        """Cross-entropy of each row; `target` is labels or distributions."""
        branches = self.branches(x)
        logits = branches if self.recipe.loss_on == "branches" else (self.fuse(*branches),)
        return sum(F.cross_entropy(z + adjustment, target, reduction="none") for z in logits)

    def step(self, batch: Batch, number: int, optimizer: torch.optim.Optimizer) -> None:
        recipe = self.recipe
        adjustment = recipe.adjust_labelled * self.log_prior
        unlabelled = len(batch.weak) > 0
        if unlabelled:
            label, keep, p = self.pseudo(batch.weak)
            if recipe.oracle:
                label = self.data.unlabelled_truth[batch.places]
        loss = self.loss(batch.labelled, batch.targets, adjustment).mean()
        if unlabelled:
            weight = recipe.unlabelled_weight
            if number < recipe.warm_up * self.schedule.steps:
                weight = 0.0
            if recipe.ramp:
                weight *= min(1.0, number / (recipe.ramp * self.schedule.steps))
            target = p if recipe.soft else label
            shift = self.strong_adjustment()
            each = self.loss(batch.strong, target, shift) * keep
            if recipe.smooth_rejected:
                each = each + recipe.smooth_rejected * self.loss(batch.strong, p, shift) * ~keep
            loss = loss + weight * each.mean()
        if recipe.orthogonality_weight:
            t, classes = unit(self.textual), len(self.text)
            gram = t @ t.T
            if recipe.orthogonality == "frobenius":
                term = (gram - torch.eye(classes)).square().sum() / classes
            else:
                term = (gram.square().sum() - gram.diagonal().square().sum()) / (classes * (classes - 1))
            loss = loss + recipe.orthogonality_weight * term
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if unlabelled:
            self.update(batch, label, keep, p)

    @torch.no_grad()
    def update(self, batch: Batch, label: Tensor, keep: Tensor, p: Tensor) -> None:
        recipe, classes = self.recipe, len(self.text)
        gamma = recipe.gamma
        if recipe.orthogonality_weight:
            self.textual.copy_(unit(self.textual))
        histogram = torch.bincount(label, minlength=classes).float()
        kept = torch.bincount(label[keep], minlength=classes).float()
        if kept.sum():
            self.kept_share = gamma * self.kept_share + (1.0 - gamma) * kept / kept.sum()
        source = {"labels": histogram, "probabilities": p.sum(0), "kept": kept}.get(
            recipe.estimate, histogram
        )
        if source.sum():
            self.share = gamma * self.share + (1.0 - gamma) * source / source.sum()
        fits = recipe.mu > 0 or recipe.fitting == "posterior"
        if not fits and not recipe.semantic:
            return
        present = torch.bincount(batch.targets, minlength=classes) > 0
        sums = torch.zeros_like(self.text).index_add_(0, batch.targets, batch.labelled)
        means = sums / torch.bincount(batch.targets, minlength=classes).clamp_min(1)[:, None]
        running = torch.where(
            self.seen[:, None], recipe.beta * self.visual + (1 - recipe.beta) * means, means
        )
        self.visual = torch.where(present[:, None], running, self.visual)
        self.seen |= present
        if not fits:
            return
        if recipe.fitting == "posterior":
            # Means of all there is of a class: labelled examples by their number, kept weak rows with
            # `unlabelled_mass` times the mass of all labelled ones, the text as `strength` examples.
            self.sums = gamma * self.sums
            self.sums.index_add_(0, label[keep], batch.weak[keep])
            self.counts = gamma * self.counts + kept
            mass = recipe.unlabelled_mass * self.labelled_counts.sum() * self.kept_share
            means = self.sums / self.counts.clamp_min(1e-9)[:, None]
            visual, gap = self.labelled_sums, self.gap
            if not recipe.exact_means:
                counts = self.labelled_counts * self.seen
                visual = counts[:, None] * self.visual
                gap = float((visual * self.text).sum() / counts.sum())
            fitted = visual + mass[:, None] * means + recipe.strength * gap * self.text
            self.textual.copy_(unit(fitted))
            return
        alpha = recipe.mu * self.share / self.share.max().clamp_min(1e-9)
        if recipe.confidence == "constant":
            alpha = torch.full_like(alpha, recipe.mu)
        base = self.text if recipe.anchored else unit(self.textual)
        blend = (1 - alpha)[:, None] * base + alpha[:, None] * unit(self.visual)
        self.textual.copy_(torch.where(present[:, None], unit(blend), self.textual))


def optimizer_of(learner: Learner) -> torch.optim.Optimizer:
    schedule = learner.schedule
    groups: list[dict[str, Any]] = [{"params": [learner.linear], "weight_decay": schedule.weight_decay}]
    if learner.recipe.orthogonality_weight:
        groups.append({"params": [learner.textual], "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=schedule.learning_rate, momentum=MOMENTUM)


def batch_of(views: FeatureViews, recipe: Recipe, schedule: Training, number: int) -> Batch:
    unlabelled = schedule.unlabelled_batch if recipe.unlabelled_weight and len(views.unlabelled_truth) else 0
    return views.batch(number, range(schedule.labelled_batch), range(unlabelled), 1)


@lru_cache(maxsize=16)
def held_out_losses(data: FeatureData, recipe: Recipe, schedule: Training) -> dict[float, float]:
    """Cross-validated loss of each candidate for eta on labelled rows; see `ulfine_fast.validation`."""
    order = torch.from_numpy(np.random.default_rng((schedule.seed, 3)).permutation(len(data.labels)))
    by_class = torch.cat([order[data.labels[order] == k] for k in range(len(data.class_names))])
    fold = torch.arange(len(by_class))[by_class.argsort()] % recipe.eta_folds
    log_prior = recipe.adjust_labelled * labelled_log_prior(data.labelled_counts)
    short = replace(schedule, steps=STEPS)
    losses = {}
    for eta in ETAS:
        total = 0.0
        alone = replace(recipe, eta=eta, unlabelled_weight=0.0, orthogonality_weight=0.0)
        for k in range(recipe.eta_folds):
            rest, held_out = fold != k, fold == k
            counts = torch.bincount(data.labels[rest], minlength=len(data.class_names))
            part = replace(
                data, labelled=data.labelled[:, rest], labels=data.labels[rest], labelled_counts=counts
            )
            learner = Learner(part, alone, short)
            if recipe.fitting == "posterior":
                learner.textual = learner.labelled_posterior()
            optimizer, views = optimizer_of(learner), FeatureViews.of(part, short)
            for number in range(STEPS):
                optimizer.param_groups[0]["lr"] = learning_rate(short, number)
                batch = batch_of(views, alone, short, number)
                with torch.no_grad():
                    scales = learner.scales_of(learner.branches(batch.labelled))
                old = scales if learner.scales is None else learner.scales
                learner.scales = SCALE_DECAY * old + (1.0 - SCALE_DECAY) * scales
                learner.step(batch, number, optimizer)
            with torch.no_grad():
                z = learner.fuse(*learner.branches(data.labelled[0, held_out])) + log_prior
            total += float(F.cross_entropy(z, data.labels[held_out], reduction="sum"))
        losses[eta] = total / len(data.labels)
    return losses


def train(data: FeatureData, recipe: Recipe, schedule: Training) -> Fitted:
    """Train `recipe` on `data` and read its balanced logits on the held-out rows."""
    if recipe.eta_folds:
        # What only unlabelled rows see does not change these losses: many recipes share them.
        defaults = {f.name: f.default for f in fields(Recipe) if f.name in ON_UNLABELLED}
        losses = held_out_losses(data, replace(recipe, **defaults), schedule)
        recipe = replace(recipe, eta=min(losses, key=losses.get))
    if recipe.weak_view == "mean":
        data = replace(data, weak=unit(data.weak.mean(0, keepdim=True)).expand_as(data.weak))
    learner = Learner(data, recipe, schedule)
    optimizer = optimizer_of(learner)
    views = FeatureViews.of(data, schedule)
    for number in range(schedule.steps if recipe.trained else 0):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, number)
        learner.step(batch_of(views, recipe, schedule, number), number, optimizer)
    with torch.no_grad():
        branches = learner.branches(data.test)
        eta = recipe.eta if recipe.predict_eta is None else recipe.predict_eta
        return Fitted(learner.fuse(*branches, eta), quality(learner))


@torch.no_grad()
def quality(learner: Learner) -> dict[str, float]:
    """Pseudo-labels of the unlabelled rows at the end, by branch, and the estimate of their distribution."""
    data, recipe = learner.data, learner.recipe
    weak, truth = data.weak[0], data.unlabelled_truth
    if not len(truth):
        return {}
    few = torch.from_numpy(groups_by_rank(data.labelled_counts.numpy()) == "few")
    linear, text = learner.branches(weak)
    prior = recipe.prior_shift * learner.prior.clamp_min(SMALLEST_SHARE).log()
    found = {}
    for name, z in (("fused", learner.fuse(linear, text)), ("linear", linear), ("text", text)):
        confidence, label = ((z + prior) / recipe.temperature).softmax(-1).max(-1)
        keep = confidence >= recipe.threshold
        right = label == truth
        on_few = few[label] & keep
        found |= {
            f"accuracy_{name}": float(right.float().mean()),
            f"kept_{name}": float(keep.float().mean()),
            f"precision_{name}": float(right[keep].float().mean()),
            f"precision_few_{name}": float(right[on_few].float().mean()),
        }
    estimate = learner.prior if recipe.prior_shift else learner.share
    found["eta"] = recipe.eta
    found["distribution_l1"] = float((estimate - learner.truth_share()).abs().sum())
    return found
