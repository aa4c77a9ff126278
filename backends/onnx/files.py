"""ONNX files on disk: where their weights lie. Imports no torch: a loaded artefact needs none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from ...ir.errors import ArtifactError


def _graph(path: Path) -> Any:
    """The model without its weights.

    Raises:
        ArtifactError: if the file is no ONNX model.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, whose module differs between its versions
        raise ArtifactError(f"{path.name} is no ONNX model: {error}") from error


def check_weight_files(path: Path, allowed: set[str]) -> None:
    """Weights may only be read from files of these names, beside the model.

    Raises:
        ArtifactError: names the weight that lies elsewhere.
    """
    for tensor in _graph(path).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in allowed:
                raise ArtifactError(f"weight {tensor.name!r} lies in {entry.value!r}, which is not in the manifest")


def write_renamed(path: Path, target: Path, weight_file: str) -> None:
    """Write the graph of a model to another file, reading its weights from `weight_file` beside it."""
    model = _graph(path)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = weight_file
    onnx.save(model, target)
