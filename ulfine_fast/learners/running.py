"""Sums over the recent past of a run, which all estimates of class frequencies and class means are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ulfine_fast.ops._rows import unit_rows, without_autocast


class RunningSum(nn.Module):
    """Sum over the last `window` of the run so far, each step fading as new ones come.

        sum <- (1 - 1 / (1 + window * t)) * sum + amount     at step t = 0, 1, ...

    At step t this is a running sum of decay 1 - 1 / (1 + window t): .999 at step 10,000 with a window of .1. The
    sources have fixed decays between .9 and .999 in runs of 250,000 steps, which a short run would never leave the
    start with; a window that grows with the run needs no number of steps. Our choice.

    Args:
        shape: of `sum`, which starts from 0. window: in [0, 1]; 0 is the last step alone, 1 all steps.
    """

    def __init__(self, *shape: int, window: float) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("sum", torch.zeros(shape))
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def add_(self, amount: Tensor, finite: Tensor) -> None:
        """Take one step; where [] bool `finite` is False no bit changes."""
        reach = self.window * self.steps
        new = reach / (1.0 + reach) * self.sum + amount
        self.sum.copy_(torch.where(finite, new, self.sum))
        self.steps.add_(finite)

    def share(self) -> Tensor:
        """Shares of the classes in a sum [C], each class counted once more: uniform before the first step."""
        return (self.sum + 1.0) / (self.sum + 1.0).sum()


@without_autocast
def class_sums(features: Tensor, members: Tensor) -> Tensor:
    """[C, D] float32 sums of the directions of features [B, D] by class; members: [B, C], one-hot."""
    return members.T @ unit_rows(features, torch.float32)
