"""Integers that fit 4 bits are stored two a byte, and no others."""

import numpy
import onnx_ir
import pytest
from onnx import helper, numpy_helper

from fxpress.backends.onnx.nibbles import store_nibbles


def stored(first: int, second: int, zero_points: tuple[str, str]) -> list[str]:
    """The dtypes of two weights that have these numbers in them, and of their zero points."""
    constants = {
        "a": numpy.full((2, 3), first, numpy.int8),
        "b": numpy.full((2, 3), second, numpy.int8),
        "scale": numpy.ones(2, numpy.float32),
        **{name: numpy.zeros(2, numpy.int8) for name in zero_points},
    }
    nodes = [
        helper.make_node("DequantizeLinear", [weight, "scale", zero_point], [f"{weight}_out"], axis=0)
        for weight, zero_point in zip("ab", zero_points, strict=True)
    ]
    outputs = [helper.make_tensor_value_info(f"{weight}_out", 1, [2, 3]) for weight in "ab"]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = onnx_ir.from_proto(helper.make_model(helper.make_graph(nodes, "graph", [], outputs, initializers)))
    store_nibbles(model)
    made = onnx_ir.to_proto(model).graph.initializer
    assert all((numpy_helper.to_array(item) == constants[item.name]).all() for item in made)
    dtypes = {item.name: str(onnx_ir.DataType(item.data_type)) for item in made}
    return [dtypes[name] for name in ("a", "b", *zero_points)]


@pytest.mark.parametrize(
    ("first", "second", "zero_points", "expected"),
    [
        (-8, 7, ("y", "z"), ["INT4"] * 4),
        (-8, 7, ("z", "z"), ["INT4"] * 4),
        (-8, 8, ("y", "z"), ["INT4", "INT8", "INT4", "INT8"]),
        (-9, 7, ("y", "z"), ["INT8", "INT4", "INT8", "INT4"]),
        (-8, 8, ("z", "z"), ["INT8"] * 4),
    ],
    ids=["both", "one zero point", "too large", "too small", "a zero point that bytes need too"],
)
def test_what_fits_is_stored_two_a_byte(
    first: int, second: int, zero_points: tuple[str, str], expected: list[str]
) -> None:
    assert stored(first, second, zero_points) == expected
