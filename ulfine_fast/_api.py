"""The ops and heads among the public names of the package, which gives them on."""

# ruff: noqa: F401 (they are for others)

from ulfine_fast.backend import availability, use_backend
from ulfine_fast.head import DualHead
from ulfine_fast.head_loss import head_loss
from ulfine_fast.ops import (
    FittedPrototypes,
    PseudoLabels,
    dual_cross_entropy,
    orthogonality,
    proto_fit,
    proto_fit_,
    proto_logits,
    pseudo_label,
)
from ulfine_fast.state import PrototypeState
