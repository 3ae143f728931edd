"""Fused heads for long-tailed semi-supervised fine-tuning of vision-language models.

Importing this package loads nothing beside it, so that the help of the command comes at once. What a name needs is loaded
when it is used: torch, numpy and the compiled extension for the ops and heads, more for what trains.
"""

# ruff: noqa: F403, F405 (a type checker reads the names in `_api`)

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulfine_fast._api import *
    from ulfine_fast.classifier import load_run, train
    from ulfine_fast.config import Encoder, Images
    from ulfine_fast.estimator import LongTailClassifier

__version__ = "0.1.0"

__all__ = [
    "DualHead",
    "Encoder",
    "FittedPrototypes",
    "Images",
    "LongTailClassifier",
    "PrototypeState",
    "PseudoLabels",
    "__version__",
    "availability",
    "dual_cross_entropy",
    "head_loss",
    "load_run",
    "orthogonality",
    "proto_fit",
    "proto_fit_",
    "proto_logits",
    "pseudo_label",
    "train",
    "use_backend",
]

# The modules of the names that are not in `_api`.
_ELSEWHERE = {
    "Encoder": "config",
    "Images": "config",
    "LongTailClassifier": "estimator",
    "load_run": "classifier",
    "train": "classifier",
}


class _Package(ModuleType):
    """This package, which looks its names up in its modules."""

    def __getattr__(self, name: str) -> Any:
        # those of the import system, and the names of modules that are still to be imported
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"ulfine_fast.{_ELSEWHERE.get(name, '_api')}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system would put the module `head_loss` in the place of its function
        if not (isinstance(value, ModuleType) and name in __all__):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
