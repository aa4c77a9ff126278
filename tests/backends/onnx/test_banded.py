"""Attention by blocks equals the reference beyond the length from which it works in blocks, and below."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.onnx.export import save, to_onnx
from fxpress.backends.onnx.lowerings.banded import block_size, refuses
from fxpress.backends.onnx.lowerings.table import LOWERINGS, supported
from fxpress.backends.onnx.session import Session
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention

HEADS, SIZE = 4, 8


class Local(nn.Module):
    """Attention on one tensor [B, N, HEADS * SIZE] with a key mask, as in a model."""

    def __init__(self, groups: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.groups, self.options = groups, options

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        rows = x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        few = rows[:, : self.groups]
        return attention(rows, few, few * 2, key_mask=key_mask, **self.options).transpose(1, 2).flatten(2)


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    key_mask = torch.rand(batch, length, generator=generator) > 0.5
    key_mask[-1] = False  # rows without any key
    return torch.randn(batch, length, HEADS * SIZE, generator=generator), key_mask


def program(groups: int, length: int = 6, dynamic: bool = True, **options: Any) -> Program:
    model = Local(groups, options).eval()
    axes = {0: Dim("batch"), 1: Dim("length", min=2)} if dynamic else None
    return trace(model, bind_example(model, inputs(2, length)), {"x": axes, "key_mask": axes} if dynamic else None)


def session(traced: Program, folder: Path) -> Session:
    (lowering,) = [item for item in LOWERINGS[attention] if item.refuses is refuses]
    save(to_onnx(traced, dict.fromkeys(traced.calls(attention), lowering)), folder / "model.onnx")
    return Session(folder / "model.onnx", threads=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "options"),
    [
        (4, {"left": 3, "right": 2}),
        (2, {"left": 20, "right": 0}),
        (1, {"left": 0, "right": 7, "empty": "mean", "scale": 0.2}),
        (2, {"left": 4, "right": 4, "empty": "nan", "softcap": 2.0}),
    ],
)
def test_equals_the_reference_at_every_length(groups: int, options: dict[str, Any], tmp_path: Path) -> None:
    traced = program(groups, **options)
    run = session(traced, tmp_path).run
    span = options["left"] + options["right"]
    size = block_size(span)
    least = 2 * (size + span)
    for batch, length in ((2, 6), (1, 1), (3, least), (2, least + 1), (1, 10 * size - 1), (2, 10 * size)):
        tensors = inputs(batch, length)
        found = [torch.from_numpy(array) for array in run([tensor.numpy() for tensor in tensors])]
        with torch.no_grad():
            expected = traced.run(tensors)
        assert compare(found, expected, run_float64(traced, tensors)).reasons == (), (batch, length)


def test_fixed_length(tmp_path: Path) -> None:
    traced = program(2, 101, dynamic=False, left=5, right=1)
    assert "Attention by blocks" in [item.name for item in supported(traced.calls(attention)[0])[0]]
    tensors = inputs(2, 101)
    found = session(traced, tmp_path).run([tensor.numpy() for tensor in tensors])
    assert compare([torch.from_numpy(found[0])], traced.run(tensors), run_float64(traced, tensors)).reasons == ()


def test_no_tensor_of_all_queries_and_keys(tmp_path: Path) -> None:
    length = 2**17  # a boolean mask of all pairs would take 16 GB
    x, key_mask = inputs(1, length)
    (found,) = session(program(1, left=3, right=3), tmp_path).run([x.numpy(), (~key_mask).numpy()])
    assert found.shape == (1, length, HEADS * SIZE) and abs(found).max() > 0


def test_a_band_in_a_sequence_of_any_length_is_not_measured() -> None:
    (node,) = program(2, left=5, right=1).calls(attention)
    candidates, reasons = supported(node)
    assert [item.name for item in candidates] == ["Attention by blocks"]
    assert set(reasons) == {
        f"{item.name}: blocks serve a band at every length" for item in LOWERINGS[attention][:-3]
    } | {
        "Attention in steps: it is not causal",
        "Attention by samples: a key mask is not all that changes the scores",
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"right": 0}, "the band has no fixed width around each query's own place"),
        ({"left": -1, "right": 2}, "the band has no fixed width around each query's own place"),
        ({"left": 1, "right": 1, "sinks": True}, "there is a bias or a sink beside the band"),
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
            return attention(x, y, y, left=1, right=1)

    traced = trace(Cross().eval(), bind_example(Cross(), (torch.rand(2, 4, 6, 8), torch.rand(2, 4, 7, 8))), None)
    assert refuses(traced.calls(attention)[0]) == "the number of queries is not that of the keys"
