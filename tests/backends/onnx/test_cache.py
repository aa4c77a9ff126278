"""Attention on keys and values joined to a cache: in ONNX heads first, equal to the reference at every size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.onnx.export import save, to_onnx
from fxpress.backends.onnx.lowerings.table import supported
from fxpress.backends.onnx.session import Session
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention

HEADS, SIZE = 4, 8
FIRST = "Attention, heads first"


class Cached(nn.Module):
    """Queries of N new tokens on a cache of P and their own keys, of `groups` heads; values are of `wide` columns."""

    def __init__(self, groups: int, wide: int, masked: bool, left: int | None, options: dict[str, Any]) -> None:
        super().__init__()
        self.groups, self.wide, self.masked, self.left, self.options = groups, wide, masked, left, options

    def forward(self, x: Tensor, past: Tensor, key_mask: Tensor) -> Tensor:
        query = x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        keys = torch.cat([past, query[:, : self.groups]], 2)
        values = torch.cat([past[..., : self.wide], query[:, : self.groups, :, : self.wide]], 2)
        length = past.shape[2]
        left = None if self.left is None else self.left - length  # the last `left` keys and its own
        mask = key_mask if self.masked else None
        found = attention(query, keys, values, key_mask=mask, left=left, right=length, **self.options)
        return found + 0 * key_mask.sum()


def inputs(groups: int, batch: int, past: int, new: int, empty: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The first row's first keys are padding, or all of them."""
    generator = torch.Generator().manual_seed(past)
    key_mask = torch.ones(batch, past + new, dtype=torch.bool)
    key_mask[0, : (past + new) // 2] = False
    if empty:
        key_mask[0] = False
    x = torch.randn(batch, new, HEADS * SIZE, generator=generator)
    return x, torch.randn(batch, groups, past, SIZE, generator=generator), key_mask


def program(
    groups: int = HEADS, wide: int = SIZE, masked: bool = True, left: int | None = None, **options: Any
) -> Program:
    model = Cached(groups, wide, masked, left, options).eval()
    batch, past, new = Dim("batch"), Dim("past", min=2), Dim("new", min=2)
    shapes = {"x": {0: batch, 1: new}, "past": {0: batch, 2: past}, "key_mask": {0: batch, 1: Dim.AUTO}}
    return trace(model, bind_example(model, inputs(groups, 2, 6, 3)), shapes)


@pytest.mark.parametrize("empty", ["zeros", "mean", "nan"])
@pytest.mark.parametrize(
    ("groups", "wide", "masked", "options"),
    [
        (HEADS, SIZE, True, {}),
        (2, 4, True, {"scale": 0.5, "softcap": 3.0}),
        (1, SIZE, False, {}),
        (2, SIZE, True, {"left": 3}),
    ],
)
def test_equals_the_reference(
    groups: int, wide: int, masked: bool, options: dict[str, Any], empty: str, tmp_path: Path
) -> None:
    traced = program(groups, wide, masked, empty=empty, **options)
    chosen = {node: supported(node)[0][0] for node in traced.calls(attention)}
    assert [item.name for item in chosen.values()] == [FIRST]
    save(to_onnx(traced, chosen), tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", 1)
    for batch, past, new in ((2, 6, 3), (3, 9, 1), (1, 0, 4), (1, 1, 1), (2, 0, 391)):
        given = inputs(groups, batch, past, new)
        found = [torch.from_numpy(item) for item in session.run([item.numpy() for item in given])]
        with torch.no_grad():
            verdict = compare(found, traced.run(given), run_float64(traced, given))
        assert verdict.reasons == (), (batch, past, new)


@pytest.mark.parametrize(("empty", "steps"), [("zeros", 1), ("mean", 0)])
def test_a_long_prompt_is_computed_in_steps(empty: str, steps: int) -> None:
    """Where rows without any key are zeros, a branch serves prompts behind an empty cache."""
    traced = program(empty=empty)
    model = to_onnx(traced, {node: supported(node)[0][0] for node in traced.calls(attention)})
    assert sum(node.op_type == "If" for node in model.graph) == steps


def test_no_other_kernel_transposes_a_cache() -> None:
    candidates, reasons = supported(program().calls(attention)[0])
    assert [item.name for item in candidates] == [FIRST]
    assert "MatMul+Softmax: keys and values are a cache's, heads first" in reasons


def test_keys_of_projections_are_tokens_first() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            heads = x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
            return attention(heads, heads, heads)

    traced = trace(Own().eval(), bind_example(Own(), (torch.rand(2, 6, HEADS * SIZE),)), None)
    candidates, reasons = supported(traced.calls(attention)[0])
    assert FIRST not in {item.name for item in candidates}
    assert f"{FIRST}: keys and values come from projections, tokens first" in reasons


def test_sinks_are_left_to_matmuls() -> None:
    class Sinks(nn.Module):
        def forward(self, x: Tensor, past: Tensor) -> Tensor:
            keys = torch.cat([past, x], 2)
            return attention(x, keys, keys, sinks=x[0, :, 0, 0])

    example = (torch.rand(2, 4, 3, 8), torch.rand(2, 4, 5, 8))
    traced = trace(Sinks().eval(), bind_example(Sinks(), example), None)
    assert [item.name for item in supported(traced.calls(attention)[0])[0]] == ["MatMul+Softmax"]
