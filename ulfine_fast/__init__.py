"""Fused heads for long-tailed semi-supervised fine-tuning of vision-language models.

Importing this package loads torch, numpy and the compiled extension, nothing else.
"""

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

__version__ = "0.1.0"

__all__ = [
    "DualHead",
    "FittedPrototypes",
    "PrototypeState",
    "PseudoLabels",
    "__version__",
    "availability",
    "dual_cross_entropy",
    "head_loss",
    "orthogonality",
    "proto_fit",
    "proto_fit_",
    "proto_logits",
    "pseudo_label",
    "use_backend",
]
