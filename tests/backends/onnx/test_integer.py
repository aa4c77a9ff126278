"""Integer-only programs give the same integers in ONNX Runtime as in the references, and hold no float inside there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from build import program
from integers import Encoder, batch, canonical, encoder, integer
from torch import Tensor

from fxpress.backends.memory import Memory
from fxpress.backends.onnx.choose import choose
from fxpress.backends.onnx.export import check, save, to_onnx
from fxpress.backends.onnx.session import Session
from fxpress.ir.graph import Program
from fxpress.ir.ops.integer import (
    INT32,
    integer_add,
    integer_gelu,
    integer_layer_norm,
    integer_linear,
    integer_matmul,
    integer_softmax,
    requantize,
)

FLOATS = {
    onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16,
}  # fmt: skip


def lowered(traced: Program, folder: Path) -> tuple[onnx.ModelProto, Session]:
    assert check(traced) == []
    chosen, _ = choose(traced, threads=1, memory=Memory("onnx", folder / "memory"))
    save(to_onnx(traced, chosen), folder / "model.onnx")
    return onnx.load(str(folder / "model.onnx")), Session(folder / "model.onnx", 1)


def assert_identical(traced: Program, session: Session, given: list[Tensor]) -> None:
    with torch.no_grad():
        expected = traced.run(given)
    for found, wanted in zip(session.run([item.numpy() for item in given]), expected, strict=True):
        assert torch.equal(torch.from_numpy(found), wanted)


def floats_inside(model: onnx.ModelProto) -> tuple[int, list[str]]:
    """The number of nodes between the casts to and from integers, and those of them that give floats or no known type.

    Without such casts all nodes are inside.
    """
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=False)
    values = [*typed.graph.value_info, *typed.graph.output, *typed.graph.input]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in typed.graph.initializer}
    floats = {name for name, kind in types.items() if kind in FLOATS}
    inside: set[str] = set()
    count, found = 0, []
    for node in typed.graph.node:
        cast = node.op_type == "Cast"
        enters = cast and node.input[0] in floats and node.output[0] not in floats
        leaves = cast and node.output[0] in floats
        if enters or (any(name in inside for name in node.input) and not leaves):
            count += 1
            inside.update(node.output)
            found += [f"{node.op_type} {name}" for name in node.output if name in floats or not types.get(name)]
            if not enters:
                found += [f"{node.op_type} reads {name}" for name in node.input if name in floats]
    return count, found


# --- operators -------------------------------------------------------------------------------------------------


def whole(*sizes: int, limits: tuple[int, int] = INT32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(limits[0], limits[1] + 1, sizes, generator=generator).to(torch.int32)


def int8(*sizes: int, seed: int = 0) -> Tensor:
    return whole(*sizes, limits=(-128, 127), seed=seed).to(torch.int8)


Multipliers = torch.arange(1, 7) * (2**26 + 12345)
Mask = Callable[[int, int], Tensor]


def key_mask(rows: int, length: int) -> Tensor:
    mask = torch.arange(length) < torch.arange(1, rows + 1)[:, None]
    return mask & (torch.arange(rows) > 0)[:, None]  # the first row has no key


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[[int, int], list[Tensor]]]] = {
    "requantize": (
        lambda m, x: [
            requantize(x, m.many, 30, m.many % 100 - 50, -128, 127),
            requantize(x, m.many[0], 61, None, *INT32),
            requantize(x, m.many, 1, None, -32768, 32767),
        ],
        lambda b, n: [whole(b, n, 6)],
    ),
    "add": (
        lambda m, x, y: integer_add(x, y, m.many[0], m.many, 28, *INT32),
        lambda b, n: [whole(b, n, 6), whole(b, n, 6, seed=1)],
    ),
    "linear": (
        lambda m, x: [integer_linear(x, m.weight, None), integer_linear(x, m.weight, m.bias)],
        lambda b, n: [int8(b, n, 33)],
    ),
    "matmul": (
        lambda m, q, k, p: [integer_matmul(q, k.transpose(-1, -2)), integer_matmul(p, k)],
        lambda b, n: [int8(b, 3, n, 5), int8(b, 3, n, 5, seed=1), whole(b, 3, n, n, limits=(0, 2**15))],
    ),
    "gelu": (
        lambda m, x: [integer_gelu(x), integer_gelu(x.bitwise_right_shift(13))],
        lambda b, n: [whole(b, n, 6)],
    ),
    "softmax": (
        lambda m, x, mask: [
            integer_softmax(x, None, mask, empty="mean"),
            integer_softmax(x, mask[:, None, None], left=2, right=0),
        ],
        lambda b, n: [whole(b, 3, n, n, limits=(-(2**19), 2**19)), key_mask(b, n)],
    ),
    "softmax_extremes": (lambda m, x: integer_softmax(x), lambda b, n: [whole(b, 3, n, n)]),
    "layer_norm": (
        lambda m, x: [integer_layer_norm(x, m.bias[:6], m.bias[:6], 10**6), integer_layer_norm(x, None, None, 0)],
        lambda b, n: [whole(b, n, 6, limits=(-32768, 32767)) // (torch.arange(b * n).reshape(b, n, 1) ** 4 + 1).int()],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_exact(name: str, tmp_path: Path) -> None:
    function, examples = OPERATORS[name]

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("many", Multipliers)
            self.register_buffer("weight", int8(7, 33, seed=2))
            self.register_buffer("bias", whole(7, limits=(-(2**20), 2**20), seed=3))

        def forward(self, *given: Tensor) -> Any:
            return function(self, *given)

    traced = operator_program(function, Module(), examples(2, 5))
    model, session = lowered(traced, tmp_path)
    for sizes in ((2, 5), (3, 8), (1, 1), (1, 13)):
        assert_identical(traced, session, examples(*sizes))
    types = {value.type.tensor_type.elem_type for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    assert not types & FLOATS


def operator_program(function: Any, module: torch.nn.Module, given: list[Tensor]) -> Program:
    count = len(given)
    forward = {1: lambda self, a: function(self, a), 2: lambda self, a, b: function(self, a, b)}
    forward[3] = lambda self, a, b, c: function(self, a, b, c)
    type(module).forward = forward[count]
    return program(module, *given)


# --- programs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["post", "pre_causal"])
def test_a_layer_is_exact_and_has_no_float_inside(name: str, tmp_path: Path) -> None:
    causal = Encoder(first=True, activation=torch.relu, causal=True, layers=1)
    traced, _ = integer(encoder() if name == "post" else canonical(causal))
    model, session = lowered(traced, tmp_path)
    count, floats = floats_inside(model)
    assert count > 100 and floats == []
    assert sum(node.op_type == "Round" for node in model.graph.node) == 1, "one quantize"
    for rows, length in ((2, 7), (3, 11), (1, 1), (1, 6), (3, 1)):
        assert_identical(traced, session, batch(rows, length, seed=rows))


def test_floats_inside_are_found() -> None:
    cast = onnx.TensorProto
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["a"], to=cast.INT32),
        onnx.helper.make_node("Cast", ["a"], ["b"], to=cast.INT64),
        onnx.helper.make_node("Mul", ["b", "b"], ["c"]),
        onnx.helper.make_node("DequantizeLinear", ["a", "s"], ["d"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "floats",
        [value("x", cast.FLOAT, [2])],
        [value("c", cast.INT64, [2]), value("d", cast.FLOAT, [2])],
        [onnx.helper.make_tensor("s", cast.FLOAT, [], [0.5])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    assert floats_inside(model) == (4, ["DequantizeLinear d", "DequantizeLinear reads s"])
