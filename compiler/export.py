"""export_onnx(): compile a model and write it as an ONNX file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..ir.errors import InputError
from . import artifact
from .driver import compile
from .onnx_files import check_form, onnx_files
from .report import Report


def export_onnx(
    model: torch.nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    passes: Any = None,
    example_inputs: Any = None,
    *,
    form: str = "runtime",
    **options: Any,
) -> Report:
    """Compile a model and write it as an ONNX file with its weights beside it; `options` are those of `compile`.

    Args:
        form: as in `Compiled.to_onnx`; for "qdq" nothing is measured, and the report is of the program in PyTorch.

    Raises:
        InputError: the file exists or cannot be written, before any work is done; and what `compile` raises.
    """
    check_form(form)
    if "backend" in options:
        raise InputError(
            "export_onnx chooses the backend by its form; leave out backend, or use compile() and to_onnx()"
        )
    for file in onnx_files(Path(path)):
        artifact.check_new(file)
    backend = "onnx" if form == "runtime" else "eager"
    compiled = compile(model, passes, example_inputs, backend=backend, **options)
    compiled.to_onnx(path, form)
    return compiled.report
