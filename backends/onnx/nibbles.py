"""Integers of 4 bits in an ONNX model: two a byte. torch has no such dtype, so its exporter writes them as int8."""

from __future__ import annotations

import onnx_ir

INT4 = onnx_ir.DataType.INT4


def store_nibbles(model: onnx_ir.Model) -> None:
    """Make int4 of the constant integers that only DequantizeLinear reads, where they and their zero points fit."""
    nodes = {node for node in model.graph if node.op_type == "DequantizeLinear" and all(map(_fits, _integers(node)))}
    while shared := [node for node in nodes if not _readers(node) <= nodes]:  # a zero point of 0 may serve others too
        nodes.difference_update(shared)
    for value in {value for node in nodes for value in _integers(node)}:
        assert value.const_value is not None
        value.const_value = onnx_ir.Tensor(value.const_value.numpy().astype(INT4.numpy()), name=value.name)
        value.dtype = INT4


def _integers(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """The integers that a DequantizeLinear reads, and their zero point."""
    return [value for value in (node.inputs[0], *node.inputs[2:]) if value is not None]


def _readers(node: onnx_ir.Node) -> set[onnx_ir.Node]:
    return {use.node for value in _integers(node) for use in value.uses()}


def _fits(value: onnx_ir.Value) -> bool:
    if value.const_value is None or value.dtype != onnx_ir.DataType.INT8 or not value.shape:
        return False
    array = value.const_value.numpy()
    return bool(array.size and array.min() >= -8 and array.max() <= 7)
