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


def inputs(batch: int, length: int, keys: int, padding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Padding "left" is the first half of the last row; "empty": the first row has no key besides."""
    generator = torch.Generator().manual_seed(length)
    key_mask = torch.ones(batch, keys, dtype=torch.bool)
    if padding != "none":
        key_mask[-1, : keys // 2] = False
        key_mask[0] &= padding != "empty"
    return (
        torch.randn(batch, length, HEADS * SIZE, generator=generator),
        torch.randn(batch, keys, HEADS * SIZE, generator=generator),
        key_mask,
    )


def program(wide: int = SIZE, dynamic: bool = True, **options: Any) -> Program:
    model = KeyMasked(wide, options).eval()
    batch, keys = Dim("batch"), Dim("keys", min=2)
    shapes = {"x": {0: batch, 1: Dim("length", min=2)}, "y": {0: batch, 1: keys}, "key_mask": {0: batch, 1: keys}}
    return trace(model, bind_example(model, inputs(2, 6, 7, "empty")), shapes if dynamic else None)


OPTIONS: list[tuple[int, dict[str, Any]]] = [
    (8, {}),
    (8, {"empty": "mean", "scale": 0.3}),
    (4, {"scale": -2.0}),
    (8, {"scale": 0.0}),
    (8, {"scale": 1e-20}),
]


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["none", "left", "empty"])
@pytest.mark.parametrize(("wide", "options"), OPTIONS)
def test_equals_the_reference_in_every_branch(wide: int, options: dict[str, Any], padding: str, tmp_path: Path) -> None:
    """The kernel that reads no mask runs where 4 heads * batch * length * keys is 2 ** 20 or more."""
    traced = program(wide, **options)
    (lowering,) = [item for item in LOWERINGS[attention] if item.refuses is refuses]
    save(to_onnx(traced, dict.fromkeys(traced.calls(attention), lowering)), tmp_path / "model.onnx")
    run = Session(tmp_path / "model.onnx", threads=1).run
    for batch, length, keys in ((2, 6, 7), (1, 1, 1), (2, 255, 513), (2, 256, 512), (1, 512, 512), (3, 301, 405)):
        tensors = inputs(batch, length, keys, padding)
        found = [torch.from_numpy(array) for array in run([tensor.numpy() for tensor in tensors])]
        with torch.no_grad():
            expected = traced.run(tensors)
        verdict = compare(found, expected, run_float64(traced, tensors))
        assert verdict.reasons == (), (batch, length, keys)


def test_masked_keys_weigh_nothing_where_no_mask_is_read(tmp_path: Path) -> None:
    """Whatever stands in padding, the other rows are the same to the last bit."""
    traced = program()
    (lowering,) = [item for item in LOWERINGS[attention] if item.refuses is refuses]
    save(to_onnx(traced, dict.fromkeys(traced.calls(attention), lowering)), tmp_path / "model.onnx")
    run = Session(tmp_path / "model.onnx", threads=1).run
    queries, keys, mask = inputs(2, 512, 512, "left")
    loud = torch.where(mask[..., None], keys, 1e4 * keys)
    (found,), (other,) = (run([item.numpy() for item in (queries, given, mask)]) for given in (keys, loud))
    assert (found == other).all()


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
