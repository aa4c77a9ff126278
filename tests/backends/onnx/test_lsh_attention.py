"""Hashed attention in ONNX equals the operator's reference, lsh_attention, at every length, in memory linear in it.

Hashes of floats: ONNX Runtime and torch add in different orders, so a token whose two largest projections differ by
less than their rounding may fall into another bucket. The random inputs here have no such token.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from build import normal
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.onnx.export import save, to_onnx
from fxpress.backends.onnx.lowerings.table import LOWERINGS, supported
from fxpress.backends.onnx.session import Session
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program
from fxpress.ir.ops.lsh_attention import lsh_attention, random_rotations

HEADS, SIZE, CHUNK = 4, 8, 8
FORMS = list(product([False, True], [False, True]))  # shared, causal
forms = pytest.mark.parametrize(("shared", "causal"), FORMS)


class Hashed(nn.Module):
    """Attention on one tensor [B, N, HEADS * SIZE] with a key mask or none, as in a model."""

    def __init__(self, groups: int, masked: bool, one: bool, options: dict[str, Any]) -> None:
        super().__init__()
        self.groups, self.masked, self.options = groups, masked, options
        self.register_buffer("rotations", random_rotations(1 if one else HEADS, SIZE, 3, 16, seed=5))

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        rows = x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        few = rows[:, : self.groups].flip(-1)
        mask = key_mask if self.masked else None
        return lsh_attention(rows, few, few[..., :5] * 2, self.rotations, mask, **self.options).transpose(1, 2)


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    key_mask = normal(batch, length, seed=length + 1) > -0.5
    key_mask[0, min(length, 11) :] = False  # of a batch, one sample is short
    if batch > 1:
        key_mask[-1] = True
    if batch > 2:
        key_mask[1] = False
    return normal(batch, length, HEADS * SIZE, seed=length, dtype=dtype), key_mask


def program(
    groups: int, masked: bool = True, one: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> Program:
    model = Hashed(groups, masked, one, {"chunk": CHUNK, **options}).eval().to(dtype)
    axes = {0: Dim("batch"), 1: Dim("length", min=2)}
    return trace(model, bind_example(model, inputs(2, 6, dtype)), {"x": axes, "key_mask": axes})


def session(traced: Program, folder: Path) -> Session:
    (lowering,) = LOWERINGS[lsh_attention]
    save(to_onnx(traced, dict.fromkeys(traced.calls(lsh_attention), lowering)), folder / "model.onnx")
    return Session(folder / "model.onnx", threads=1)


def assert_equal(traced: Program, run: Session, tensors: tuple[Tensor, ...]) -> None:
    found = [torch.from_numpy(array) for array in run.run([tensor.numpy() for tensor in tensors][: len(run.inputs)])]
    with torch.no_grad():
        assert compare(found, traced.run(tensors), run_float64(traced, tensors)).reasons == (), tensors[0].shape


@pytest.mark.slow
@forms
@pytest.mark.parametrize(("groups", "masked", "one"), [(4, True, False), (2, False, False), (1, True, True)])
def test_equals_the_reference_at_every_length(
    groups: int, masked: bool, one: bool, shared: bool, causal: bool, tmp_path: Path
) -> None:
    traced = program(groups, masked, one, shared=shared, causal=causal, scale=0.4)
    run = session(traced, tmp_path)
    # one token, one chunk and one token more, two chunks, all buckets of the rotations and chunks in several batches
    for batch, length in ((2, 6), (1, 1), (2, 8), (1, 9), (2, 16), (3, 37), (2, 400)):
        assert_equal(traced, run, inputs(batch, length))


@forms
def test_equals_the_reference(shared: bool, causal: bool, tmp_path: Path) -> None:
    traced = program(2, shared=shared, causal=causal)
    assert_equal(traced, session(traced, tmp_path), inputs(3, 45))


def test_half_precision(tmp_path: Path) -> None:
    traced = program(4, dtype=torch.float16)
    assert_equal(traced, session(traced, tmp_path), inputs(2, 45, torch.float16))


@pytest.mark.slow
@forms
def test_no_tensor_of_all_pairs(shared: bool, causal: bool, tmp_path: Path) -> None:
    length = 2**17  # a boolean mask of all pairs of one head would take 16 GB
    x, _ = inputs(1, length)
    run = session(program(4, shared=shared, causal=causal), tmp_path)
    (found,) = run.run([x.numpy(), torch.ones(1, length, dtype=torch.bool).numpy()])
    assert found.shape == (1, length, HEADS, 5)
    assert abs(found).max() > 0


def test_heads_of_no_fixed_number_are_refused() -> None:
    class AnyHeads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return lsh_attention(x, x, x, normal(1, 8, 2, 4))

    traced = trace(AnyHeads(), bind_example(AnyHeads(), (normal(2, 4, 6, 8),)), {"x": {1: Dim("heads")}})
    candidates, reasons = supported(traced.calls(lsh_attention)[0])
    assert candidates == []
    assert reasons == ["Hashing by chunks: the heads have no fixed number and size"]
