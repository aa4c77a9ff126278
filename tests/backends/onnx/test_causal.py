"""Causal attention in steps, at once or by samples equals the reference at every length and with any padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.onnx.export import save, to_onnx
from fxpress.backends.onnx.lowerings.causal import refuses
from fxpress.backends.onnx.lowerings.table import LOWERINGS, supported
from fxpress.backends.onnx.session import Session
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention

HEADS, SIZE = 4, 8


class Causal(nn.Module):
    """Causal attention on one tensor [B, N, HEADS * SIZE], with a key mask if `padded`."""

    def __init__(self, groups: int, padded: bool, options: dict[str, Any]) -> None:
        super().__init__()
        self.groups, self.padded, self.options = groups, padded, options

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        rows = x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        few = rows[:, : self.groups]
        mask = key_mask if self.padded else None
        found = attention(rows, few, few * 2, key_mask=mask, right=0, **self.options).transpose(1, 2).flatten(2)
        return found * key_mask.any()


def inputs(batch: int, length: int, padding: str = "scattered") -> tuple[Tensor, Tensor]:
    """Padding "scattered" is anywhere; "runs": on the left, on the right or all but one key, by turns."""
    generator = torch.Generator().manual_seed(length)
    key_mask = torch.ones(batch, length, dtype=torch.bool)
    if padding == "scattered":
        key_mask = torch.rand(batch, length, generator=generator) > 0.5
        key_mask[0, : length // 2] = False  # padded on the left: the first rows have no key
        key_mask[-1, -1] = True
    elif padding == "runs":
        key_mask[::3, : length // 2] = False
        key_mask[1::3, (length + 1) // 2 :] = False
        key_mask[2::3] = torch.arange(length) == length // 3
    return torch.randn(batch, length, HEADS * SIZE, generator=generator), key_mask


def program(groups: int, padded: bool = False, dynamic: bool = True, length: int = 6, **options: Any) -> Program:
    model = Causal(groups, padded, options).eval()
    axes = {0: Dim("batch"), 1: Dim("length", min=2)} if dynamic else None
    return trace(model, bind_example(model, inputs(2, length)), {"x": axes, "key_mask": axes} if dynamic else None)


def session(traced: Program, folder: Path) -> Session:
    (lowering,) = [item for item in LOWERINGS[attention] if item.refuses is refuses]
    save(to_onnx(traced, dict.fromkeys(traced.calls(attention), lowering)), folder / "model.onnx")
    return Session(folder / "model.onnx", threads=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "padded", "options"),
    [
        (4, False, {}),
        (2, False, {"scale": 0.2, "softcap": 2.0}),
        (4, True, {}),
        (1, True, {"empty": "mean"}),
        (2, True, {"empty": "nan", "softcap": 2.0}),
    ],
)
def test_equals_the_reference_at_every_length(
    groups: int, padded: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    traced = program(groups, padded, **options)
    run = session(traced, tmp_path).run
    for batch, length in ((2, 6), (1, 1), (3, 383), (2, 384), (1, 385), (2, 400), (1, 1003)):
        tensors = inputs(batch, length)
        found = [torch.from_numpy(array) for array in run([tensor.numpy() for tensor in tensors])]
        with torch.no_grad():
            expected = traced.run(tensors)
        assert compare(found, expected, run_float64(traced, tensors)).reasons == (), (batch, length)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["none", "runs", "scattered"])
@pytest.mark.parametrize("options", [{}, {"groups": 2, "softcap": 2.0}, {"groups": 1, "empty": "mean"}])
def test_padding_of_each_kind(padding: str, options: dict[str, Any], tmp_path: Path) -> None:
    traced = program(padded=True, **{"groups": 4, **options})
    run = session(traced, tmp_path).run
    for batch, length in ((4, 7), (3, 1), (1, 130), (3, 390)):
        tensors = inputs(batch, length, padding)
        found = [torch.from_numpy(array) for array in run([tensor.numpy() for tensor in tensors])]
        with torch.no_grad():
            expected = traced.run(tensors)
        assert compare(found, expected, run_float64(traced, tensors)).reasons == (), (batch, length)


def test_padding_weighs_nothing(tmp_path: Path) -> None:
    """Whatever stands in it, the tokens beside it are the same to the last bit."""
    run = session(program(4, padded=True), tmp_path).run
    x, mask = inputs(3, 20, "runs")
    loud = torch.where(mask[..., None], x, torch.nan)
    (found,), (other,) = (run([item.numpy() for item in (given, mask)]) for given in (x, loud))
    assert (found[mask] == other[mask]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("padding", ["none", "runs", "scattered"])
@pytest.mark.parametrize("fixed", [(), ("x",), ("x", "length")])
def test_sizes_that_are_fixed(fixed: tuple[str, ...], padding: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """ONNX Runtime infers shapes from them."""
    x, key_mask = inputs(3, 9, padding)
    example = (x.to(dtype), key_mask)
    axes = {place: Dim.AUTO for place, name in enumerate(("x", "length")) if name not in fixed}
    shapes = {"x": axes, "key_mask": axes} if axes else None
    traced = trace(Causal(4, True, {}).eval(), bind_example(Causal(4, True, {}), example), shapes)
    (found,) = session(traced, tmp_path).run([item.numpy() for item in example])
    with torch.no_grad():
        expected = traced.run(example)
    assert compare([torch.from_numpy(found)], expected, run_float64(traced, example)).reasons == ()


def test_heads_of_a_size_that_no_causal_kernel_takes(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
            rows = x.unflatten(-1, (8, 4)).transpose(1, 2)
            return attention(rows, rows, rows, key_mask=key_mask, right=0)

    tensors = inputs(2, 9)
    traced = trace(Odd().eval(), bind_example(Odd(), tensors), None)
    (found,) = session(traced, tmp_path).run([item.numpy() for item in tensors])
    with torch.no_grad():
        expected = traced.run(tensors)
    assert compare([torch.from_numpy(found)], expected, run_float64(traced, tensors)).reasons == ()


def test_a_sequence_of_any_length_is_not_measured() -> None:
    (node,) = program(2).calls(attention)
    candidates, reasons = supported(node)
    assert [item.name for item in candidates] == ["Attention in steps"]
    assert "Attention: steps serve causal attention at every length" in reasons


def test_a_fixed_length_is_measured() -> None:
    (node,) = program(4, dynamic=False).calls(attention)
    assert {"Attention in steps", "GroupQueryAttention"} <= {item.name for item in supported(node)[0]}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"right": 1}, "it is not causal"),
        ({"right": 0, "left": 3}, "it is not causal"),
        ({"right": 0, "sinks": True}, "there is a bias or a sink"),
    ],
)
def test_refusals(options: dict[str, Any], reason: str) -> None:
    class Refused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sinks = {"sinks": x[0, :, 0, 0]} if options.get("sinks") else {}
            return attention(x, x, x, **{**options, **sinks})

    traced = trace(Refused().eval(), bind_example(Refused(), (torch.rand(2, 4, 6, 8),)), None)
    assert refuses(traced.calls(attention)[0]) == reason


def test_other_keys_are_refused() -> None:
    class Cross(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return attention(x, y, y, right=0)

    traced = trace(Cross().eval(), bind_example(Cross(), (torch.rand(2, 4, 6, 8), torch.rand(2, 4, 7, 8))), None)
    assert refuses(traced.calls(attention)[0]) == "the number of queries is not that of the keys"
