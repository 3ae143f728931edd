"""The library's own family, `DualHead` with its estimators, as learners: every preset of `config.METHODS`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ulfine_fast.config import Method
from ulfine_fast.head import DualHead
from ulfine_fast.learners.learner import Learner, Pseudo, Share
from ulfine_fast.losses import LOSSES, labelled_log_prior, one_hot
from ulfine_fast.ops import PseudoLabels, proto_logits

if TYPE_CHECKING:
    from ulfine_fast.state import PrototypeState

# An adjustment by kept pseudo-labels is milder than one by the labelled prior, see `labelled_log_prior`.
SMALLEST_KEPT_SHARE = 1e-4
BRANCHES = {"fused": None, "linear": 1.0, "text": 0.0}


class Dual(Learner):
    """A `DualHead`; `detail` is the confidence [B_u] and the spread over classes of the row's branches [B_u, 2].

    The spread is 0 from row `scale_rows` on, which no branch scale is measured on.

    Raises ValueError for a config whose eta is still to be chosen, see `validation.settle_eta`.
    """

    def __init__(self, config: Method, prototypes: Tensor, labelled_counts: Tensor, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.views = config.views
        self.semi = config.semi
        self.trained = config.trained
        self.head = build_head(prototypes, config, seed)
        self.register_buffer("labelled_counts", labelled_counts.clone())
        self.register_buffer("log_prior", labelled_log_prior(labelled_counts))

    @torch.no_grad()
    def start(self, weak: Tensor) -> None:
        """Measure the branch scales before anything is fused with their ratio."""
        measure_scales(self.head, weak, self.config)

    @torch.no_grad()
    def pseudo(self, weak: Tensor, progress: Share) -> Pseudo:
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
        spread = weak.new_zeros(len(weak), 2, dtype=torch.float32)
        if not len(rows):
            return spread
        text = proto_logits(rows, head.state.textual, head.scales["proto_scale"])
        linear = only(head, 1.0)(rows)
        spread[: len(rows)] = torch.stack([z.std(-1, correction=0) for z in (linear, text)], dim=-1)
        return spread

    def joint(
        self, labelled: Tensor, targets: Tensor, weak: Tensor, strong: Tensor, progress: Share
    ) -> tuple[Tensor, Pseudo]:
        """The same in one call of `head_loss`, which skips the rejected rows on the device."""
        config, state = self.config, self.head.state
        if config.labelled_loss != "logit_adjustment":
            return super().joint(labelled, targets, weak, strong, progress)
        loss, found = self.head.step_loss(
            torch.cat([labelled, strong]),
            weak,
            targets,
            config.threshold,
            weak_adjustment=weak_adjustment(state, config),
            adjustment=config.adjust_labelled * self.log_prior,
            strong_adjustment=strong_adjustment(state, config, self.log_prior),
            temperature=config.temperature,
            scale_rows=config.scale_rows,
            unlabelled_weight=config.unlabelled_weight,
            orthogonality_weight=config.orthogonality_weight,
        )
        return loss, Pseudo(found.label, found.keep, found.label, counted=found)

    def loss(
        self, labelled: Tensor, targets: Tensor, strong: Tensor, rows: Tensor, pseudo: Pseudo, progress: Share
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
        state.advance(
            labelled,
            targets,
            weak,
            pseudo.counted or self._counted(pseudo),
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

    def _counted(self, pseudo: Pseudo) -> PseudoLabels:
        """What `pseudo_label` would have said of rows that came in parts."""
        keep = pseudo.weight > 0
        confidence, spread = pseudo.detail
        spread = spread[: self.config.scale_rows]
        finite = spread.isfinite().all(-1, keepdim=True)
        return PseudoLabels(
            pseudo.label,
            confidence,
            keep,
            self._histogram(pseudo.label),
            self._histogram(torch.where(keep, pseudo.label, -1)),
            torch.where(finite, spread, 0.0).sum(0) / finite.sum().clamp_min(1),
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

    def pseudo_of_branches(self, weak: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Learner`."""
        config, found = self.config, {}
        adjustment = weak_adjustment(self.head.state, config)
        for name, eta in BRANCHES.items():
            pseudo = only(self.head, eta).pseudo_label(
                weak,
                config.threshold,
                adjustment=adjustment,
                temperature=config.temperature,
                scale_rows=0,
            )
            found[name] = pseudo.label, pseudo.keep
        return found

    def folded(self) -> Tensor:
        """See `DualHead.folded`."""
        return self.head.folded()

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The linear probe, and the textual prototypes if they are learned: their unit rows need no decay."""
        return parameter_groups(self.head, self.config, weight_decay)

    def distribution(self) -> Tensor | None:
        """[C] P_u."""
        return self.head.state.distribution if self.semi else None


def build_head(prototypes: Tensor, method: Method, seed: int = 0) -> DualHead:
    """Head of `method` over text features [C, D]; `seed` draws a random start of the linear probe.

    Raises ValueError for a method whose eta is still to be chosen, see `validation.settle_eta`.
    """
    if method.eta_folds:
        raise ValueError(
            f"eta_folds must be 0 for a head, got {method.eta_folds}; choose eta with validation.settle_eta"
        )
    linear = None
    if method.linear_init == "random":
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(prototypes.shape, generator=generator) * 2.0 - 1.0
        linear = F.normalize(uniform, dim=-1).to(prototypes.device)
    return DualHead(
        prototypes,
        linear,
        eta=method.eta,
        linear_scale=method.linear_scale,
        proto_scale=method.proto_scale,
        normalize_linear=method.normalize_linear,
        loss_on=method.loss_on,
    )


def parameter_groups(head: DualHead, method: Method, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of `build_optimizer`."""
    groups = [{"params": [head.linear], "weight_decay": weight_decay}]
    if method.orthogonality_weight:
        groups.append({"params": [head.state.textual], "weight_decay": 0.0})
    return groups


def measure_scales(head: DualHead, weak: Tensor, method: Method) -> None:
    """Take the first ratio of scales from the first batch, before anything is fused with it."""
    if len(weak):
        scales = head.pseudo_label(weak, method.threshold, scale_rows=method.scale_rows).branch_scale
        head.state.measure(scales, method.scale_decay)


def weak_adjustment(state: PrototypeState, method: Method) -> Tensor | None:
    """Logit adjustment [C] of the weak rows, None for none."""
    return method.prior_shift * state.log_distribution() if method.prior_shift else None


def strong_adjustment(state: PrototypeState, method: Method, log_prior: Tensor) -> Tensor | None:
    """Logit adjustment [C] of the strong rows, None for none."""
    if method.adjust_unlabelled == "labelled":
        return method.adjust_labelled * log_prior
    if method.adjust_unlabelled == "kept":
        return _log_kept(state)
    if method.adjust_unlabelled == "both":
        return 0.5 * (_log_kept(state) + method.adjust_labelled * log_prior)
    return None


def _log_kept(state: PrototypeState) -> Tensor:
    """[C] logarithm of the prior of the kept pseudo-labels; uniform, which adjusts nothing, before the first."""
    kept = state.kept_distribution.clamp_min(SMALLEST_KEPT_SHARE)
    return (kept / kept.sum()).log()


def only(head: DualHead, eta: float | None) -> DualHead:
    """`head` read with another weight of the linear branch, sharing all tensors; None is its own weight."""
    reading = copy.copy(head)
    reading.eta = head.eta if eta is None else eta
    return reading
