"""ONNX functions of our own."""

from collections import Counter

from fxpress.backends.onnx.lowerings.table import FUNCTIONS


def test_names_are_unique() -> None:
    """Of two functions of one name the second would be written out for both."""
    assert [name for name, count in Counter(item.function_ir.name for item in FUNCTIONS).items() if count > 1] == []
