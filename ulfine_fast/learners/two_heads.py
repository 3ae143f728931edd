"""A plain head, which learns the frequencies of the classes, beside one that is balanced by logit adjustment."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ulfine_fast.learners.cosine import CosineHead, CosineLearner
from ulfine_fast.learners.learner import Config, Pseudo, Share, consistency, look_back
from ulfine_fast.learners.running import RunningSum
from ulfine_fast.losses import cross_entropy
from ulfine_fast.options import option, redefined, share


@dataclass(frozen=True)
class TwoHeadsConfig(Config):
    """What ACR and CCL share, with the values of both."""

    adjust_labelled: float = option(2.0, "tau of the balanced head's labelled loss.", at_least=0)
    views: int = redefined(Config, "views", 2)
    threshold: float = share(0.95, "Confidence from which a pseudo-label is kept.")
    window: float = look_back()


class TwoHeads(CosineLearner):
    """Two text-initialised cosine heads, each with a supervised and an unlabelled loss of its own.

    The plain head learns labelled images by cross-entropy, the balanced one, `head`, with logit adjustment. On strong
    views the plain head learns `target`, the balanced one `balanced_target`.

    Attributes:
        accepted: running sum [C] of what `advance` counts of the kept pseudo-labels.
    """

    def __init__(
        self, config: TwoHeadsConfig, prototypes: Tensor, labelled_counts: Tensor, *, seed: int
    ) -> None:
        super().__init__(config, prototypes, labelled_counts, seed=seed)
        self.plain = CosineHead(prototypes, config.scale)
        self.accepted = RunningSum(len(prototypes), window=config.window)

    def labelled_prior(self) -> Tensor:
        """[C] labelled share of each class; one without labelled images counts as one image.

        The plain head is divided by a prior, and nothing can be divided by 0. Our choice.
        """
        counts = self.labelled_counts.clamp_min(1).float()
        return counts / counts.sum()

    def balanced_target(self, pseudo: Pseudo) -> Tensor:
        """Target [B_u] int64 of the balanced head, -1 for none; the same as the plain head's unless said otherwise."""
        return pseudo.target

    def loss(
        self, labelled: Tensor, targets: Tensor, strong: Tensor, rows: Tensor, pseudo: Pseudo, progress: Share
    ) -> Tensor:
        """Supervised and unlabelled loss of both heads."""
        balanced = pseudo._replace(target=self.balanced_target(pseudo))
        return (
            cross_entropy(self.plain(labelled), targets)
            + consistency(self.plain(strong), rows, pseudo, self.views)
            + super().loss(labelled, targets, strong, rows, balanced, progress)
        )

    def distribution(self) -> Tensor:
        """[C] shares of the pseudo-labels that were counted."""
        return self.accepted.share()
