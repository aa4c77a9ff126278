"""Folding quantize and dequantize into stored integers: what is folded, what stays, and that nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import inputs, normal, program
from torch import Tensor

from fxpress.ir.graph import Program
from fxpress.ir.ops.quantize import dequantize, dynamic_quantize, expand_int4, int4_linear, int8_linear, quantize
from fxpress.ir.quantization.fold import fold
from fxpress.ir.verify import verify

aten = torch.ops.aten
WEIGHTS = {
    "w": normal(4, 8),
    "s": torch.full((4, 1), 0.02),
    "v": normal(6, 4, seed=1),
    "t": torch.full((6, 1), 0.02),
    "groups": torch.full((4, 2), 0.5),
    "points": torch.tensor([[1.0, -2.0]] * 4),
    "multiples": torch.tensor([[3, 15]] * 4, dtype=torch.int8),
    "one": torch.tensor(0.03),
    "b": normal(4, seed=2),
}


def weight(m: Any) -> Tensor:
    """[4, 8] on a grid of 8 bits, a scale for each output channel."""
    result: Tensor = dequantize(quantize(m.w, m.s), m.s)
    return result


def dynamic(x: Tensor, per: str = "token") -> Tensor:
    result: Tensor = dequantize(*dynamic_quantize(x, per))
    return result


def folded(function: Callable[..., Any], count: int, *examples: Tensor) -> Program:
    """Folded and verified; the outputs are those of the graph that was folded, up to rounding, at two sizes."""
    before = program(function, *(examples or (normal(2, 5, 8),)), **WEIGHTS)
    after = before.copy()
    assert fold(after) == count
    verify(after)
    for base in (3, 6):
        for found, expected in zip(after.run(inputs(before, base)), before.run(inputs(before, base)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    return after


@pytest.mark.parametrize("per", ["tensor", "token"])
@pytest.mark.parametrize("bias", [True, False])
def test_two_quantized_operands_become_a_matmul_of_integers(per: str, bias: bool) -> None:
    after = folded(lambda m, x: F.linear(dynamic(x, per), weight(m), m.b if bias else None), 1)
    assert len(after.calls(int8_linear)) == 1 and not after.calls(aten.linear.default, quantize, dequantize)


def test_a_static_activation_is_stored() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(dequantize(quantize(x, m.one), m.one), weight(m))

    after = folded(forward, 1)
    assert after.calls(quantize)[0].kwargs == {"stored": True}
    assert len(after.calls(int8_linear)) == 1


def test_weights_are_stored_as_integers_and_their_floats_are_gone() -> None:
    after = folded(lambda m, x: F.linear(dynamic(x), weight(m)), 1)
    stored = {name: tensor.dtype for name, tensor in after.module.state_dict().items()}
    assert stored == {"w_integers": torch.int8, "s": torch.float32}
    assert torch.equal(after.module.w_integers, quantize(WEIGHTS["w"], WEIGHTS["s"], stored=True))


def test_stored_integers_are_not_trained() -> None:
    after = folded(lambda m, x: F.linear(dynamic(x), weight(m)), 1)
    assert not after.module.w_integers.requires_grad


def test_an_activation_of_floats_leaves_a_weight_of_integers() -> None:
    after = folded(lambda m, x: F.linear(x, weight(m)), 1)
    assert len(after.calls(aten.linear.default)) == len(after.calls(dequantize)) == 1
    assert after.module.w_integers.dtype is torch.int8


def test_two_linears_of_one_activation_share_its_integers() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        quantized = dynamic(x)
        return F.linear(quantized, weight(m)), F.linear(quantized, weight(m), m.b)

    after = folded(forward, 2)
    assert len(after.calls(dynamic_quantize)) == 1


def test_floats_stay_where_something_else_reads_them() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        quantized = dynamic(x)
        return F.linear(quantized, weight(m)), quantized.exp()

    after = folded(forward, 1)
    assert len(after.calls(int8_linear)) == len(after.calls(dequantize)) == 1
    stored = {"stored" in node.kwargs for node in after.calls(dynamic_quantize)}
    assert stored == {True, False}


def test_a_tied_weight_is_stored_once() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        shared = weight(m)
        return F.linear(dynamic(x), shared), F.linear(dynamic(x.exp()), shared, m.b)

    after = folded(forward, 2)
    assert [name for name in after.module.state_dict() if "integers" in name] == ["w_integers"]


def test_a_table_is_looked_up_in_integers() -> None:
    ids = torch.tensor([[0, 3, 1]])
    before = program(lambda m, i: F.embedding(i, weight(m)), ids, **WEIGHTS)
    after = before.copy()
    assert fold(after) == 1
    verify(after)
    assert torch.equal(after.run([ids])[0], before.run([ids])[0])
    assert [node.target for node in after.calls(aten.embedding.default, dequantize)] == [
        aten.embedding.default,
        aten.embedding.default,
        dequantize,
    ]


def grouped(m: Any, points: bool) -> Tensor:
    """[4, 8] on a grid of 4 bits, in groups of 4."""
    constants = (m.groups, m.points) if points else (m.groups,)
    result: Tensor = dequantize(quantize(m.w, *constants, bits=4), *constants)
    return result


@pytest.mark.parametrize("points", [True, False])
def test_four_bits_are_packed(points: bool) -> None:
    after = folded(lambda m, x: F.linear(x, grouped(m, points), m.b), 1)
    assert len(after.calls(int4_linear)) == 1
    assert after.module.w_packed.dtype is torch.uint8 and after.module.w_packed.shape == (4, 4)


def nested(m: Any) -> Tensor:
    """[4, 8] on a grid of 4 bits, in groups of 4 whose scales are multiples of their row's."""
    scale = dequantize(m.multiples, m.s)
    result: Tensor = dequantize(quantize(m.w, scale, bits=4), scale)
    return result


