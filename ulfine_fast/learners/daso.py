"""DASO: linear and semantic pseudo-labels, blended by how often their class is predicted (arXiv 2106.05682).

    p = (1 - v_k) * softmax(linear) + v_k * softmax(cosine to class means / prototype_temperature)
    v_k = (m_k / max m)^(1 / blend_temperature),   k = argmax of the linear logits

m: running histogram of the pseudo-labels of all weak views, kept or not. `alignment_weight` times the cross-entropy
from the semantic distribution of the weak view to that of its strong view trains the features of every image, kept
or not. Before the share `warm_up` of the run, pseudo-labels are the linear ones and nothing is aligned.

From the paper: blend, temperatures, threshold, alignment, and the warm-up of 5,000 of 250,000 steps. Ours:
text-initialised cosine head, logit-adjusted labelled loss (tau 0 is the paper's), and running class means of the
labelled features, the text before the first, where the paper has a queue of 256 features per class from an averaged
encoder. Windows are shares of the run, see `RunningSum`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.learners.cosine import CosineLearner
from ulfine_fast.learners.learner import Config, Pseudo, Share, confident, consistency, look_back
from ulfine_fast.learners.running import RunningSum, class_sums
from ulfine_fast.losses import one_hot
from ulfine_fast.ops import proto_logits
from ulfine_fast.options import option, share


@dataclass(frozen=True)
class DasoConfig(Config):
    """Choices of DASO."""

    summary: str = "blend of linear and semantic pseudo-labels (arXiv 2106.05682)"
    threshold: float = share(0.95, "Confidence from which a pseudo-label is kept.")
    unlabelled_weight: float = option(1.0, "Weight of the unlabelled loss.", at_least=0)
    alignment_weight: float = option(
        1.0,
        "Weight of the alignment loss, times unlabelled_weight; above 0 the strong views of all images are encoded.",
        at_least=0,
    )
    blend_temperature: float = option(
        1.5, "T; 0.3 in the paper for unlabelled data of another imbalance.", at_least=1e-3
    )
    prototype_temperature: float = option(0.05, "Temperature of the semantic labels.", at_least=1e-3)
    warm_up: float = share(0.02, "Share of the run without a blend.")
    window: float = look_back()


class Daso(CosineLearner):
    """Blended pseudo-labels; `detail` is the semantic distribution [B_u, C] of the weak views.

    While features are aligned every finite row has a weight, and `target` is -1 where the threshold rejects it.
    """

    def __init__(self, config: DasoConfig, prototypes: Tensor, labelled_counts: Tensor, *, seed: int) -> None:
        super().__init__(config, prototypes, labelled_counts, seed=seed)
        self.register_buffer("text", self.head.weight.detach().clone())
        self.class_sums = RunningSum(*prototypes.shape, window=config.window)
        self.predicted = RunningSum(len(prototypes), window=config.window)

    def semantic(self, features: Tensor) -> Tensor:
        """Logits [B, C] of the similarity to the class means."""
        means = torch.where(self.class_sums.sum.any(-1, keepdim=True), self.class_sums.sum, self.text)
        return proto_logits(features.float(), means, 1.0 / self.config.prototype_temperature)

    def blend(self) -> Tensor:
        """[C] v, the share of the semantic pseudo-label where the linear one is of the class."""
        share = self.predicted.share()
        return (share / share.max()) ** (1.0 / self.config.blend_temperature)

    @torch.no_grad()
    def pseudo(self, weak: Tensor, progress: Share) -> Pseudo:
        """The label of the blended distribution, kept from the threshold."""
        config = self.config
        linear, semantic = self.head(weak).softmax(-1), self.semantic(weak).softmax(-1)
        warm = torch.as_tensor(progress, device=weak.device) >= config.warm_up
        share = self.blend()[linear.argmax(-1), None] * warm
        label, confidence = confident((1.0 - share) * linear + share * semantic)
        finite = label >= 0
        keep = finite & (confidence >= config.threshold)
        encoded = torch.where(warm, finite, keep) if config.alignment_weight else keep
        return Pseudo(label, config.unlabelled_weight * encoded, torch.where(keep, label, -1), (semantic,))

    def loss(
        self, labelled: Tensor, targets: Tensor, strong: Tensor, rows: Tensor, pseudo: Pseudo, progress: Share
    ) -> Tensor:
        """The loss of `CosineLearner`, and the alignment of strong with weak views after the warm-up."""
        loss = super().loss(labelled, targets, strong, rows, pseudo, progress)
        if self.config.alignment_weight:
            aligned = pseudo._replace(target=pseudo.detail[0])
            warm = torch.as_tensor(progress, device=strong.device) >= self.config.warm_up
            loss = loss + self.config.alignment_weight * warm * consistency(
                self.semantic(strong), rows, aligned, self.views
            )
        return loss

    def count_(
        self, labelled: Tensor, targets: Tensor, pseudo: Pseudo, counted: Tensor, finite: Tensor
    ) -> None:
        """Add labelled features to the class means, and count the labels of all weak views."""
        classes = len(self.text)
        self.class_sums.add_(class_sums(labelled, one_hot(targets, classes)), finite)
        self.predicted.add_(one_hot(torch.where(counted, pseudo.label, -1), classes).sum(0), finite)

    def branches(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The linear head, which predicts, and the similarity to the class means."""
        return {"linear": self.logits, "semantic": self.semantic}

    def distribution(self) -> Tensor:
        """[C] shares of the pseudo-labels that were counted."""
        return self.predicted.share()
