"""Convolution in ONNX equals the operator's reference, conv_attention, at every length."""

from pathlib import Path

import pytest
import torch
from build import normal
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.onnx.export import save, to_onnx
from fxpress.backends.onnx.lowerings.conv_attention import block_size
from fxpress.backends.onnx.lowerings.table import LOWERINGS, supported
from fxpress.backends.onnx.session import Session
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program
from fxpress.ir.ops.conv_attention import conv_attention

HEADS, SIZE = 4, 6


class Mixed(nn.Module):
    """Convolution of one tensor [B, N, groups * SIZE], with taps of its own or made of the tensor."""

    def __init__(self, groups: int, width: int, dynamic: bool, masked: bool, causal: bool) -> None:
        super().__init__()
        self.groups, self.width, self.dynamic, self.masked, self.causal = groups, width, dynamic, masked, causal
        self.register_buffer("taps", normal(HEADS, width).softmax(-1))
        self.register_buffer("project", normal(groups * SIZE, HEADS * width, seed=1))

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        value = x.unflatten(-1, (self.groups, SIZE)).transpose(1, 2)
        kernel = self.taps
        if self.dynamic:
            kernel = (x @ self.project).unflatten(-1, (HEADS, self.width)).softmax(-1).transpose(1, 2)
        return conv_attention(value, kernel, key_mask if self.masked else None, self.causal).transpose(1, 2)


def inputs(batch: int, length: int, groups: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    key_mask = normal(batch, length, seed=length + 1) > 0.2
    key_mask[0, length // 2 :] = False  # rows without any place
    return normal(batch, length, groups * SIZE, seed=length, dtype=dtype), key_mask


def program(
    groups: int, width: int, dynamic: bool, masked: bool, causal: bool, dtype: torch.dtype = torch.float32
) -> Program:
    model = Mixed(groups, width, dynamic, masked, causal).eval().to(dtype)
    axes = {0: Dim("batch"), 1: Dim("length", min=2)}
    return trace(model, bind_example(model, inputs(2, 6, groups, dtype)), {"x": axes, "key_mask": axes})


def session(traced: Program, folder: Path) -> Session:
    (lowering,) = LOWERINGS[conv_attention]
    save(to_onnx(traced, dict.fromkeys(traced.calls(conv_attention), lowering)), folder / "model.onnx")
    return Session(folder / "model.onnx", threads=1)


def assert_equal(traced: Program, run: Session, tensors: tuple[Tensor, ...]) -> None:
    found = [torch.from_numpy(array) for array in run.run([tensor.numpy() for tensor in tensors])]
    assert compare(found, traced.run(tensors), run_float64(traced, tensors)).reasons == (), tensors[0].shape


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("groups", "width", "masked", "causal"),
    [(4, 9, True, False), (2, 4, True, True), (1, 17, False, False), (4, 1, False, True)],
)
def test_equals_the_reference_at_every_length(
    groups: int, width: int, masked: bool, causal: bool, dynamic: bool, tmp_path: Path
) -> None:
    traced = program(groups, width, dynamic, masked, causal)
    run = session(traced, tmp_path)
    size = block_size(width)
    for batch, length in ((2, 6), (1, 1), (3, size), (2, size + 1), (1, 5 * size - 1)):
        assert_equal(traced, run, inputs(batch, length, groups))


@pytest.mark.parametrize("dynamic", [False, True])
def test_half_precision(dynamic: bool, tmp_path: Path) -> None:
    traced = program(4, 5, dynamic, True, False, torch.float16)
    assert_equal(traced, session(traced, tmp_path), inputs(2, 45, 4, torch.float16))


def test_no_tensor_of_all_pairs(tmp_path: Path) -> None:
    length = 2**17  # a boolean mask of all pairs would take 16 GB
    x, key_mask = inputs(1, length, 4)
    (found,) = session(program(4, 9, True, True, False), tmp_path).run([x.numpy(), key_mask.numpy()])
    assert found.shape == (1, length, HEADS, SIZE)
    assert abs(found).max() > 0


def test_taps_of_no_fixed_number_are_refused() -> None:
    class AnyTaps(nn.Module):
        def forward(self, x: Tensor, taps: Tensor) -> Tensor:
            return conv_attention(x, taps)

    shapes = {"x": None, "taps": {1: Dim("width")}}
    traced = trace(AnyTaps(), bind_example(AnyTaps(), (normal(2, 4, 6, 8), normal(4, 3))), shapes)
    candidates, reasons = supported(traced.calls(conv_attention)[0])
    assert candidates == []
    assert reasons == ["Convolution by blocks: the heads or the taps have no fixed number"]
