"""Everything that ULFine's head carries from one step to the next, beside the linear probe."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ulfine_fast.ops import _checks
from ulfine_fast.ops.proto_fit import proto_fit_
from ulfine_fast.ops.pseudo_label import PseudoLabels

# A branch whose logits hardly vary has no scale to align to; the ratio is bounded for the steps near that.
SMALLEST_SCALE = 1e-6
RATIO_BOUNDS = (0.01, 100.0)


class PrototypeState(nn.Module):
    """Textual and visual prototypes, the running class distributions and the running branch scales.

    Built from floating text features [C, D], C >= 1. All of it is in `state_dict()`, so that a resumed run
    continues exactly.

    Attributes:
        textual: [C, D] parameter, unit rows; learns from `orthogonality` alone, fitted by `update`.
        text: [C, D] the textual prototypes as they came from the text encoder, unit rows.
        visual: [C, D] running class means of unit labelled features, zeros before the first.
        seen: [C] bool, whether the class had a labelled feature.
        distribution: [C] P_u, running share of the classes among all pseudo-labels, zeros before the first.
        kept_distribution: [C] the same among the kept pseudo-labels.
        branch_scale: [2] running standard deviation over classes of the logits of both branches.
        measured: [] bool, whether `branch_scale` holds a measurement.
    """

    def __init__(self, text: Tensor) -> None:
        super().__init__()
        _checks.matrix("PrototypeState", "text", text)
        if not len(text):
            raise ValueError(f"PrototypeState: text must have at least one class, got {list(text.shape)}")
        text = F.normalize(text.detach().to(torch.float32), dim=-1).contiguous()
        classes = text.shape[0]
        self.textual = nn.Parameter(text.clone())
        self.register_buffer("text", text)
        self.register_buffer("visual", torch.zeros_like(text))
        self.register_buffer("seen", text.new_zeros(classes, dtype=torch.bool))
        self.register_buffer("distribution", text.new_zeros(classes))
        self.register_buffer("kept_distribution", text.new_zeros(classes))
        self.register_buffer("branch_scale", text.new_ones(2))
        self.register_buffer("measured", text.new_zeros((), dtype=torch.bool))

    def align(self) -> Tensor:
        """Factor on the prototype branch, scalar: ratio of the branch scales, clamped to [0.01, 100].

        1 before the first measurement and where the prototype logits hardly vary.
        """
        linear, proto = self.branch_scale.unbind()
        ratio = (linear / proto.clamp_min(SMALLEST_SCALE)).clamp(*RATIO_BOUNDS)
        return torch.where(self.measured & (proto >= SMALLEST_SCALE), ratio, torch.ones_like(ratio))

    @torch.no_grad()
    def measure(self, branch_scale: Tensor, decay: float) -> None:
        """Take one measurement [2] into the running scales; the first one sets them, [0, 0] is none."""
        running = decay * self.branch_scale + (1.0 - decay) * branch_scale
        new = torch.where(self.measured, running, branch_scale)
        found = branch_scale.any()
        self.branch_scale.copy_(torch.where(found, new, self.branch_scale))
        self.measured.logical_or_(found)

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        targets: Tensor,
        pseudo: PseudoLabels,
        *,
        mu: float,
        beta: float,
        gamma: float,
        scale_decay: float,
    ) -> None:
        """One step of every estimator, after the optimizer: P_u, scales, visual and textual prototypes.

        Args:
            features: [B_l, D] labelled features of the step. targets: [B_l] int64, negative is left out.
            pseudo: what `pseudo_label` said of the step's weak views.
            mu, beta, gamma: see `proto_fit`. scale_decay: share of the old branch scales, in [0, 1].
        """
        self.measure(pseudo.branch_scale, scale_decay)
        kept = pseudo.kept_histogram.to(self.kept_distribution.dtype)
        total = kept.sum()
        running = gamma * self.kept_distribution + (1.0 - gamma) * kept / total.clamp_min(1.0)
        self.kept_distribution.copy_(torch.where(total > 0, running, self.kept_distribution))
        proto_fit_(
            features,
            targets,
            pseudo.histogram,
            self.textual,
            self.visual,
            self.seen,
            self.distribution,
            mu=mu,
            beta=beta,
            gamma=gamma,
        )
