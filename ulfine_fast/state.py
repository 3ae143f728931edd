"""Everything that ULFine's head carries from one step to the next, beside the linear probe."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ulfine_fast import _cuda
from ulfine_fast.backend import choose
from ulfine_fast.ops import _checks
from ulfine_fast.ops._rows import add_by_class_, unit_rows, working_dtype
from ulfine_fast.ops.proto_fit import proto_fit_
from ulfine_fast.ops.pseudo_label import PseudoLabels

# Share of P_u below which a class is not pushed further down.
SMALLEST_SHARE = 1e-4
# A branch whose logits hardly vary has no scale to align to; the ratio is bounded for the steps near that.
SMALLEST_SCALE = 1e-6
RATIO_BOUNDS = (0.01, 100.0)

# Arguments of the op before and behind the tensors that it writes to.
_BEFORE_STATE, _AFTER_STATE = 12, 8
torch.library.define(
    "ulfine::_state_update_",
    "(Tensor features, Tensor targets, Tensor weak, Tensor label, Tensor keep, Tensor? copies, "
    "Tensor histogram, Tensor kept_histogram, Tensor branch_scale, Tensor labelled_counts, Tensor text, "
    "Tensor finite, Tensor(a!) textual, Tensor(b!) visual, Tensor(c!) seen, Tensor(d!) distribution, "
    "Tensor(e!) kept_distribution, Tensor(f!) kept_sum, Tensor(g!) kept_count, Tensor(h!) running_scale, "
    "Tensor(i!) measured, float mu, float beta, float gamma, float scale_decay, float strength, "
    "float unlabelled_mass, bool posterior, bool normalize) -> ()",
)


@torch.library.register_fake("ulfine::_state_update_")
def _(*arguments: object) -> None:
    return None


@torch.library.impl("ulfine::_state_update_", ("cpu", "cuda"))
def _(*arguments: object) -> None:
    _cuda.state_update_(*arguments)
    # The kernel writes behind autograd's back: a graph that saved a state tensor must notice.
    state = arguments[_BEFORE_STATE:-_AFTER_STATE]
    torch.autograd.graph.increment_version(state)


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
        kept_sum, kept_count: [C, D] and [C], decaying sum of the unit features of the kept weak rows by their
            pseudo-label, and their number; used by `refit` alone.
        branch_scale: [2] running standard deviation over classes of the logits of both branches.
        measured: [] bool, whether `branch_scale` holds a measurement.
    """

    def __init__(self, text: Tensor) -> None:
        super().__init__()
        _checks.bank("PrototypeState", "text", text)
        text = F.normalize(text.detach().to(torch.float32), dim=-1).contiguous()
        classes = text.shape[0]
        self.textual = nn.Parameter(text.clone())
        self.register_buffer("text", text)
        self.register_buffer("visual", torch.zeros_like(text))
        self.register_buffer("seen", text.new_zeros(classes, dtype=torch.bool))
        self.register_buffer("distribution", text.new_zeros(classes))
        self.register_buffer("kept_distribution", text.new_zeros(classes))
        self.register_buffer("kept_sum", torch.zeros_like(text))
        self.register_buffer("kept_count", text.new_zeros(classes))
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
    def log_distribution(self) -> Tensor:
        """[C] logarithm of P_u, started as uniform: what has not been counted yet is shared by all classes."""
        share = self.distribution + (1.0 - self.distribution.sum()) / len(self.distribution)
        return share.clamp_min(SMALLEST_SHARE).log()

    @torch.no_grad()
    def measure(self, branch_scale: Tensor, decay: float) -> None:
        """Take one measurement [2] into the running scales; the first one sets them, [0, 0] is none."""
        _checks.vector("measure", "branch_scale", branch_scale, 2, _checks.FLOATS)
        _checks.same_device("measure", self.text, branch_scale=branch_scale)
        _checks.between("measure", "decay", decay, 0.0, 1.0)
        self._measure(branch_scale, decay)

    def _measure(self, branch_scale: Tensor, decay: float) -> None:
        branch_scale = branch_scale.to(working_dtype(branch_scale))
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

        Raises:
            ValueError, TypeError: wrong shape, dtype, device, label or range; nothing has changed then.
        """
        self._check_labels("update", pseudo)
        _checks.between("update", "scale_decay", scale_decay, 0.0, 1.0)
        self._update(features, targets, pseudo, scale_decay, gamma, mu=mu, beta=beta)

    def _update(
        self,
        features: Tensor,
        targets: Tensor,
        pseudo: PseudoLabels,
        scale_decay: float,
        gamma: float,
        **shares: float,
    ) -> None:
        # The first to change anything, for it checks the rest.
        proto_fit_(
            features,
            targets,
            pseudo.histogram,
            self.textual,
            self.visual,
            self.seen,
            self.distribution,
            gamma=gamma,
            **shares,
        )
        self._measure(pseudo.branch_scale, scale_decay)
        kept = pseudo.kept_histogram.to(self.kept_distribution.dtype)
        total = kept.sum()
        running = gamma * self.kept_distribution + (1.0 - gamma) * kept / total.clamp_min(1.0)
        self.kept_distribution.copy_(torch.where(total > 0, running, self.kept_distribution))

    def _check_labels(self, op: str, pseudo: PseudoLabels) -> None:
        """Raise unless `pseudo` are pseudo-labels over the classes of this state."""
        if not isinstance(pseudo, PseudoLabels):
            raise TypeError(f"{op}: pseudo must be PseudoLabels, got {type(pseudo).__name__}")
        classes = len(self.text)
        _checks.tensor(op, "label", pseudo.label)
        rows = pseudo.label.numel()
        _checks.labels(op, "label", pseudo.label, rows, classes)
        _checks.vector(op, "keep", pseudo.keep, rows, (torch.bool,))
        _checks.vector(op, "histogram", pseudo.histogram, classes, (torch.int64,))
        _checks.vector(op, "kept_histogram", pseudo.kept_histogram, classes, (torch.int64,))
        _checks.vector(op, "branch_scale", pseudo.branch_scale, 2, _checks.FLOATS)
        _checks.same_device(
            op, self.text, label=pseudo.label, keep=pseudo.keep, histogram=pseudo.histogram,
            kept_histogram=pseudo.kept_histogram, branch_scale=pseudo.branch_scale,
        )  # fmt: skip

    def _check_posterior(
        self,
        op: str,
        weak: Tensor,
        pseudo: PseudoLabels,
        labelled_counts: Tensor,
        strength: float,
        mass: float,
    ) -> None:
        """Raise unless `refit` can take these."""
        classes, dim = self.text.shape
        self._check_labels(op, pseudo)
        _checks.matrix(op, "weak", weak, len(pseudo.label), dim)
        _checks.vector(op, "labelled_counts", labelled_counts, classes, (torch.int64,))
        _checks.same_device(op, self.text, weak=weak, labelled_counts=labelled_counts)
        _checks.positive(op, "strength", strength)
        _checks.not_negative(op, unlabelled_mass=mass)

    @torch.no_grad()
    def refit(
        self,
        weak: Tensor,
        pseudo: PseudoLabels,
        labelled_counts: Tensor,
        *,
        strength: float,
        unlabelled_mass: float,
        gamma: float,
    ) -> None:
        """Textual prototypes as posterior means of their classes, after `update` with mu = 0.

            textual_k = unit( n_k visual_k + m_k u_k + strength * g * text_k )

        n_k: labelled examples of the class. u_k: running mean of the kept weak features labelled k, and
        m_k = unlabelled_mass * sum(n) * (its share of the kept pseudo-labels). g: length of the text along the
        class means, sum_k n_k <visual_k, text_k> / sum_k n_k over the classes seen, for text and images lie
        apart; the best prediction of a class mean from its text alone is g * text_k, also where g is negative.
        A class with few examples stays near its text, one with many follows them: shrinkage by class count.
        Before the first labelled example nothing changes. Our choice, see docs/accuracy.md.

        Args:
            weak: [B_u, D] weak features of the step. pseudo: what `pseudo_label` said of them.
            labelled_counts: [C] labelled examples of each class in the training set.
            strength: examples that the text is worth, above 0. unlabelled_mass: mass of all unlabelled
                examples in masses of all labelled ones, at least 0. gamma: share of the old sums, in [0, 1].

        Raises:
            ValueError, TypeError: wrong shape, dtype, device, label or range; nothing has changed then.
        """
        self._check_posterior("refit", weak, pseudo, labelled_counts, strength, unlabelled_mass)
        _checks.between("refit", "gamma", gamma, 0.0, 1.0)
        self._refit(weak, pseudo, labelled_counts, strength, unlabelled_mass, gamma)

    def _refit(
        self,
        weak: Tensor,
        pseudo: PseudoLabels,
        labelled_counts: Tensor,
        strength: float,
        unlabelled_mass: float,
        gamma: float | Tensor,
    ) -> None:
        label = self._known(pseudo.label)
        keep = (pseudo.keep & (label >= 0))[:, None]
        rows = torch.where(keep, unit_rows(weak, self.kept_sum.dtype), 0.0)
        add_by_class_(self.kept_sum.mul_(gamma), label.clamp_min(0), rows)
        self.kept_count.mul_(gamma).add_(pseudo.kept_histogram)
        labelled = labelled_counts.to(self.text.dtype) * self.seen
        along = (self.visual * self.text).sum(-1)
        gap = (labelled * along).sum() / labelled.sum().clamp_min(1.0)
        mass = unlabelled_mass * labelled_counts.sum() * self.kept_distribution
        means = self.kept_sum / self.kept_count.clamp_min(SMALLEST_SCALE)[:, None]
        fitted = labelled[:, None] * self.visual + mass[:, None] * means + strength * gap * self.text
        fitted = F.normalize(fitted, dim=-1)
        # Without a class mean the text has no length yet.
        self.textual.copy_(torch.where(fitted.isfinite().all() & (gap != 0), fitted, self.textual))

    def _known(self, label: Tensor) -> Tensor:
        """Labels, -1 for those beyond the classes: on a GPU nothing has refused them."""
        return label.masked_fill(label >= len(self.text), -1)

    @torch.no_grad()
    def normalize(self, finite: Tensor) -> None:
        """Unit textual prototypes, where the [] bool `finite` is True."""
        _checks.mark("normalize", "finite", finite)
        _checks.same_device("normalize", self.text, finite=finite)
        unit = F.normalize(self.textual, dim=-1)
        self.textual.copy_(torch.where(finite, unit, self.textual))

    @torch.no_grad()
    def advance(
        self,
        features: Tensor,
        targets: Tensor,
        weak: Tensor,
        pseudo: PseudoLabels,
        labelled_counts: Tensor,
        finite: Tensor,
        *,
        copies: Tensor | None = None,
        mu: float,
        beta: float,
        gamma: float,
        scale_decay: float,
        posterior: bool = False,
        strength: float = 16.0,
        unlabelled_mass: float = 1.0,
        normalize: bool = False,
    ) -> None:
        """All of a training step that follows its optimizer, in two launches of the cuda back end, four with `posterior`.

        `normalize` if asked for, `update`, and with `posterior` `refit`, for which `update` has mu = 0. Without
        `posterior` a mu of 0 keeps the class means too. The back end is the selected one; all but cuda compose
        the three.

        Args:
            finite: [] bool; False leaves every bit of the state as it was.
            copies: [B_u] bool, weak rows that do not count in P_u; None is none.
            posterior, normalize: whether to call `refit` and `normalize`.
            features, targets, weak, pseudo, labelled_counts, mu, beta, gamma, scale_decay, strength,
                unlabelled_mass: see `update` and `refit`.

        Raises:
            ValueError, TypeError: wrong shape, dtype, device, label or range. RuntimeError: the selected back end
            cannot run. Nothing has changed then.
        """
        op, (classes, dim) = "advance", self.text.shape
        self._check_posterior(op, weak, pseudo, labelled_counts, strength, unlabelled_mass)
        _checks.matrix(op, "features", features, columns=dim)
        _checks.labels(op, "targets", targets, len(features), classes)
        _checks.mark(op, "finite", finite)
        if copies is not None:
            _checks.vector(op, "copies", copies, len(weak), (torch.bool,))
        _checks.same_device(op, self.text, features=features, targets=targets, copies=copies, finite=finite)
        for name, share in (("mu", mu), ("beta", beta), ("gamma", gamma), ("scale_decay", scale_decay)):
            _checks.between(op, name, share, 0.0, 1.0)
        _checks.flag(op, posterior=posterior, normalize=normalize)
        _checks.of_dtype(op, "textual", self.textual, (torch.float32, torch.float64))
        learns = mu > 0 or posterior
        if not learns:
            features, targets = features[:0], targets[:0]
        if posterior:
            mu = 0.0
        rates = {"mu": mu, "beta": beta, "gamma": gamma, "scale_decay": scale_decay}
        if choose(op, features, classes, working_dtype(features, weak, self.textual)) == "cuda":
            torch.ops.ulfine._state_update_.default(
                features.detach(), targets, weak.detach(), pseudo.label, pseudo.keep, copies, pseudo.histogram,
                pseudo.kept_histogram, pseudo.branch_scale, labelled_counts, self.text, finite, self.textual,
                self.visual, self.seen, self.distribution, self.kept_distribution, self.kept_sum,
                self.kept_count, self.branch_scale, self.measured, *map(float, rates.values()), float(strength),
                float(unlabelled_mass), posterior, normalize,
            )  # fmt: skip
            return

        if normalize:
            self.normalize(finite)
        if copies is not None:
            label = self._known(pseudo.label)
            counted = (label >= 0) & ~copies
            histogram = torch.zeros_like(pseudo.histogram)
            histogram.index_add_(0, label.clamp_min(0), counted.to(histogram.dtype))
            pseudo = pseudo._replace(histogram=histogram)
        # Without a label no prototype moves, without a count no distribution does, without a scale none is measured.
        pseudo = pseudo._replace(
            keep=pseudo.keep & finite,
            histogram=pseudo.histogram * finite,
            kept_histogram=pseudo.kept_histogram * finite,
            branch_scale=torch.where(finite, pseudo.branch_scale, 0.0),
        )
        self._update(features, torch.where(finite, targets, -1), pseudo, **rates)
        if posterior:
            self._refit(
                weak,
                pseudo,
                labelled_counts * finite,
                strength,
                unlabelled_mass,
                torch.where(finite, gamma, 1.0),
            )
