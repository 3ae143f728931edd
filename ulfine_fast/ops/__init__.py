"""The five ops: plain tensors in, plain tensors out, each usable alone in another training loop."""

from ulfine_fast.ops.dual_cross_entropy import dual_cross_entropy
from ulfine_fast.ops.orthogonality import orthogonality
from ulfine_fast.ops.proto_fit import FittedPrototypes, proto_fit, proto_fit_
from ulfine_fast.ops.proto_logits import proto_logits
from ulfine_fast.ops.pseudo_label import PseudoLabels, pseudo_label

__all__ = [
    "FittedPrototypes",
    "PseudoLabels",
    "dual_cross_entropy",
    "orthogonality",
    "proto_fit",
    "proto_fit_",
    "proto_logits",
    "pseudo_label",
]
