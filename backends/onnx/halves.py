"""Weights of an ONNX model in bfloat16, half as large, for a runtime that multiplies them so."""

from __future__ import annotations

import onnx_ir

_BFLOAT16, _FLOAT = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT
_SMALLEST = 1024  # numbers of a matrix that is worth a node


def store_halves(model: onnx_ir.Model) -> None:
    """Store matrices that only matmuls and lookups read in bfloat16, with a Cast behind each.

    What such a runtime multiplies it rounds to bfloat16 itself; rows that are looked up are rounded here, as they are
    when a model's weights are. Everything else, frequencies of rotations or biases, keeps its digits.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        if not _is_weight(value):
            continue
        assert value.const_value is not None and value.name is not None
        numbers = value.const_value.numpy().astype(_BFLOAT16.numpy())
        stored = onnx_ir.Value(
            name=f"{value.name}.bfloat16",
            shape=value.shape,
            type=onnx_ir.TensorType(_BFLOAT16),
            const_value=onnx_ir.Tensor(numbers, name=f"{value.name}.bfloat16"),
        )
        graph.initializers.pop(value.name)
        graph.register_initializer(stored)
        cast = onnx_ir.node("Cast", [stored], {"to": _FLOAT.value}, num_outputs=1)
        wide = cast.outputs[0]
        wide.shape, wide.type = value.shape, onnx_ir.TensorType(_FLOAT)
        value.replace_all_uses_with(wide)
        graph.insert_before(graph[0], cast)


def _is_weight(value: onnx_ir.Value) -> bool:
    if value.dtype != _FLOAT or value.const_value is None or value.is_graph_output():
        return False
    numbers = value.const_value
    if len(numbers.shape) != 2 or numbers.size < _SMALLEST:
        return False
    uses = value.uses()
    return bool(uses) and all(_reads_weight(use.node, use.idx) for use in uses)


def _reads_weight(node: onnx_ir.Node, place: int) -> bool:
    if node.domain != "":
        return False
    lookup = node.op_type == "Gather" and place == 0
    return lookup or (node.op_type in ("MatMul", "Gemm") and place < 2)
