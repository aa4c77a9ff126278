"""Chains of views in an ONNX model: one step each, or none.

Each lowering asks for the shape that its kernel takes, and the next one for another. ONNX Runtime runs every Reshape as
a node of its own (a few microseconds, of thirty milliseconds in all for a small encoder, and there are hundreds), and
removes transpositions only.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir


def join_views(model: onnx_ir.Model) -> None:
    """Join each Reshape with the Reshape before it, each Transpose with the Transpose before it, and drop those that
    change nothing.

    What nothing reads any more is left in place.
    """
    for node in model.graph:
        if node.op_type == "Transpose":
            _join_transposes(node)
        elif node.op_type == "Reshape":
            _join_reshapes(node)


def _source(node: onnx_ir.Node, kind: str) -> onnx_ir.Node | None:
    """The node of some kind that makes a node's first input."""
    made = node.inputs[0].producer() if node.inputs[0] is not None else None
    return made if made is not None and made.op_type == kind and made.domain == node.domain == "" else None


def _bypass(node: onnx_ir.Node, value: onnx_ir.Value) -> None:
    """Let every reader of a node read another value; a graph's output keeps its node, and so its name."""
    if not node.outputs[0].is_graph_output():
        node.outputs[0].replace_all_uses_with(value)


def _join_transposes(node: onnx_ir.Node) -> None:
    before = _source(node, "Transpose")
    if before is None or "perm" not in node.attributes or "perm" not in before.attributes:
        return
    first: Sequence[int] = before.attributes["perm"].as_ints()
    order = [first[axis] for axis in node.attributes["perm"].as_ints()]
    value = before.inputs[0]
    assert value is not None
    if order == sorted(order):
        _bypass(node, value)
    else:
        node.replace_input_with(0, value)
        node.attributes["perm"] = onnx_ir.AttrInt64s("perm", order)


def _join_reshapes(node: onnx_ir.Node) -> None:
    wanted = node.inputs[1]
    if wanted is not None and wanted.const_value is None:
        # A computed shape is of sizes, of which a 0 is one: a router may give an expert no token. torch's translation
        # of reshape leaves it to stand for the input's size.
        node.attributes["allowzero"] = onnx_ir.AttrInt64("allowzero", 1)
    before = _source(node, "Reshape")
    if before is not None and not _copies_sizes(node):
        node.replace_input_with(0, before.inputs[0])
    value = node.inputs[0]
    if value is not None and _same_shape(value, node.outputs[0]):
        _bypass(node, value)


def _copies_sizes(node: onnx_ir.Node) -> bool:
    """Whether a 0 in a Reshape's shape may stand for the size at its place in the input."""
    allows = node.attributes.get("allowzero")
    if allows is not None and allows.as_int() == 1:
        return False
    wanted = node.inputs[1].const_value if node.inputs[1] is not None else None
    return wanted is not None and 0 in wanted.numpy()


def _same_shape(first: onnx_ir.Value, second: onnx_ir.Value) -> bool:
    if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
        return False
    pairs = zip(first.shape, second.shape, strict=True)
    return all(_name(a) == _name(b) is not None for a, b in pairs)


def _name(size: onnx_ir.SymbolicDim | int) -> int | str | None:
    """A size's number or name; None: unknown."""
    return size if isinstance(size, int) else size.value
