"""Lowerings that are ONNX functions of our own: a traced program calls them, the finished model holds their nodes."""

from __future__ import annotations

import functools
from typing import Any

import onnx
import onnx_ir

DOMAIN = "fxpress"


def write_out(model: onnx_ir.Model, functions: tuple[Any, ...]) -> None:
    """Replace the calls of functions in a model by their nodes."""
    wanted = _called(model.graph)
    if not wanted:
        return
    known = _by_name(functions)
    while wanted:  # what is called by what is called, and no other: the pass below would write out all of them
        made = onnx_ir.serde.deserialize_function(known[wanted.pop()])
        model.functions[made.identifier()] = made
        wanted |= _called(made.graph) - {name for _, name, _ in model.functions}
    onnx_ir.passes.common.InlinePass()(model)
    model.functions.clear()
    del model.opset_imports[DOMAIN]
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):  # onnxscript names no domains of nested graphs
        model.opset_imports.setdefault(node.domain, 1)


@functools.cache
def _by_name(functions: tuple[Any, ...]) -> dict[str, onnx.FunctionProto]:
    protos = [function.to_function_proto() for function in functions]
    return {proto.name: proto for proto in protos}


def _called(graph: onnx_ir.Graph) -> set[str]:
    """The functions that a graph calls, in nested ones too."""
    return {node.op_type for node in onnx_ir.traversal.RecursiveGraphIterator(graph) if node.domain == DOMAIN}
