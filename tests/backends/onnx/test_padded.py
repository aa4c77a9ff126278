"""Attention that is masked where there is padding equals the reference on both sides of each of its branches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.onnx.export import save, to_onnx
from fxpress.backends.onnx.lowerings.padded import refuses
from fxpress.backends.onnx.lowerings.table import LOWERINGS, supported
from fxpress.backends.onnx.session import Session
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention

HEADS, SIZE = 4, 8


class KeyMasked(nn.Module):
    """Attention on queries x and keys y, both [B, N, HEADS * SIZE], with a key mask and values of `wide` columns."""

    def __init__(self, wide: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.wide, self.options = wide, options

    def forward(self, x: Tensor, y: Tensor, key_mask: Tensor) -> Tensor:
        query, key = (item.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for item in (x, y))
        return attention(query, key, key[..., : self.wide] * 2, key_mask=key_mask, **self.options)


def inputs(batch: int, length: int, keys: int, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """With padding on the left of the last row, and with a row that has no key, where there are several rows."""
    generator = torch.Generator().manual_seed(length)
    key_mask = torch.ones(batch, keys, dtype=torch.bool)
    if padded:
        key_mask[-1, : keys // 2] = False
        key_mask[0] &= batch == 1
    return (
        torch.randn(batch, length, HEADS * SIZE, generator=generator),
        torch.randn(batch, keys, HEADS * SIZE, generator=generator),
        key_mask,
    )


def program(wide: int = SIZE, dynamic: bool = True, **options: Any) -> Program:
    model = KeyMasked(wide, options).eval()
    batch, keys = Dim("batch"), Dim("keys", min=2)
    shapes = {"x": {0: batch, 1: Dim("length", min=2)}, "y": {0: batch, 1: keys}, "key_mask": {0: batch, 1: keys}}
    return trace(model, bind_example(model, inputs(2, 6, 7, True)), shapes if dynamic else None)


@pytest.mark.slow
@pytest.mark.parametrize(("wide", "options"), [(8, {}), (8, {"empty": "mean", "scale": 0.3}), (4, {"scale": 2.0})])
def test_equals_the_reference_in_every_branch(wide: int, options: dict[str, Any], tmp_path: Path) -> None:
    traced = program(wide, **options)
    (lowering,) = [item for item in LOWERINGS[attention] if item.refuses is refuses]
    save(to_onnx(traced, dict.fromkeys(traced.calls(attention), lowering)), tmp_path / "model.onnx")
    run = Session(tmp_path / "model.onnx", threads=1).run
    for padded in (False, True):
        for batch, length, keys in ((2, 6, 7), (1, 1, 1), (3, 5, 383), (3, 5, 384), (1, 400, 400), (2, 700, 401)):
            tensors = inputs(batch, length, keys, padded)
            found = [torch.from_numpy(array) for array in run([tensor.numpy() for tensor in tensors])]
            with torch.no_grad():
                expected = traced.run(tensors)
            verdict = compare(found, expected, run_float64(traced, tensors))
            assert verdict.reasons == (), (padded, batch, length, keys)


def test_keys_of_any_length_are_not_measured() -> None:
    candidates, reasons = supported(program().calls(attention)[0])
    assert [item.name for item in candidates] == ["Attention, masked where padded"]
    assert "Attention: a mask read where there is padding serves every length" in reasons


def test_a_fixed_length_is_measured() -> None:
    names = {item.name for item in supported(program(dynamic=False).calls(attention)[0])[0]}
    assert {"Attention, masked where padded", "Attention", "MultiHeadAttention"} <= names


def test_nan_in_rows_without_keys_is_refused() -> None:
    assert refuses(program(empty="nan").calls(attention)[0]) == "rows without any key are NaN"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "there is no key mask"),
        ({"key_mask": True, "right": 0}, "the key mask is not all that changes the scores"),
        ({"key_mask": True, "softcap": 2.0}, "the key mask is not all that changes the scores"),
        ({"key_mask": True, "groups": 2}, "MultiHeadAttention takes as many key heads as query heads"),
        ({"key_mask": True, "dtype": torch.float16}, "MultiHeadAttention is float32 only on CPU"),
    ],
)
def test_refusals(options: dict[str, Any], reason: str) -> None:
    given = dict(options)
    masked, groups, dtype = (given.pop(name, None) for name in ("key_mask", "groups", "dtype"))

    class Refused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            few = x[:, : groups or 4]
            return attention(x, few, few, key_mask=x[:, 0, :, 0] > 0 if masked else None, **given)

    example = torch.rand(2, 4, 6, 8, dtype=dtype or torch.float32)
    traced = trace(Refused().eval(), bind_example(Refused(), (example,)), None)
    found = refuses(traced.calls(attention)[0])
    assert found is not None and found.startswith(reason)
