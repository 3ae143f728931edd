"""The two-branch head: a linear probe beside textual prototypes, composed of the five ops.

It adds no maths of its own: every formula is the docstring of the op that is called.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ulfine_fast.head_loss import head_loss
from ulfine_fast.ops import PseudoLabels, _checks, dual_cross_entropy, orthogonality, pseudo_label
from ulfine_fast.ops._rows import unit_rows, working_dtype
from ulfine_fast.ops.dual_cross_entropy import on_fused
from ulfine_fast.state import PrototypeState


class DualHead(nn.Module):
    """Linear probe [C, D] and `PrototypeState`, read as one classifier.

    Args:
        text: [C, D] text features of the classes, the start of the textual prototypes.
        linear: [C, D] start of the linear probe; None starts it from the text too.
        eta: weight of the linear branch in [0, 1]; 1 is the probe alone, 0 the prototypes alone.
        linear_scale, proto_scale: inverse temperatures of the branches, above 0.
        normalize_linear: True for a cosine probe, False for a plain linear one.
        loss_on: "branches" or "fused", see `dual_cross_entropy`.

    Raises TypeError or ValueError for an argument that is not as said.
    """

    def __init__(
        self,
        text: Tensor,
        linear: Tensor | None = None,
        *,
        eta: float = 0.5,
        linear_scale: float = 25.0,
        proto_scale: float = 25.0,
        normalize_linear: bool = True,
        loss_on: str = "branches",
    ) -> None:
        super().__init__()
        self.state = PrototypeState(text)
        if linear is not None:
            _checks.matrix("DualHead", "linear", linear, *text.shape)
            _checks.same_device("DualHead", text, linear=linear)
        _checks.branches("DualHead", eta, linear_scale=linear_scale, proto_scale=proto_scale)
        _checks.flag("DualHead", normalize_linear=normalize_linear)
        on_fused("DualHead", loss_on)
        start = self.state.text if linear is None else linear.detach().to(torch.float32)
        self.linear = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
        self.eta = eta
        self.scales = {
            "linear_scale": linear_scale,
            "proto_scale": proto_scale,
            "normalize_linear": normalize_linear,
        }
        self.loss_on = loss_on

    def pseudo_label(
        self,
        weak: Tensor,
        threshold: float | Tensor,
        *,
        adjustment: Tensor | None = None,
        temperature: float = 1.0,
        scale_rows: int | None = None,
    ) -> PseudoLabels:
        """Pseudo-labels of weak views [B_u, D] from the fused branches, without gradient."""
        return pseudo_label(
            weak,
            self.linear,
            self.state.textual,
            threshold,
            adjustment=adjustment,
            align=self.state.align(),
            eta=self.eta,
            temperature=temperature,
            scale_rows=scale_rows,
            **self.scales,
        )

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        *,
        adjustment: Tensor | None = None,
        group: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of labelled and strong rows [B, D]; rows of weight 0 are not computed."""
        return dual_cross_entropy(
            features,
            targets,
            self.linear,
            self.state.textual.detach(),
            weights,
            adjustment=adjustment,
            group=group,
            align=self.state.align(),
            eta=self.eta,
            loss_on=self.loss_on,
            **self.scales,
        )

    def step_loss(
        self,
        features: Tensor,
        weak: Tensor,
        targets: Tensor,
        threshold: float | Tensor,
        *,
        weak_adjustment: Tensor | None = None,
        adjustment: Tensor | None = None,
        strong_adjustment: Tensor | None = None,
        temperature: float = 1.0,
        scale_rows: int | None = None,
        unlabelled_weight: float = 1.0,
        orthogonality_weight: float = 1.0,
    ) -> tuple[Tensor, PseudoLabels]:
        """The whole loss of a step and its pseudo-labels in one call; arguments as in `head_loss`."""
        return head_loss(
            features,
            weak,
            targets,
            self.linear,
            self.state.textual,
            threshold,
            weak_adjustment=weak_adjustment,
            adjustment=adjustment,
            strong_adjustment=strong_adjustment,
            align=self.state.align(),
            eta=self.eta,
            temperature=temperature,
            scale_rows=scale_rows,
            loss_on=self.loss_on,
            unlabelled_weight=unlabelled_weight,
            orthogonality_weight=orthogonality_weight,
            **self.scales,
        )

    def orthogonality(self) -> Tensor:
        """Mean squared cosine of two different textual prototypes."""
        return orthogonality(self.state.textual)

    @torch.no_grad()
    def folded(self) -> Tensor:
        """[C, D] matrix M with fused logits = unit(features) @ M', the head as one linear layer to export."""
        dtype = working_dtype(self.linear, self.state.textual)
        normalize = self.scales["normalize_linear"]
        linear = unit_rows(self.linear, dtype) if normalize else self.linear.to(dtype)
        textual = unit_rows(self.state.textual, dtype)
        on_linear = self.eta * self.scales["linear_scale"]
        on_textual = (1.0 - self.eta) * self.scales["proto_scale"] * self.state.align()
        return on_linear * linear + on_textual * textual

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Fused logits [B, C] of features [B, D], for prediction: float32, or float64 of a head in float64."""
        _checks.matrix("DualHead", "features", features, columns=self.linear.shape[1])
        _checks.same_device("DualHead", self.linear, features=features)
        with torch.autocast(features.device.type, enabled=False):
            folded = self.folded()
            return unit_rows(features, folded.dtype) @ folded.T
