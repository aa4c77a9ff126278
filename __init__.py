"""fxpress compiles PyTorch Transformer models: trace, rewrite, lower to ONNX, verify.

The front door. Everything is loaded on first use, so that loading an artefact needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import passes
    from .compiler.artifact import LoadedModel, load
    from .compiler.callbacks import mask_callback
    from .compiler.driver import Compiled, compile
    from .compiler.dynamo.accelerate import register_with_accelerate
    from .compiler.dynamo.report import reports
    from .compiler.export import export_onnx
    from .ir import errors
    from .ir.pruning.schedule import MaskScheduler

__version__ = "0.1.0"
__all__ = [
    "Compiled", "LoadedModel", "MaskScheduler", "compile", "errors", "export_onnx", "load", "mask_callback", "passes",
    "register_with_accelerate", "reports",
]  # fmt: skip

_HOMES = {
    "Compiled": ".compiler.driver",
    "LoadedModel": ".compiler.artifact",
    "MaskScheduler": ".ir.pruning.schedule",
    "compile": ".compiler.driver",
    "export_onnx": ".compiler.export",
    "load": ".compiler.artifact",
    "mask_callback": ".compiler.callbacks",
    "register_with_accelerate": ".compiler.dynamo.accelerate",
    "reports": ".compiler.dynamo.report",
}
_FOLDERS = {"errors": ".ir.errors", "passes": ".passes"}


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(_FOLDERS[name], __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module 'fxpress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
