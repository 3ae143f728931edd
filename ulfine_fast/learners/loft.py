"""LoFT: hard pseudo-labels where the model is sure, soft ones where it is not, none where it knows nothing.

    confidence >= hard_threshold                    one-hot target, weight hard_weight
    soft_threshold < confidence < hard_threshold    weak probabilities as the target, weight soft_weight
    confidence <= soft_threshold                    left out, as an image of no known class

From the source (arXiv 2509.09926): both thresholds and weights, the text-initialised cosine head of scale 25 and the
logit-adjusted labelled loss. There are no estimators.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.learners.cosine import CosineLearner
from ulfine_fast.learners.learner import Config, Pseudo, Share, confident
from ulfine_fast.losses import one_hot
from ulfine_fast.options import option, share


@dataclass(frozen=True)
class LoftConfig(Config):
    """Choices of LoFT."""

    summary: str = "hard, soft and no pseudo-labels by confidence (arXiv 2509.09926)"
    hard_threshold: float = share(0.6, "Confidence from which a pseudo-label is hard.")
    soft_threshold: float = share(0.3, "Confidence from which it is soft; below there is none.")
    hard_weight: float = option(3.0, "Weight of the loss of hard pseudo-labels.", at_least=0)
    soft_weight: float = option(1.0, "Weight of the loss of soft pseudo-labels.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.soft_threshold > self.hard_threshold:
            raise ValueError(
                f"soft_threshold must be at most hard_threshold {self.hard_threshold:g}, "
                f"got {self.soft_threshold:g}"
            )


class Loft(CosineLearner):
    """Pseudo-labels as distributions: `target` is [B_u, C]."""

    @torch.no_grad()
    def pseudo(self, weak: Tensor, progress: Share) -> Pseudo:
        """Hard, soft or no target by the confidence of the weak view."""
        config = self.config
        probabilities = self.head(weak).softmax(-1)
        label, confidence = confident(probabilities)
        hard = (label >= 0) & (confidence >= config.hard_threshold)
        soft = ~hard & (confidence > config.soft_threshold)
        target = torch.where(soft[:, None], probabilities, one_hot(label, probabilities.shape[1]))
        return Pseudo(label, config.hard_weight * hard + config.soft_weight * soft, target)
