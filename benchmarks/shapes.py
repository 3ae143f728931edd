"""The named shapes, and inputs of the head step that look like training: separable rows, a long tail."""

from __future__ import annotations

from dataclasses import dataclass, fields
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
# A processor takes too long for the last two.
GPU_SHAPES = SHAPES | {"C": Shape(128, 896, 8142, 768), "D": Shape(256, 1792, 21841, 1024)}

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

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def to(self, device: str, dtype: torch.dtype = torch.float32) -> StepInputs:
        """A copy with leaves of its own; `dtype` is that of what is floating."""
        copies = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                kind = dtype if value.is_floating_point() else value.dtype
                value = value.detach().to(device, kind, copy=True).requires_grad_(value.requires_grad)
            copies[field.name] = value
        return StepInputs(**copies)

    @torch.no_grad()
    def restore(self, start: StepInputs) -> None:
        """Take back what steps changed since this was copied from `start`; they move the share of kept rows."""
        for name in ("textual", "visual", "seen", "distribution"):
            getattr(self, name).copy_(getattr(start, name))


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


class Work(NamedTuple):
    """The least that has to be computed and moved: what no implementation of these formulas can do without."""

    flops: float  # of the matrix products alone
    bytes: float  # every input read once and every output written once, in float32


def least_work(op: str, loss_on: str | None, s: StepInputs) -> Work:
    """Work of an op on `s` after every exact identity, with the half of the strong rows left out that is not kept.

    Branches are folded where that is exact, the Gram matrix is the smaller one and symmetric, prototypes get no
    gradient from the cross-entropy, and only classes of the batch are fitted.
    """
    b, u, (c, d) = s.labelled, len(s.weak), s.linear.shape
    used = b + u / 2
    present = len(s.targets.unique())
    product = 2.0 * c * d
    labels = Work(product * (u + 2 * SCALE_ROWS), 4.0 * (u * d + 2 * c * d))
    # Forward, to the rows, to the linear bank; the prototype branch has no third.
    entropy = Work(product * used * (3 if loss_on == "fused" else 5), 4.0 * (2 * (b + u) * d + 3 * c * d))
    gram = Work(1.5 * product * min(c, d), 8.0 * c * d)
    fit = Work(0.0, 4.0 * (b * d + 4 * present * d + 3 * c))
    if op == "head step":
        # The banks and the labelled rows are read once for all of its parts.
        shared = 4.0 * (3 * c * d + b * d)
        parts = labels, entropy, gram, fit
        return Work(sum(part.flops for part in parts), sum(part.bytes for part in parts) - shared)
    return {
        "proto_logits": Work(3 * product * (b + u), 8.0 * ((b + u) * d + c * d + (b + u) * c)),
        "pseudo_label": labels,
        "dual_cross_entropy": entropy,
        "proto_fit": fit,
        "orthogonality": gram,
    }[op]
