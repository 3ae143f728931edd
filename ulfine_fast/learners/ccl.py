"""CCL: one pseudo-label from a plain and a balanced head, fused with the prior of all images (arXiv 2410.06109).

    z = (plain logits - log((pi + u) / 2)) / 2 + (balanced logits) / 2
    keep = confidence >= threshold, with `check_energy` also -logsumexp z <= energy_threshold

pi: labelled prior, u: running estimate of the unlabelled one, from the probabilities of the kept weak views. The
same z predicts. From the source: the fusion, its prior, the soft estimate with one more count for each class, which
makes it uniform at the start, threshold, two strong views, logit adjustment with tau 2 on labelled images, unlabelled
weight 1.5. Ours: text-initialised cosine heads, the window of the estimate (`RunningSum`), both heads learn the fused
label without adjustment, and the energy is not checked by default: -8.75 is for logits without a bound. The
contrastive losses of the source are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.learners.learner import Pseudo, Share, confident
from ulfine_fast.learners.two_heads import TwoHeads, TwoHeadsConfig
from ulfine_fast.options import option


@dataclass(frozen=True)
class CclConfig(TwoHeadsConfig):
    """Choices of CCL."""

    summary: str = "dual-head fusion with the prior of all images (arXiv 2410.06109)"
    check_energy: bool = option(False, "Whether the energy too must be sure.")
    energy_threshold: float = option(-8.75, "Energy up to which a pseudo-label is then kept.")
    unlabelled_weight: float = option(1.5, "Weight of the unlabelled loss.", at_least=0)


class Ccl(TwoHeads):
    """Fused pseudo-labels and predictions; `detail` is the fused probabilities [B_u, C]."""

    def logits(self, features: Tensor) -> Tensor:
        """Fused logits [B, C]."""
        prior = 0.5 * (self.labelled_prior() + self.accepted.share())
        return 0.5 * (self.plain(features) - prior.log()) + 0.5 * self.head(features)

    @torch.no_grad()
    def pseudo(self, weak: Tensor, progress: Share) -> Pseudo:
        """The label of the fused logits, kept from the threshold."""
        logits = self.logits(weak)
        probabilities = logits.softmax(-1)
        label, confidence = confident(probabilities)
        keep = (label >= 0) & (confidence >= self.config.threshold)
        if self.config.check_energy:
            keep &= -logits.logsumexp(-1) <= self.config.energy_threshold
        return Pseudo(label, self.config.unlabelled_weight * keep, label, (probabilities,))

    def count_(
        self, labelled: Tensor, targets: Tensor, pseudo: Pseudo, counted: Tensor, finite: Tensor
    ) -> None:
        """Add up the probabilities of the kept weak views."""
        kept = counted & (pseudo.weight > 0)
        self.accepted.add_(torch.where(kept[:, None], pseudo.detail[0], 0.0).sum(0), finite)

    def branches(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Both heads fused, and each alone."""
        return {"fused": self.logits, "balanced": self.head, "plain": self.plain}

    def folded(self) -> None:
        """None, for the prior is a bias of the logits."""
