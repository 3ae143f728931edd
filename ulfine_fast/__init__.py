"""Fused heads for long-tailed semi-supervised fine-tuning of vision-language models.

Importing this package loads nothing beside it. Its names load torch, numpy and the compiled extension when the first
of them is used, so that the help of the command comes at once.
"""

# ruff: noqa: F403, F405 (a type checker reads the names in `_api`)

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulfine_fast._api import *

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


class _Package(ModuleType):
    """This package, which looks its names up in `_api`."""

    def __getattr__(self, name: str) -> Any:
        # those of the import system, and the names of modules that are still to be imported
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("ulfine_fast._api"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system would put the module `head_loss` in the place of its function
        if not (isinstance(value, ModuleType) and name in __all__):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
