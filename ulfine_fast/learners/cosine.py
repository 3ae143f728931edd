"""The cosine head that starts from the text, and the learner whose prediction is one such head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ulfine_fast.learners.learner import Config, Learner, Pseudo, Share, consistency
from ulfine_fast.losses import logit_adjustment
from ulfine_fast.ops import proto_logits
from ulfine_fast.ops._rows import unit_rows


class CosineHead(nn.Module):
    """Logits [B, C] float32, `scale` times the cosine of features [B, D] and learned rows [C, D].

    The rows start from text prototypes [C, D], at unit norm (LIFT, arXiv 2309.10019).
    """

    def __init__(self, prototypes: Tensor, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(unit_rows(prototypes.detach(), torch.float32).clone())
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features."""
        return proto_logits(features.float(), self.weight, self.scale)

    def folded(self) -> Tensor:
        """[C, D] matrix M with logits = unit(features) @ M'."""
        return self.scale * unit_rows(self.weight.detach(), torch.float32)


class CosineLearner(Learner):
    """One cosine head: logit-adjusted on labelled images, with the targets of `pseudo` on strong views.

    A family gives `pseudo` and, if it has estimators, `count_`; what else it has it adds to `loss`.
    All start from the text, so `seed` draws nothing.
    """

    def __init__(self, config: Config, prototypes: Tensor, labelled_counts: Tensor, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.views = config.views
        self.head = CosineHead(prototypes, config.scale)
        self.register_buffer("labelled_counts", labelled_counts.clone())

    def loss(
        self, labelled: Tensor, targets: Tensor, strong: Tensor, rows: Tensor, pseudo: Pseudo, progress: Share
    ) -> Tensor:
        """Labelled loss, and consistency of the strong views with their pseudo-labels."""
        return self.labelled_loss(labelled, targets) + consistency(
            self.head(strong), rows, pseudo, self.views
        )

    def labelled_loss(self, labelled: Tensor, targets: Tensor) -> Tensor:
        """Logit-adjusted cross-entropy of labelled features [B_l, D]."""
        tau = self.config.adjust_labelled
        return logit_adjustment(self.head(labelled), targets, self.labelled_counts, tau=tau)

    @torch.no_grad()
    def advance(
        self,
        labelled: Tensor,
        targets: Tensor,
        weak: Tensor,
        pseudo: Pseudo,
        finite: Tensor,
        copies: Tensor | None = None,
    ) -> None:
        """Advance the estimators with every finite row that is no copy of a labelled image."""
        counted = pseudo.label >= 0
        self.count_(labelled, targets, pseudo, counted if copies is None else counted & ~copies, finite)

    def count_(
        self, labelled: Tensor, targets: Tensor, pseudo: Pseudo, counted: Tensor, finite: Tensor
    ) -> None:
        """Take the rows `counted` [B_u] bool of a step into the estimators; by default there are none."""

    def logits(self, features: Tensor) -> Tensor:
        """Logits of the head."""
        return self.head(features)

    def branches(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The head."""
        return {"linear": self.logits}

    def folded(self) -> Tensor | None:
        """The rows of the head times its scale."""
        return self.head.folded()
