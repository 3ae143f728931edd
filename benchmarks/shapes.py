"""The named shapes, and inputs of the head step that look like training: separable rows, a long tail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ulfine_fast.ops import pseudo_label


class Shape(NamedTuple):
    """Rows per step: labelled images, unlabelled images (a weak and a strong view each), classes, dims."""

    labelled: int
    unlabelled: int
    classes: int
    dim: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = {"A": Shape(32, 224, 100, 512), "B": Shape(64, 448, 1000, 512)}

# Loss weights and estimators of the step that is timed: the preset `ulfine`.
SCALE = 25.0
ETA = 0.5
ALIGN = 0.9
ORTHOGONALITY_WEIGHT = 1.0
MU, BETA, GAMMA = 0.05, 0.9, 0.99
SCALE_ROWS = 32


@dataclass
class StepInputs:
    """One step's tensors. `rows` stacks labelled and strong features, as an encoder returns them."""

    rows: Tensor  # [B_l + B_u, D], requires grad
    weak: Tensor  # [B_u, D]
    targets: Tensor  # [B_l]
    linear: Tensor  # [C, D], requires grad
    textual: Tensor  # [C, D], requires grad
    visual: Tensor  # [C, D]
    seen: Tensor  # [C]
    distribution: Tensor  # [C]
    adjustment: Tensor  # [C] log prior
    threshold: float  # half of the weak rows are above it

    @property
    def labelled(self) -> int:
        return len(self.targets)


def step_inputs(shape: Shape, seed: int = 0) -> StepInputs:
    """Random inputs whose median confidence is the threshold, so that the keep rate is 50 %."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    prior = torch.arange(1, shape.classes + 1).float().reciprocal()
    prior /= prior.sum()
    targets, truth = (
        torch.multinomial(prior, n, replacement=True, generator=generator)
        for n in (shape.labelled, shape.unlabelled)
    )
    textual = F.normalize(normal(shape.classes, shape.dim), dim=-1)

    def features(of: Tensor) -> Tensor:
        clean = torch.rand(len(of), 1, generator=generator) * 0.5 + 0.1
        noise = F.normalize(normal(len(of), shape.dim), dim=-1)
        return 10.0 * (clean * textual[of] + (1.0 - clean) * noise)

    weak = features(truth)
    strong = weak + 0.1 * normal(*weak.shape)
    linear = textual + 0.01 * normal(*textual.shape)
    pseudo = pseudo_label(weak, linear, textual, align=ALIGN, eta=ETA, backend="reference")
    # Half way between two confidences, so that no rounding decides which rows a provider keeps.
    middle = pseudo.confidence.sort().values[shape.unlabelled // 2 - 1 :][:2]
    return StepInputs(
        rows=torch.cat([features(targets), strong]).requires_grad_(),
        weak=weak,
        targets=targets,
        linear=linear.requires_grad_(),
        textual=textual.clone().requires_grad_(),
        visual=textual.clone(),
        seen=torch.ones(shape.classes, dtype=torch.bool),
        distribution=prior.clone(),
        adjustment=prior.log(),
        threshold=float(middle.mean()),
    )
