"""Matrices that matmuls and lookups read are stored in bfloat16, and nothing else."""

from pathlib import Path

import numpy
import onnx
import onnx_ir
import pytest
from onnx import helper, numpy_helper

from fxpress.backends.onnx.halves import store_halves
from fxpress.backends.openvino.session import OpenVinoSession

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
READERS = {
    "a matmul's weight": helper.make_node("MatMul", ["x", "w"], ["y"]),
    "a matmul's first operand": helper.make_node("MatMul", ["w", "t"], ["y"]),
    "a Gemm's weight": helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    "a Gemm's third operand": helper.make_node("Gemm", ["x", "t", "w"], ["y"]),
    "a table": helper.make_node("Gather", ["w", "i"], ["y"]),
    "an operand of a sum": helper.make_node("Add", ["x", "w"], ["y"]),
}
KINDS = {  # what each stores w in
    "a matmul's weight": "BFLOAT16",
    "a matmul's first operand": "BFLOAT16",
    "a Gemm's weight": "BFLOAT16",
    "a Gemm's third operand": "FLOAT",
    "a table": "BFLOAT16",
    "an operand of a sum": "FLOAT",
}


def model(nodes: list[onnx.NodeProto], weight: numpy.ndarray) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(name, FLOAT, ["n", weight.shape[0]] if name == "x" else [weight.shape[1], 3])
        for name in ("x", "t")
    ]
    inputs.append(helper.make_tensor_value_info("i", INT64, ["n"]))
    outputs = [helper.make_tensor_value_info(node.output[0], FLOAT, None) for node in nodes]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, [numpy_helper.from_array(weight, "w")])
    made = onnx_ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    store_halves(made)
    return onnx_ir.to_proto(made)


def kinds(made: onnx.ModelProto) -> list[str]:
    return [onnx_ir.DataType(item.data_type).name for item in made.graph.initializer]


@pytest.mark.parametrize("reader", READERS)
def test_by_what_reads_it(reader: str) -> None:
    assert kinds(model([READERS[reader]], numpy.ones((32, 32), numpy.float32))) == [KINDS[reader]]


def test_small_ones_stay() -> None:
    assert kinds(model([READERS["a matmul's weight"]], numpy.ones((31, 33), numpy.float32))) == ["FLOAT"]


def test_one_that_is_read_as_it_is_too_stays() -> None:
    nodes = [READERS["a matmul's weight"], helper.make_node("Add", ["x", "w"], ["z"])]
    assert kinds(model(nodes, numpy.ones((32, 32), numpy.float32))) == ["FLOAT"]


def test_the_numbers_are_those_that_round_to_nearest_gives(tmp_path: Path) -> None:
    weight = numpy.random.default_rng(0).standard_normal((40, 32), numpy.float32)
    made = model([READERS["a table"]], weight)
    onnx.save(made, tmp_path / "model.onnx")
    x, t = numpy.zeros((1, 40), numpy.float32), numpy.zeros((32, 3), numpy.float32)
    session = OpenVinoSession(tmp_path / "model.onnx", threads=1)
    (found,) = session.run([x, t, numpy.arange(40)])
    bits = weight.view(numpy.uint32).astype(numpy.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(numpy.uint32).view(numpy.float32)
    assert numpy.array_equal(found, rounded)