def test_four_bits_with_nested_scales_are_multiplied_as_integers_of_eight() -> None:
    after = folded(lambda m, x: F.linear(dynamic(x), nested(m), m.b), 1)
    assert len(after.calls(int8_linear)) == len(after.calls(expand_int4)) == 1
    assert after.module.w_packed.dtype is torch.uint8 and not after.calls(aten.linear.default, dequantize)


def test_nested_scales_beside_floats_are_scales_of_groups() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        shared = nested(m)
        return F.linear(dynamic(x), shared), F.linear(x, shared)

    after = folded(forward, 2)
    assert len(after.calls(int8_linear)) == len(after.calls(int4_linear)) == 1
    assert {name for name in after.module.state_dict() if "packed" in name} == {"w_packed"}


def test_rows_of_nested_scales_are_looked_up() -> None:
    before = program(lambda m, i: F.embedding(i, nested(m)), torch.tensor([[0, 3, 1]]), **WEIGHTS)
    after = before.copy()
    assert fold(after) == 1
    verify(after)
    assert torch.equal(after.run([torch.tensor([[2, 3]])])[0], before.run([torch.tensor([[2, 3]])])[0])


def test_an_activation_with_a_scale_for_each_channel_stays_in_floats() -> None:
    """No integer matmul takes it: the scale differs along the axis that is summed over."""

    def forward(m: Any, x: Tensor) -> Tensor:
        scale = m.s.new_full((8,), 0.05)
        return F.linear(dequantize(quantize(x, scale), scale), weight(m))

    after = folded(forward, 1)
    assert not after.calls(int8_linear)


def test_a_weight_in_groups_is_multiplied_as_floats() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(dynamic(x), dequantize(quantize(m.w, m.groups), m.groups))

    after = folded(forward, 1)
    assert not after.calls(int8_linear) and len(after.calls(aten.linear.default)) == 1


def test_scales_that_differ_are_not_folded() -> None:
    """dequantize(quantize(w, s), s2) is no stored weight times one scale that both know."""
    folded(lambda m, x: F.linear(x, dequantize(quantize(m.w, m.s), m.one)), 0)


def test_a_computed_weight_is_not_folded() -> None:
    folded(lambda m, x: F.linear(x, dequantize(quantize(m.w.exp(), m.s), m.s)), 0)


def test_a_chain_of_layers() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = F.linear(dynamic(x), weight(m)).relu()
        return F.linear(dynamic(hidden), dequantize(quantize(m.v, m.t), m.t))

    assert len(folded(forward, 2).calls(int8_linear)) == 2


def test_what_is_folded_is_not_folded_again() -> None:
    after = folded(lambda m, x: F.linear(dynamic(x), weight(m)), 1)
    assert fold(after) == 0


def test_weights_that_were_trained_are_rounded_as_in_training() -> None:
    before = program(lambda m, x: F.linear(dynamic(x), weight(m)), normal(2, 8), **WEIGHTS)
    with torch.no_grad():
        before.module.w += 0.013
    after = before.copy()
    fold(after)
    assert torch.equal(after.module.w_integers.float(), quantize(before.module.w.detach(), WEIGHTS["s"]))
