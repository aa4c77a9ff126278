"""Quantize(requantize=True): integers of one fixed scale as those of the next, only where nothing reads floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import before_after, normal, program, reasons, rewritten
from torch import Tensor, nn

import fxpress
from fxpress.ir.equality import sqnr_db
from fxpress.ir.errors import InputError
from fxpress.ir.graph import Program
from fxpress.ir.ops.integer import integer_linear
from fxpress.ir.ops.integer import requantize as requantized
from fxpress.ir.ops.quantize import dequantize, int8_linear, quantize
from fxpress.ir.quantization.requantize import requantize
from fxpress.ir.rewrite import Context
from fxpress.ir.verify import verify
from fxpress.passes import Quantize

BATCHES = [[normal(2, 5, 8, seed=seed)] for seed in range(4)]
FOUR: dict[str, Any] = {"weights": "int4", "activations": "int8"}
STATIC: dict[str, Any] = {"mode": "static", "method": "minmax", "sensitive": None}


def two(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.w, m.b), m.v)


def relu(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, m.w, m.b)), m.v)


def kept(m: Any, x: Tensor) -> list[Tensor]:
    hidden = F.relu(F.linear(x, m.w, m.b))
    return [F.linear(hidden, m.v), hidden]


def gelu(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, m.w, m.b)), m.v)


def traced(function: Callable[..., Any]) -> Program:
    return program(function, BATCHES[0][0], w=normal(16, 8), b=normal(16, seed=1), v=normal(4, 16, seed=2))


@pytest.mark.parametrize("function", [two, relu], ids=lambda item: item.__name__)
def test_rule(function: Callable[..., Any], golden: Callable[[str], None]) -> None:
    before = traced(function)
    after, result = rewritten(before, Quantize(requantize=True, **STATIC), Context(calibration=BATCHES))
    golden(before_after(before, after, result))


@pytest.mark.parametrize("function", [two, relu], ids=lambda item: item.__name__)
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"method": "minmax+smoothquant"}, FOUR], ids=str)
def test_integers_are_those_of_floats_but_for_ties(function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Those of the second layer, read off at its input."""
    found = []
    for each in (False, True):
        after, _ = rewritten(
            traced(function), Quantize(requantize=each, **{**STATIC, **options}), Context(calibration=BATCHES)
        )
        node = after.calls(int8_linear)[-1].args[0]
        after.graph.output_node().args = ([node],)
        after.clean()
        found.append(after.run([normal(3, 7, 8, seed=9)])[0].int())
    difference = (found[0] - found[1]).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


def test_a_row_of_zeros_keeps_its_bias() -> None:
    """It has no scale of its own to round the bias to."""
    w, b = 1e-3 * normal(16, 8), 1e-3 * normal(16, seed=1)
    w[::2] = 0
    made = program(two, BATCHES[0][0], w=w, b=b, v=normal(4, 16, seed=2))
    after, result = rewritten(made, Quantize(requantize=True, **STATIC), Context(calibration=BATCHES))
    x = normal(3, 7, 8, seed=9)
    assert result.rewrites["requantize"] == 1 and sqnr_db(after.run([x])[0], made.run([x])[0]) > 30


def test_no_float_is_left_between_two_layers() -> None:
    after, result = rewritten(traced(relu), Quantize(requantize=True, **STATIC), Context(calibration=BATCHES))
    assert result.rewrites["requantize"] == 1
    (first,), (second,) = after.calls(integer_linear), after.calls(requantized)
    assert second.args[0] is first and not after.calls(torch.ops.aten.relu.default)


def test_what_is_read_as_floats_stays() -> None:
    after, result = rewritten(traced(kept), Quantize(requantize=True, **STATIC), Context(calibration=BATCHES))
    assert reasons(result, "requantize") == ["relu is read as floats by output"]
    assert len(after.calls(quantize)) == 2 and not after.calls(requantized)


def test_behind_another_function_there_are_floats() -> None:
    after, result = rewritten(traced(gelu), Quantize(requantize=True, **STATIC), Context(calibration=BATCHES))
    assert result.rewrites["requantize"] == 0 and not reasons(result, "requantize") and len(after.calls(quantize)) == 2


@pytest.mark.parametrize("zero_point", [None, 7])
def test_dequantize_before_quantize(zero_point: int | None) -> None:
    """(q - 7) 0.625 in units of 0.25 is 2.5 (q - 7)."""
    given = torch.arange(-128, 128, dtype=torch.int8)[None]
    zero = {} if zero_point is None else {"z": torch.tensor(float(zero_point))}

    def function(m: Any, q: Tensor) -> Tensor:
        found: Tensor = quantize(dequantize(q, m.s, getattr(m, "z", None)), m.t, m.u, stored=True)
        return found

    made = program(function, given, s=torch.tensor(0.625), t=torch.tensor(0.25), u=torch.tensor(-3.0), **zero)
    assert requantize(made) == (1, [])
    verify(made)
    steps = (given.long() - (zero_point or 0)) * 5
    expected = (torch.div(steps + 1, 2, rounding_mode="floor") - 3).clamp(-128, 127)  # halves up
    assert torch.equal(made.run([given])[0].long(), expected)
    assert requantize(made) == (0, [])


def test_scales_that_are_too_far_apart_are_refused() -> None:
    def function(m: Any, q: Tensor) -> Tensor:
        found: Tensor = quantize(dequantize(q, m.s), m.t, stored=True)
        return found

    made = program(function, torch.zeros(1, 3, dtype=torch.int8), s=torch.tensor(1e10), t=torch.tensor(1e-3))
    count, (refusal,) = requantize(made)
    assert count == 0 and "scales of integers are too far apart" in refusal.reason


@pytest.mark.parametrize("options", [{}, {"mode": "dynamic"}, {"mode": "static", "fold": False}], ids=str)
def test_it_needs_fixed_scales(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="requantize is for fixed scales that are folded"):
        Quantize(requantize=True, **options)


def test_onnx_gives_the_integers_of_eager() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    batches = [tuple(batch) for batch in BATCHES]
    eager, onnx = (
        fxpress.compile(model, [Quantize(requantize=True, **STATIC)], batches[0], calibration=batches, backend=name)
        for name in ("eager", "onnx")
    )
    x = normal(3, 7, 8, seed=9)
    assert sqnr_db(onnx(x), eager(x)) > 60 and sqnr_db(onnx(x), model(x).detach()) > 25
