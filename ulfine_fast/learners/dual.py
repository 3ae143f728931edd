"""The library's own family, `DualHead` with its estimators, as learners: every preset of `config.METHODS`.

On the same features a step is that of `trainer.train_step`, except that rejected strong views may be left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ulfine_fast.config import METHODS, Method
from ulfine_fast.learners.learner import Config, Learner, Pseudo
from ulfine_fast.losses import LOSSES, labelled_log_prior, one_hot
from ulfine_fast.ops import PseudoLabels, proto_logits
from ulfine_fast.options import option, redefined
from ulfine_fast.trainer import (
    BRANCHES,
    build_head,
    measure_scales,
    only,
    parameter_groups,
    strong_adjustment,
    weak_adjustment,
)


@dataclass(frozen=True)
class DualConfig(Method):
    """A `Method` with what only image training can choose.

    Raises ValueError, too, for another loss than "logit_adjustment" where the head is not a cosine probe alone.
    """

    labelled_loss: str = option(
        "logit_adjustment", "A loss; the default alone reads adjust_labelled, its tau.", choices=tuple(LOSSES)
    )
    views: int = redefined(Config, "views", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labelled_loss != "logit_adjustment" and not (self.eta == 1 and self.normalize_linear):
            raise ValueError(
                "labelled_loss must be logit_adjustment unless eta is 1 and normalize_linear is true, "
                f"got {self.labelled_loss!r}"
            )


DUAL: dict[str, DualConfig] = {name: DualConfig(**vars(method)) for name, method in METHODS.items()}


class Dual(Learner):
    """A `DualHead`; `detail` is the confidence [B_u] and the spread over classes of the row's branches [B_u, 2].

    The spread is 0 from row `scale_rows` on, which no branch scale is measured on.

    Raises ValueError for a config whose eta is still to be chosen, see `validation.settle_eta`.
    """

    def __init__(self, config: DualConfig, prototypes: Tensor, labelled_counts: Tensor, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.views = config.views
        self.semi = config.unlabelled_weight > 0
        self.trained = config.trained
        self.head = build_head(prototypes, config, seed)
        self.register_buffer("labelled_counts", labelled_counts.clone())
        self.register_buffer("log_prior", labelled_log_prior(labelled_counts))

    @torch.no_grad()
    def start(self, weak: Tensor) -> None:
        """Measure the branch scales before anything is fused with their ratio."""
        measure_scales(self.head, weak, self.config)

    @torch.no_grad()
    def pseudo(self, weak: Tensor, progress: float) -> Pseudo:
        """Pseudo-labels of the fused branches; see `DualHead.pseudo_label`."""
        config = self.config
        found = self.head.pseudo_label(
            weak,
            config.threshold,
            adjustment=weak_adjustment(self.head.state, config),
            temperature=config.temperature,
            scale_rows=0,
        )
        spread = self._spread(weak)
        return Pseudo(
            found.label, config.unlabelled_weight * found.keep, found.label, (found.confidence, spread)
        )

    def _spread(self, weak: Tensor) -> Tensor:
        """[B_u, 2] standard deviation over classes of the linear and the text logits.

        By row: `pseudo_label` takes the mean over the first rows, which are others where a batch comes in parts.
        """
        head, rows = self.head, weak[: self.config.scale_rows].float()
        text = proto_logits(rows, head.state.textual, head.scales["proto_scale"])
        linear = only(head, 1.0)(rows)
        spread = weak.new_zeros(len(weak), 2, dtype=torch.float32)
        if len(rows):
            spread[: len(rows)] = torch.stack([z.std(-1, correction=0) for z in (linear, text)], dim=-1)
        return spread

    def loss(
        self, labelled: Tensor, targets: Tensor, strong: Tensor, rows: Tensor, pseudo: Pseudo, progress: float
    ) -> Tensor:
        """Labelled and weighted strong cross-entropy, and orthogonality; see `head_loss`."""
        config = self.config
        loss = self._labelled_loss(labelled, targets) + self.head.loss(
            strong,
            pseudo.target[rows],
            pseudo.weight[rows] / (self.views * max(len(pseudo.label), 1)),
            adjustment=strong_adjustment(self.head.state, config, self.log_prior),
        )
        if config.orthogonality_weight:
            loss = loss + config.orthogonality_weight * self.head.orthogonality()
        return loss

    def _labelled_loss(self, labelled: Tensor, targets: Tensor) -> Tensor:
        config = self.config
        if config.labelled_loss == "logit_adjustment":
            adjustment = config.adjust_labelled * self.log_prior
            return self.head.loss(labelled, targets, adjustment=adjustment)
        loss = LOSSES[config.labelled_loss]
        if config.labelled_loss == "ldam":
            loss = partial(loss, scale=config.linear_scale)
        logits = proto_logits(labelled.float(), self.head.linear, config.linear_scale)
        return loss(logits, targets, self.labelled_counts)

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
        """Advance P_u, branch scales and prototypes; see `PrototypeState.advance`."""
        config, state = self.config, self.head.state
        normalize = config.orthogonality_weight > 0
        if not len(weak):
            if normalize:
                state.normalize(finite)
            return
        keep = pseudo.weight > 0
        confidence, spread = pseudo.detail
        spread = spread[: config.scale_rows]
        counted = spread.isfinite().all(-1, keepdim=True)
        state.advance(
            labelled,
            targets,
            weak,
            PseudoLabels(
                pseudo.label,
                confidence,
                keep,
                self._histogram(pseudo.label),
                self._histogram(torch.where(keep, pseudo.label, -1)),
                torch.where(counted, spread, 0.0).sum(0) / counted.sum().clamp_min(1),
            ),
            self.labelled_counts,
            finite,
            copies=copies,
            mu=config.mu,
            beta=config.beta,
            gamma=config.gamma,
            scale_decay=config.scale_decay,
            posterior=config.fitting == "posterior",
            strength=config.strength,
            unlabelled_mass=config.unlabelled_mass,
            normalize=normalize,
        )

    def _histogram(self, label: Tensor) -> Tensor:
        """[C] int64 rows of each label [B] int64; negative ones are left out."""
        return one_hot(label, len(self.labelled_counts), torch.int64).sum(0)

    def logits(self, features: Tensor) -> Tensor:
        """Fused logits."""
        return self.head(features)

    def branches(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Both branches fused, and each alone."""
        return {name: only(self.head, eta) for name, eta in BRANCHES.items()}

    def folded(self) -> Tensor:
        """See `DualHead.folded`."""
        return self.head.folded()

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The linear probe, and the textual prototypes if they are learned: their unit rows need no decay."""
        return parameter_groups(self.head, self.config, weight_decay)

    def distribution(self) -> Tensor | None:
        """[C] P_u."""
        return self.head.state.distribution if self.semi else None
