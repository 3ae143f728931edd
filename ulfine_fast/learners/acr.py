"""ACR: pseudo-labels of a plain head, adjusted by how far the unlabelled classes are from the labelled ones.

    plain head:    label = argmax (z - tau log pi), kept where the adjusted or the plain confidence is sure
    balanced head: label = argmax z, kept where its confidence is sure
    tau = largest_tau * softmax(d)_labelled
    d_a = (KL(u || a) + KL(a || u)) / 2    for a = labelled prior pi, uniform, labelled prior in reversed ranks

u: estimate of the unlabelled prior, from the kept pseudo-labels of the balanced head. A u like pi needs no
adjustment (tau near 0), a uniform one takes the labelled prior out (1), a reversed one overshoots (2).

Source: "Towards Realistic Long-Tailed Semi-Supervised Learning: Consistency Is All You Need" (CVPR 2023): two heads,
tau, anchors, threshold, two strong views, logit adjustment with tau 2 on labelled images. Published code fits tau
once per epoch, and to an estimate whose indexed += takes each class of a batch once, however often it occurs. Here
tau follows the estimate at every step and every kept pseudo-label counts. Also ours: the formula of tau, which is
our reading of the paper, text-initialised cosine heads, one more count for each class in u, which makes it uniform at
the start, and its window (`RunningSum`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.learners.learner import Pseudo, Share, confident
from ulfine_fast.learners.two_heads import TwoHeads, TwoHeadsConfig
from ulfine_fast.losses import one_hot
from ulfine_fast.options import option


@dataclass(frozen=True)
class AcrConfig(TwoHeadsConfig):
    """Choices of ACR."""

    summary: str = "pseudo-labels adjusted by the distance from the labelled prior (ACR, CVPR 2023)"
    unlabelled_weight: float = option(1.0, "Weight of the unlabelled loss.", at_least=0)
    largest_tau: float = option(2.0, "Largest tau of the plain head's pseudo-labels.", at_least=0)


class Acr(TwoHeads):
    """Predicts with the balanced head.

    `label` is the balanced head's and `detail` its target [B_u], -1 where it is not kept; `target` is the plain head's.
    """

    def tau(self) -> Tensor:
        """[] strength of the adjustment of the plain head's pseudo-labels, in [0, largest_tau]."""
        labelled = self.labelled_prior()
        anchors = torch.stack(
            [labelled, torch.full_like(labelled, 1.0 / len(labelled)), reversed_ranks(labelled)]
        )
        estimate = self.accepted.share()
        distance = 0.5 * ((estimate - anchors) * (estimate.log() - anchors.log())).sum(-1)
        return self.config.largest_tau * distance.softmax(0)[0]

    @torch.no_grad()
    def pseudo(self, weak: Tensor, progress: Share) -> Pseudo:
        """A target for each head, from its own logits."""
        threshold = self.config.threshold
        plain = self.plain(weak)
        adjusted, adjusted_confidence = confident(
            (plain - self.tau() * self.labelled_prior().log()).softmax(-1)
        )
        plain_confidence = confident(plain.softmax(-1))[1]
        label, confidence = confident(self.head(weak).softmax(-1))
        finite = label >= 0
        keep_plain = finite & (torch.maximum(adjusted_confidence, plain_confidence) >= threshold)
        keep = finite & (confidence >= threshold)
        return Pseudo(
            label,
            self.config.unlabelled_weight * (keep | keep_plain),
            torch.where(keep_plain, adjusted, -1),
            (torch.where(keep, label, -1),),
        )

    def balanced_target(self, pseudo: Pseudo) -> Tensor:
        """The balanced head's own pseudo-labels."""
        return pseudo.detail[0]

    def count_(
        self, labelled: Tensor, targets: Tensor, pseudo: Pseudo, counted: Tensor, finite: Tensor
    ) -> None:
        """Count the kept labels of the balanced head."""
        kept = torch.where(counted, self.balanced_target(pseudo), -1)
        self.accepted.add_(one_hot(kept, len(self.labelled_counts)).sum(0), finite)

    def branches(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The balanced head, which predicts, and the plain one."""
        return {"balanced": self.logits, "plain": self.plain}


def reversed_ranks(prior: Tensor) -> Tensor:
    """[C] `prior` with the classes in the opposite order: the most frequent one gets the smallest share."""
    order = prior.argsort(stable=True)
    reverse = torch.empty_like(prior)
    reverse[order] = prior[order.flip(0)]
    return reverse
