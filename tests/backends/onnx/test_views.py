"""Chains of views in an ONNX model are joined, and the model computes what it did."""

from typing import Any

import numpy
import onnx.shape_inference
import onnx_ir
import onnx_ir.passes.common
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fxpress.backends.onnx.views import join_views


def model(*steps: tuple[str, list[int]], allowzero: int = 1, source: tuple[Any, ...] = ("n", 2, 6)) -> Any:
    """A chain of views of x: ("Reshape", shape) or ("Transpose", perm), then a negation as y."""
    nodes, constants, value = [], [], "x"
    for index, (kind, numbers) in enumerate(steps):
        name = f"v{index}"
        if kind == "Transpose":
            nodes.append(helper.make_node(kind, [value], [name], perm=numbers))
        else:
            constants.append(numpy_helper.from_array(numpy.array(numbers, numpy.int64), f"s{index}"))
            nodes.append(helper.make_node(kind, [value, f"s{index}"], [name], allowzero=allowzero))
        value = name
    nodes.append(helper.make_node("Neg", [value], ["y"]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, source)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "views", inputs, outputs, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx_ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(made))


def kinds(given: Any) -> list[str]:
    """The views that are left."""
    onnx_ir.passes.common.RemoveUnusedNodesPass()(given)
    return [node.op_type for node in given.graph if node.op_type != "Neg"]


def run(given: Any) -> Any:
    session = onnxruntime.InferenceSession(
        onnx_ir.serde.serialize_model(given).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": numpy.arange(36, dtype=numpy.float32).reshape(3, 2, 6)})[0]


CHAINS: dict[str, tuple[Any, list[str]]] = {
    "two reshapes": ((("Reshape", [-1, 6]), ("Reshape", [-1, 3, 4])), ["Reshape"]),
    "there and back": ((("Transpose", [1, 0, 2]), ("Transpose", [1, 0, 2])), []),
    "a permutation of a permutation": ((("Transpose", [1, 2, 0]), ("Transpose", [0, 2, 1])), ["Transpose"]),
    "its own shape": ((("Reshape", [3, 2, 6]), ("Reshape", [3, 2, 6])), ["Reshape"]),
    "heads and back": (
        (
            ("Reshape", [3, 2, 2, 3]),
            ("Transpose", [0, 2, 1, 3]),
            ("Transpose", [0, 2, 1, 3]),
            ("Reshape", [6, 6]),
        ),
        ["Reshape"],
    ),
    "a transposition between": (
        (("Reshape", [3, 12]), ("Transpose", [1, 0]), ("Reshape", [36])),
        ["Reshape", "Transpose", "Reshape"],
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str) -> None:
    steps, left = CHAINS[name]
    given = model(*steps)
    expected = run(given)
    join_views(given)
    assert kinds(given) == left
    numpy.testing.assert_array_equal(run(given), expected)


def test_a_reshape_to_the_shape_it_has_goes() -> None:
    given = model(("Reshape", [3, 2, 6]), source=(3, 2, 6))
    join_views(given)
    assert kinds(given) == []


def test_a_size_copied_from_the_input_keeps_that_input() -> None:
    """Without allowzero a 0 is the size at its place in the input, here 18 and not 3."""
    given = model(("Reshape", [18, 2]), ("Reshape", [0, 2, 1]), allowzero=0)
    expected = run(given)
    join_views(given)
    assert kinds(given) == ["Reshape", "Reshape"]
    numpy.testing.assert_array_equal(run(given), expected)


def test_a_computed_size_of_zero_is_a_size() -> None:
    """Rows that a router gives to no expert: [0, 6] as [0, 6 / 3, 3] by a computed shape."""
    nodes = [
        helper.make_node("Shape", ["x"], ["rows"], start=0, end=1),
        helper.make_node("Concat", ["rows", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    rest = numpy_helper.from_array(numpy.array([1, 2, 1], numpy.int64), "rest")
    graph = helper.make_graph(nodes, "rows", inputs, outputs, [rest])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    given = onnx_ir.serde.deserialize_model(made)
    join_views(given)
    session = onnxruntime.InferenceSession(
        onnx_ir.serde.serialize_model(given).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for rows in (3, 0):
        assert session.run(None, {"x": numpy.ones((rows, 2), numpy.float32)})[0].shape == (rows, 1, 2, 1)


def test_a_value_read_elsewhere_stays() -> None:
    given = model(("Reshape", [-1, 6]), ("Reshape", [36]))
    given.graph.outputs.append(given.graph.node(0).outputs[0])
    join_views(given)
    assert kinds(given) == ["Reshape", "Reshape"]


def test_an_output_keeps_its_name() -> None:
    given = model(("Transpose", [1, 0, 2]), ("Transpose", [1, 0, 2]))
    given.graph.outputs[:] = [given.graph.node(1).outputs[0]]
    join_views(given)
    assert [value.name for value in given.graph.outputs] == ["v1"]
