"""Attention by samples, with the keys that a key mask leaves, equals the reference in each of its branches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.onnx.export import save, to_onnx
from fxpress.backends.onnx.lowerings.samples import refuses
from fxpress.backends.onnx.lowerings.table import LOWERINGS, supported
from fxpress.backends.onnx.session import Session
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention

HEADS, SIZE = 4, 8
Options = dict[str, Any]


class Samples(nn.Module):
    """Attention on queries x and keys y, both [B, N, HEADS * SIZE], with a key mask if `masked`.

    The keys are of `groups` heads, the values of `wide` columns.
    """

    def __init__(self, groups: int, wide: int, masked: bool, options: Options) -> None:
        super().__init__()
        self.groups, self.wide, self.masked, self.options = groups, wide, masked, options

    def forward(self, x: Tensor, y: Tensor, key_mask: Tensor) -> Tensor:
        query, keys = (item.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for item in (x, y))
        key = keys[:, : self.groups]
        mask = key_mask if self.masked else None
        return attention(query, key, key[..., : self.wide] * 2, key_mask=mask, **self.options) + 0 * key_mask.sum()


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


def program(
    groups: int = HEADS, wide: int = SIZE, masked: bool = True, dynamic: bool = True, **options: Any
) -> Program:
    model = Samples(groups, wide, masked, options).eval()
    batch, keys = Dim("batch"), Dim("keys", min=2)
    shapes = {"x": {0: batch, 1: Dim("length", min=2)}, "y": {0: batch, 1: keys}, "key_mask": {0: batch, 1: keys}}
    return trace(model, bind_example(model, inputs(2, 6, 7, "empty")), shapes if dynamic else None)


def lowered(traced: Program, folder: Path) -> Any:
    """Runs a program whose attention is lowered so."""
    (lowering,) = [item for item in LOWERINGS[attention] if item.refuses is refuses]
    save(to_onnx(traced, dict.fromkeys(traced.calls(attention), lowering)), folder / "model.onnx")
    return Session(folder / "model.onnx", threads=1).run


OPTIONS: list[Options] = [
    {},
    {"empty": "mean", "scale": 0.3},
    {"wide": 4, "scale": -2.0},
    {"scale": 0.0},
    {"scale": 1e-20},
    {"softcap": 2.0},
    {"groups": 2, "wide": 4, "empty": "mean"},
    {"groups": 1, "softcap": 5.0},
    {"masked": False},
    {"masked": False, "groups": 2, "empty": "nan"},
]


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["none", pytest.param("left", marks=pytest.mark.exhaustive), "empty"])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_reference_in_every_branch(options: Options, padding: str, tmp_path: Path) -> None:
    """On both sides of 2 ** 20 scores in all, and in a sample: 4 heads * length * keys."""
    traced = program(**options)
    run = lowered(traced, tmp_path)
    for batch, length, keys in ((2, 6, 7), (1, 1, 1), (2, 255, 513), (2, 256, 512), (1, 512, 512), (3, 513, 520)):
        tensors = inputs(batch, length, keys, padding)
        found = [torch.from_numpy(array) for array in run([tensor.numpy() for tensor in tensors])]
        with torch.no_grad():
            expected = traced.run(tensors)
        verdict = compare(found, expected, run_float64(traced, tensors))
        assert verdict.reasons == (), (batch, length, keys)


@pytest.mark.parametrize("length", [12, 600])
def test_masked_keys_weigh_nothing(length: int, tmp_path: Path) -> None:
    """Whatever stands in padding, the result is the same to the last bit."""
    run = lowered(program(), tmp_path)
    queries, keys, mask = inputs(2, length, length, "left")
    loud = torch.where(mask[..., None], keys, torch.nan)
    (found,), (other,) = (run([item.numpy() for item in (queries, given, mask)]) for given in (keys, loud))
    assert (found == other).all()


def test_a_sample_is_the_same_alone(tmp_path: Path) -> None:
    """What other samples of a batch are changes nothing."""
    run = lowered(program(), tmp_path)
    tensors = [item.numpy() for item in inputs(3, 9, 9, "left")]
    (together,) = run(tensors)
    (alone,) = run([item[2:] for item in tensors])
    assert (together[2:] == alone).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("padding", ["none", "left", "empty"])
@pytest.mark.parametrize("groups", [HEADS, 2])
def test_sizes_that_are_fixed(groups: int, padding: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """ONNX Runtime infers shapes from them."""
    model = Samples(groups, 4, True, {}).eval()
    x, y, key_mask = inputs(3, 6, 7, padding)
    example = (x.to(dtype), y.to(dtype), key_mask)
    traced = trace(model, bind_example(model, example), None)
    (found,) = lowered(traced, tmp_path)([item.numpy() for item in example])
    with torch.no_grad():
        verdict = compare([torch.from_numpy(found)], traced.run(example), run_float64(traced, example))
    assert verdict.reasons == ()


@pytest.mark.parametrize("masked", [False, True])
def test_keys_of_any_length_are_not_measured(masked: bool) -> None:
    candidates, reasons = supported(program(masked=masked).calls(attention)[0])
    assert [item.name for item in candidates] == ["Attention by samples"]
    assert "Attention: samples serve every length" in reasons


def test_a_fixed_length_is_measured() -> None:
    names = {item.name for item in supported(program(dynamic=False).calls(attention)[0])[0]}
    assert {"Attention by samples", "Attention", "MultiHeadAttention"} <= names


def test_nan_in_rows_without_keys_is_refused() -> None:
    assert refuses(program(empty="nan").calls(attention)[0]) == "rows without any key are NaN"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"key_mask": True, "right": 0}, "a key mask is not all that changes the scores"),
        ({"dtype": torch.float64}, "ONNX Runtime's kernels are for float32 and float16"),
    ],
)
def test_refusals(options: dict[str, Any], reason: str) -> None:
    given = dict(options)
    masked, dtype = given.pop("key_mask", False), given.pop("dtype", torch.float32)

    class Refused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attention(x, x, x, key_mask=x[:, 0, :, 0] > 0 if masked else None, **given)

    example = torch.rand(2, 4, 6, 8, dtype=dtype)
    traced = trace(Refused().eval(), bind_example(Refused(), (example,)), None)
    found = refuses(traced.calls(attention)[0])
    assert found is not None and found.startswith(reason)
