"""FineSSL: balanced margins, and every pseudo-label weighed by a second head (arXiv 2405.11756).

    main head:      cross-entropy with the margin m_y on all logits but the target's, on labelled images and, times
                    the auxiliary confidence, on the strong views of every image
    m_k = margin * (max s - min s) * (1 - s_k) / (1 + s_k),   s_k = n_k / max n
    auxiliary head: cross-entropy with smoothed labels on detached features, on labelled images and on the strong
                    views of accepted pseudo-labels, those of which the main head has a confidence >= threshold

n: accepted pseudo-labels of each class. A class that few pseudo-labels reach gets a large margin. From the source: two
cosine heads with a learned scale from 1 / .07, the second one a copy of the first, margin 8, smoothing .5, threshold
.7, unlabelled weight 3, two strong views, no logit adjustment. Ours: the heads start from the text (there from random
rows); n is a `RunningSum` with one more count for each class, where the source keeps the last label of every image
and starts anew each epoch; the margin is that of the class of the row, as in LDAM; and the main head accepts, for one
that learns labels smoothed by .5 is hardly surer than .5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ulfine_fast.learners.cosine import CosineHead, CosineLearner
from ulfine_fast.learners.learner import Config, Pseudo, Share, confident, consistency, look_back
from ulfine_fast.learners.running import RunningSum
from ulfine_fast.losses import cross_entropy, logit_adjustment, one_hot
from ulfine_fast.options import option, redefined, share


@dataclass(frozen=True)
class FineSslConfig(Config):
    """Choices of FineSSL."""

    summary: str = "balanced margins, weighed by an auxiliary head (arXiv 2405.11756)"
    scale: float = option(1.0 / 0.07, "Start of the learned inverse temperature.", at_least=1e-3, at_most=1e3)
    adjust_labelled: float = redefined(Config, "adjust_labelled", 0.0)
    views: int = redefined(Config, "views", 2)
    margin: float = option(8.0, "Largest margin, in logits.", at_least=0)
    threshold: float = share(0.7, "Confidence from which a pseudo-label is accepted.")
    label_smoothing: float = share(0.5, "Label smoothing of the auxiliary head.")
    unlabelled_weight: float = option(3.0, "Weight of the unlabelled loss of the main head.", at_least=0)
    window: float = look_back()


class LearnedScaleHead(CosineHead):
    """A `CosineHead` that learns its scale too, as a logarithm."""

    def __init__(self, prototypes: Tensor, scale: float) -> None:
        super().__init__(prototypes, 1.0)
        self.log_scale = nn.Parameter(self.weight.new_tensor(math.log(scale)))

    def forward(self, features: Tensor) -> Tensor:
        """See `CosineHead`."""
        return self.log_scale.exp() * super().forward(features)

    def folded(self) -> Tensor:
        """See `CosineHead`."""
        return self.log_scale.detach().exp() * super().folded()


class FineSsl(CosineLearner):
    """`label` is the main head's; `detail` is whether it is accepted, [B_u] bool."""

    def __init__(
        self, config: FineSslConfig, prototypes: Tensor, labelled_counts: Tensor, *, seed: int
    ) -> None:
        super().__init__(config, prototypes, labelled_counts, seed=seed)
        self.head = LearnedScaleHead(prototypes, config.scale)
        self.auxiliary = LearnedScaleHead(prototypes, config.scale)
        self.accepted = RunningSum(len(prototypes), window=config.window)

    def margins(self) -> Tensor:
        """[C] margin of each class, in logits; 0 before the first accepted pseudo-label."""
        share = self.accepted.share()
        status = share / share.max()
        return self.config.margin * (status.max() - status.min()) * (1.0 - status) / (1.0 + status)

    @torch.no_grad()
    def pseudo(self, weak: Tensor, progress: Share) -> Pseudo:
        """The label of the main head, weighed by the confidence of the auxiliary one."""
        label, confidence = confident(self.head(weak).softmax(-1))
        auxiliary = confident(self.auxiliary(weak).softmax(-1))[1]
        weight = self.config.unlabelled_weight * torch.where(label >= 0, auxiliary, 0.0)
        accepted = (label >= 0) & (confidence >= self.config.threshold)
        return Pseudo(label, weight, label, (accepted,))

    def loss(
        self, labelled: Tensor, targets: Tensor, strong: Tensor, rows: Tensor, pseudo: Pseudo, progress: Share
    ) -> Tensor:
        """Margin loss of the main head, smoothed loss of the auxiliary one."""
        targeted = self._with_margins(self.head(strong), pseudo.target[rows])
        smoothing = {"label_smoothing": self.config.label_smoothing}
        (accepted,) = pseudo.detail
        return (
            self.labelled_loss(labelled, targets)
            + consistency(targeted, rows, pseudo, self.views)
            + cross_entropy(self.auxiliary(labelled.detach()), targets, **smoothing)
            + consistency(
                self.auxiliary(strong.detach()),
                rows,
                pseudo._replace(weight=accepted.float()),
                self.views,
                **smoothing,
            )
        )

    def labelled_loss(self, labelled: Tensor, targets: Tensor) -> Tensor:
        """Margin cross-entropy of labelled features [B_l, D], logit-adjusted if `adjust_labelled` is above 0."""
        logits = self._with_margins(self.head(labelled), targets)
        return logit_adjustment(logits, targets, self.labelled_counts, tau=self.config.adjust_labelled)

    def _with_margins(self, logits: Tensor, targets: Tensor) -> Tensor:
        """`logits` [B, C] less the margin at the target: for the softmax the same as the margin on all others."""
        return logits - self.margins() * one_hot(targets, logits.shape[1])

    def count_(
        self, labelled: Tensor, targets: Tensor, pseudo: Pseudo, counted: Tensor, finite: Tensor
    ) -> None:
        """Count the accepted pseudo-labels."""
        accepted = torch.where(counted & pseudo.detail[0], pseudo.label, -1)
        self.accepted.add_(one_hot(accepted, len(self.labelled_counts)).sum(0), finite)

    def branches(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The main head, which predicts, and the auxiliary one."""
        return {"main": self.logits, "auxiliary": self.auxiliary}

    def distribution(self) -> Tensor:
        """[C] shares of the pseudo-labels that were counted."""
        return self.accepted.share()
