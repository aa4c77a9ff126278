"""carried: a result at an index of a carried axis depends on the operands at that index alone; tried on values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from fxpress.ir.axes import carried, rank
from fxpress.ir.graph import Program
from fxpress.ir.ops.linear import gated_linear, linear_act, mlp, split_linear
from fxpress.ir.ops.norm import add_layer_norm, add_rms_norm, rms_norm
from fxpress.ir.ops.quantize import dynamic_quantize, quantize
from fxpress.ir.ops.rotary import rotary

x = normal(3, 4, 5, 8)
row, weight, wide = normal(8), normal(6, 8), normal(8, 6)
ids = torch.randint(0, 6, (3, 4), generator=torch.Generator().manual_seed(0))
CALLS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "mul": (lambda m, a, b: a * b, (x, normal(3, 1, 5, 1))),
    "add of fewer axes": (lambda m, a, b: a + b, (x, normal(5, 8))),
    "where": (lambda m, a, b: torch.where(a > 0, a, b), (x, normal(4, 1, 8))),
    "where of a number": (lambda m, a: torch.where(a > 0, a, 0.0), (x,)),
    "gelu": (lambda m, a: F.gelu(a), (x,)),
    "cast": (lambda m, a: a.double(), (x,)),
    "expand": (lambda m, a: a.expand(2, 3, 4, 5, 8), (x,)),
    "expand of ones": (lambda m, a: a.expand(3, 4, 5, 8), (normal(3, 1, 5, 1),)),
    "linear": (lambda m, a: F.linear(a, m.w), (x,)),
    "linear_act": (lambda m, a: linear_act(a, m.w, None, "gelu"), (x,)),
    "gated_linear": (lambda m, a: gated_linear(a, m.w, m.w, None, None, "silu"), (x,)),
    "mlp": (lambda m, a: mlp(a, m.w, None, m.d, None, "relu"), (x,)),
    "split_linear": (lambda m, a: split_linear(a, m.w, None, [2, 4])[1], (x,)),
    "layer_norm": (lambda m, a: F.layer_norm(a, (8,)), (x,)),
    "layer_norm of two axes": (lambda m, a: F.layer_norm(a, (5, 8)), (x,)),
    "rms_norm": (lambda m, a: rms_norm(a, m.r, 1e-6), (x,)),
    "add_layer_norm": (lambda m, a, b: add_layer_norm(a, b, m.r, None, 1e-6)[0], (x, normal(3, 1, 5, 8))),
    "add_rms_norm": (lambda m, a, b: add_rms_norm(a, b, m.r, 1e-6)[1], (x, normal(3, 4, 5, 8, seed=1))),
    "rotary": (lambda m, a, b: rotary(a, b.cos(), b.sin()), (x, normal(1, 1, 5, 4))),
    "quantize": (lambda m, a, b: quantize(a, b), (x, normal(3, 4, 1, 1).abs())),
    "dynamic_quantize a token": (lambda m, a: dynamic_quantize(a, "token")[0], (x,)),
    "dynamic_quantize": (lambda m, a: dynamic_quantize(a, "tensor")[0], (x,)),
    "embedding": (lambda m, a: F.embedding(a, m.w), (ids,)),
    "softmax": (lambda m, a: a.softmax(1), (x,)),
    "slice": (lambda m, a: a[:, 1:3], (x,)),
    "cat": (lambda m, a, b: torch.cat((a, b), -2), (x, normal(3, 4, 2, 8))),
    "split": (lambda m, a: a.split([3, 5], -1)[0], (x,)),
    "chunk": (lambda m, a: a.chunk(2, 1)[1], (x,)),
    "mean": (lambda m, a: a.mean(-1, keepdim=True), (x,)),
    "sum": (lambda m, a: a.sum((0, 2)), (x,)),
    "sum of all": (lambda m, a: a.sum(), (x,)),
    "amax": (lambda m, a: a.amax(1), (x,)),
    "transpose": (lambda m, a: a.transpose(1, -1), (x,)),
    "permute": (lambda m, a: a.permute(2, 0, 3, 1), (x,)),
    "unsqueeze": (lambda m, a: a.unsqueeze(-2), (x,)),
    "select": (lambda m, a: a.select(1, 2), (x,)),
    "heads": (lambda m, a: a.reshape(3, 4, 40), (x,)),
    "tokens": (lambda m, a: a.reshape(12, 5, 8), (x,)),
    "cumsum": (lambda m, a: a.cumsum(1), (x,)),
    "matmul": (lambda m, a, b: a @ b, (x, normal(3, 4, 8, 2))),
    "flip": (lambda m, a: a.flip(1), (x,)),
    "roll": (lambda m, a: a.roll(1), (x,)),
    "dropout": (lambda m, a: F.dropout(a, 0.5, True), (x,)),
}
MIXES = ("sum of all", "cumsum", "matmul", "flip", "roll", "dynamic_quantize")  # of which nothing is known


def traced(name: str) -> Program:
    function, operands = CALLS[name]
    return program(function, *operands, w=weight, d=wide, r=row, dynamic=None)


def source(node: fx.Node, found: Program) -> dict[int, list[int | None]]:
    """For each input, its axes among those of `node`, through all calls between."""
    if node.op == "placeholder":
        inputs = [item for item in found.graph.nodes if item.op == "placeholder"]
        return {inputs.index(node): list(range(rank(node)))}
    result: dict[int, list[int | None]] = {}
    for used, axes in carried(node).items():
        for index, own in source(used, found).items():
            result[index] = [None if axis is None else axes[axis] for axis in own]
    return result


def one(found: Program) -> fx.Node:
    return next(iter(reversed(found.graph.nodes))).args[0][0]  # type: ignore[no-any-return, index, union-attr]


@pytest.mark.parametrize("name", CALLS)
def test_nothing_else_reaches_a_carried_index(name: str) -> None:
    found = traced(name)
    operands = CALLS[name][1]
    axes = source(one(found), found)
    assert bool(axes) != (name in MIXES) or name == "dynamic_quantize"
    expected = run(found, operands)
    for index, own in axes.items():
        for axis, where in enumerate(own):
            for place in range(0 if where is None else operands[index].shape[axis]):
                changed = [*operands[:index], others_changed(operands[index], axis, place), *operands[index + 1 :]]
                assert torch.equal(run(found, changed).select(where, place), expected.select(where, place))


def run(found: Program, operands: Sequence[Tensor]) -> Tensor:
    torch.manual_seed(0)  # for dropout
    result: Tensor = found.run(operands)[0]
    return result


def others_changed(tensor: Tensor, axis: int, place: int) -> Tensor:
    """Another tensor, the same at one place of an axis alone."""
    result = tensor.flip(tuple(range(tensor.dim())))
    result.select(axis, place).copy_(tensor.select(axis, place))
    return result


@pytest.mark.parametrize("name", ["linear", "mul", "transpose", "heads", "layer_norm", "split_linear", "embedding"])
def test_what_is_carried(name: str) -> None:
    expected = {
        "linear": {0: [0, 1, 2, None]},
        "mul": {0: [0, 1, 2, 3], 1: [0, None, 2, None]},
        "transpose": {0: [0, 3, 2, 1]},
        "heads": {0: [0, 1, None, None]},
        "layer_norm": {0: [0, 1, 2, None]},
        "split_linear": {0: [0, 1, 2, None]},
        "embedding": {0: [0, 1]},
    }
    found = traced(name)
    assert source(one(found), found) == expected[name]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_a_reshape_carries_the_first_axes_that_it_keeps(sizes: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(sizes)))
    rest = torch.Size(sizes[kept:]).numel()
    cut = data.draw(st.sampled_from([number for number in range(1, rest + 1) if rest % number == 0]))
    after = [*sizes[:kept], cut, rest // cut]
    found = program(lambda m, a: a.view(after), normal(*sizes), dynamic=None)
    node = one(found)
    if node.op == "placeholder":
        return
    (axes,) = carried(node).values()
    assert axes[:kept] == list(range(kept))
    assert all(axis is None or sizes[axis] == after[axis] for axis in axes)
