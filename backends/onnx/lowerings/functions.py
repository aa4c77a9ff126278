"""Lowerings that are ONNX functions of our own: a traced program calls them, the finished model holds their nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir

DOMAIN = "fxpress"


def write_out(model: onnx_ir.Model, functions: Iterable[Any]) -> None:
    """Replace the calls of functions in a model by their nodes."""
    if not any(node.domain == DOMAIN for node in model.graph):
        return
    for function in functions:
        made = onnx_ir.serde.deserialize_function(function.to_function_proto())
        model.functions[made.identifier()] = made
    onnx_ir.passes.common.InlinePass()(model)
    model.functions.clear()
    del model.opset_imports[DOMAIN]
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):  # onnxscript names no domains of nested graphs
        model.opset_imports.setdefault(node.domain, 1)
