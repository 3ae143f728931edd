"""FreeMatch: thresholds that follow the confidence of the model, for all classes and for each (arXiv 2205.07246).

    keep = confidence >= threshold_label,   threshold_k = g * p_k / max p

g: running mean confidence, p: running mean probabilities of all weak views; both start at 1 / C. From the paper: the
thresholds, their start and the fairness term. Ours: text-initialised cosine head, logit-adjusted labelled loss (the
paper's labels are balanced), estimates from the steps before this one, and their window (`RunningSum`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.learners.cosine import CosineLearner
from ulfine_fast.learners.learner import Config, Pseudo, Share, confident, look_back
from ulfine_fast.learners.running import RunningSum
from ulfine_fast.losses import one_hot
from ulfine_fast.options import option


@dataclass(frozen=True)
class FreeMatchConfig(Config):
    """Choices of FreeMatch."""

    summary: str = "self-adaptive global and class thresholds (arXiv 2205.07246)"
    unlabelled_weight: float = option(1.0, "Weight of the unlabelled loss.", at_least=0)
    # off, for it pulls towards classes of equal frequency
    fairness_weight: float = option(0.0, "w_f of the fairness term, 0.001 to 0.05 in the paper.", at_least=0)
    window: float = look_back()


class FreeMatch(CosineLearner):
    """Pseudo-labels above self-adaptive thresholds; `detail` is the weak probabilities [B_u, C]."""

    def __init__(
        self, config: FreeMatchConfig, prototypes: Tensor, labelled_counts: Tensor, *, seed: int
    ) -> None:
        super().__init__(config, prototypes, labelled_counts, seed=seed)
        classes = len(prototypes)
        self.probabilities = RunningSum(classes, window=config.window)
        self.confidence = RunningSum(window=config.window)
        self.predicted = RunningSum(classes, window=config.window)

    def thresholds(self) -> Tensor:
        """[C] confidence from which a pseudo-label of each class is kept."""
        classes = len(self.probabilities.sum)
        overall = (self.confidence.sum + 1.0) / (self.probabilities.sum.sum() + classes)
        share = self.probabilities.share()
        return overall * share / share.max()

    @torch.no_grad()
    def pseudo(self, weak: Tensor, progress: Share) -> Pseudo:
        """The label of the highest probability, kept from the threshold of its class."""
        probabilities = self.head(weak).softmax(-1)
        label, confidence = confident(probabilities)
        keep = (label >= 0) & (confidence >= self.thresholds()[label])
        return Pseudo(label, self.config.unlabelled_weight * keep, label, (probabilities,))

    def loss(
        self, labelled: Tensor, targets: Tensor, strong: Tensor, rows: Tensor, pseudo: Pseudo, progress: Share
    ) -> Tensor:
        """The loss of `CosineLearner`, and the fairness term if it is asked for."""
        loss = super().loss(labelled, targets, strong, rows, pseudo, progress)
        if self.config.fairness_weight and len(strong):
            loss = loss + self.config.fairness_weight * self._fairness(self.head(strong).softmax(-1))
        return loss

    def _fairness(self, probabilities: Tensor) -> Tensor:
        """sum_k a_k log b_k of strong views [n, C]: a, b the mean probabilities over the histogram, weak and strong.

        a is of the running estimates; both are normalised to sum 1. A class that no strong view is predicted as has
        b = 0, bounded by 1e-12 in the logarithm.
        """
        weak = self.probabilities.share() / self.predicted.share()
        predicted = one_hot(probabilities.argmax(-1), probabilities.shape[1]).mean(0)
        mean = probabilities.mean(0)
        strong = torch.where(predicted > 0, mean / predicted.clamp_min(1e-12), 0.0)
        return (weak / weak.sum() * (strong / strong.sum()).clamp_min(1e-12).log()).sum()

    def count_(
        self, labelled: Tensor, targets: Tensor, pseudo: Pseudo, counted: Tensor, finite: Tensor
    ) -> None:
        """Count probabilities, confidences and labels of all weak views."""
        probabilities = torch.where(counted[:, None], pseudo.detail[0], 0.0)
        label = torch.where(counted, pseudo.label, -1)
        self.probabilities.add_(probabilities.sum(0), finite)
        self.confidence.add_(probabilities.max(-1).values.sum(), finite)
        self.predicted.add_(one_hot(label, probabilities.shape[1]).sum(0), finite)

    def distribution(self) -> Tensor:
        """[C] shares of the running probabilities."""
        return self.probabilities.share()
