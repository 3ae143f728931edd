"""What a method of long-tailed semi-supervised learning is beside the encoder: the contract of all learners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ulfine_fast.options import Record, option, share

# Of a run, what is done of it, in [0, 1): a number, or [] float64 where a captured step reads it.
Share = float | Tensor


class Pseudo(NamedTuple):
    """Pseudo-labels of B_u weak views over C classes. Every tensor has one row per view.

    So the pseudo-labels of several processes or parts of a batch are joined by concatenation.
    """

    label: Tensor  # [B_u] int64 in 0..C-1, for estimators and reports; -1: features not finite
    weight: Tensor  # [B_u] float32 >= 0, of the row in the loss; 0: its strong views are not needed
    target: Tensor  # [B_u] int64, -1: not in the main loss; or [B_u, C] float32 distributions
    detail: tuple[Tensor, ...] = ()  # what else `loss` and `advance` of the same learner need
    counted: Any = None  # what `joint` has counted of all rows together; rows that are joined lose it


class Learner(nn.Module):
    """Heads, pseudo-labels, loss and estimators of a method, on features of any norm and floating dtype.

    Arithmetic is float32, also inside autocast. The state of a run is `state_dict()`. Attributes:

        views: strong views of each unlabelled image, 1 or 2.
        semi: whether unlabelled images are used; False: `pseudo` and `advance` have nothing to do.
        trained: False for a method that predicts from its start and takes no step.
    """

    views: int = 1
    semi: bool = True
    trained: bool = True

    def start(self, weak: Tensor) -> None:
        """Measure what pseudo-labels need on the first weak batch [B_u, D], before the first step."""

    def pseudo(self, weak: Tensor, progress: Share) -> Pseudo:
        """Pseudo-labels of weak views [B_u, D], without gradient and without a change of state.

        progress: share of the run that is done.
        """
        raise NotImplementedError

    def loss(
        self, labelled: Tensor, targets: Tensor, strong: Tensor, rows: Tensor, pseudo: Pseudo, progress: Share
    ) -> Tensor:
        """Scalar loss in nats, differentiable in the features and the parameters.

        The labelled mean is over all B_l rows, the unlabelled one over all views * B_u strong views, encoded or not.

        Args:
            labelled: [B_l, D]. targets: [B_l] int64; a row with target -1 adds nothing.
            strong: [n, D] features of strong views. rows: [n] int64, the row of `pseudo` that each is a view of.
            pseudo: of the same weak views, maybe none. progress: as it was given to `pseudo`.
        """
        raise NotImplementedError

    def joint(
        self, labelled: Tensor, targets: Tensor, weak: Tensor, strong: Tensor, progress: Share
    ) -> tuple[Tensor, Pseudo]:
        """`loss` and `pseudo` where the strong views [views * B_u, D] of all images are at hand, view by view.

        Nothing is chosen on the host, so nothing waits for the device.
        """
        pseudo = self.pseudo(weak, progress)
        rows = torch.arange(len(weak), device=weak.device).repeat(self.views)
        return self.loss(labelled, targets, strong, rows, pseudo, progress), pseudo

    def advance(
        self,
        labelled: Tensor,
        targets: Tensor,
        weak: Tensor,
        pseudo: Pseudo,
        finite: Tensor,
        copies: Tensor | None = None,
    ) -> None:
        """Advance the estimators, after the optimizer; by default there are none.

        Args:
            labelled, targets, weak, pseudo: all rows of the step, of every process, detached.
            finite: [] bool; where it is False no bit changes, and nothing waits for the device to know.
            copies: [B_u] bool, copies of labelled images, which no estimate of the unlabelled classes counts.
        """

    def logits(self, features: Tensor) -> Tensor:
        """Class logits [B, C] float32 of features [B, D] for equally frequent classes: the prediction."""
        raise NotImplementedError

    def branches(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The classifiers of the method by name, each from features to logits; the first one is `logits`."""
        raise NotImplementedError

    def pseudo_of_branches(self, weak: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Label and keep mask [B_u] of weak views by each branch alone; for reports, of methods that fuse branches."""
        return {}

    def folded(self) -> Tensor | None:
        """[C, D] matrix M with logits = unit(features) @ M', or None where the logits are no such map."""
        return None

    def distribution(self) -> Tensor | None:
        """[C] what the method takes the class shares of the unlabelled images to be; None where it takes none."""
        return None

    @property
    def dim(self) -> int:
        """D, the width of a feature."""
        return next(p.shape[1] for p in self.parameters() if p.ndim == 2)

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer: matrices decay, scalars do not."""
        parameters = list(self.parameters())
        parts = {
            weight_decay: [p for p in parameters if p.ndim > 1],
            0.0: [p for p in parameters if p.ndim <= 1],
        }
        return [{"params": part, "weight_decay": decay} for decay, part in parts.items() if part]


def confident(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Label [B] int64 and confidence [B] of the rows of probabilities [B, C]; -1 and 0 where they are not finite."""
    confidence, label = probabilities.max(-1)
    finite = confidence.isfinite()
    return torch.where(finite, label, -1), torch.where(finite, confidence, 0.0)


def consistency(
    logits: Tensor, rows: Tensor, pseudo: Pseudo, views: int, *, label_smoothing: float = 0.0
) -> Tensor:
    """Weighted cross-entropy of strong views [n, C] with the targets of their rows, over all views * B_u views."""
    each = F.cross_entropy(
        logits, pseudo.target[rows], ignore_index=-1, reduction="none", label_smoothing=label_smoothing
    )
    return (pseudo.weight[rows] * each).sum() / (views * max(len(pseudo.label), 1))


def look_back() -> Any:
    """The option of how far a `RunningSum` looks back."""
    return share(0.1, "Share of the steps so far that the estimates look back on.")


@dataclass(frozen=True)
class Config(Record):
    """What every learner on text-initialised cosine heads can be told."""

    summary: str
    scale: float = option(25.0, "Inverse temperature of the heads.", at_least=1e-3, at_most=1e3)
    adjust_labelled: float = option(1.0, "tau of the logit adjustment by the labelled prior.", at_least=0)
    views: int = option(1, "Strong views of each unlabelled image.", choices=(1, 2))

    semi = True  # whether unlabelled images are used
