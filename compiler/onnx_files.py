"""The two files of an exported ONNX model, the graph and its weights: both appear whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ..ir.errors import InputError, nearest
from . import artifact

FORMS = ("runtime", "qdq")


def onnx_files(path: Path) -> tuple[Path, Path]:
    """The two files of an ONNX model: the graph and its weights.

    Raises:
        InputError: if the path does not end in .onnx.
    """
    if path.suffix != ".onnx":
        raise InputError(f"an ONNX file must end in .onnx, found {str(path)!r}")
    return path, path.with_suffix(".safetensors")


def check_form(form: str) -> None:
    """Refuse a form that `to_onnx` does not know.

    Raises:
        InputError: names the nearest one.
    """
    if form not in FORMS:
        raise InputError(f"unknown form {form!r}: {nearest(form, FORMS)}")


def write_onnx(files: Path, path: Path) -> None:
    """Copy model.onnx and its weights to another name; both appear whole, the graph last."""
    from ..backends.onnx.files import write_renamed

    graph_file, weight_file = onnx_files(path)
    for file in (graph_file, weight_file):
        artifact.check_new(file)
    weights = files / Path(artifact.MODEL).with_suffix(".safetensors")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            write_renamed(files / artifact.MODEL, Path(folder) / "graph", weight_file.name)
            if weights.exists():
                shutil.copyfile(weights, Path(folder) / "weights")
                os.rename(Path(folder) / "weights", weight_file)
            os.rename(Path(folder) / "graph", graph_file)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
