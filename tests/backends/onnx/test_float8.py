"""float8_e4m3 in ONNX Runtime: the rounding, the linear layer, and what is in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from build import normal
from kernels_agree import calling
from torch import nn

import fxpress
from fxpress.backends.onnx.export import check
from fxpress.ir.equality import sqnr_db
from fxpress.ir.ops.float8 import FLOAT8, float8_linear, float8_quantize, float8_scale
from fxpress.ir.ops.quantize import dequantize
from fxpress.passes import Quantize

BOTH = {"weights": "float8_e4m3", "activations": "float8_e4m3"}


class Rounded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = dequantize(float8_quantize(x, torch.ones(())), torch.ones(()))
        return found


class Scales(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = float8_scale(x)
        return found


def test_the_scale_of_each_row_is_the_references() -> None:
    x = normal(5, 33)
    x[2] = 0
    compiled = fxpress.compile(Scales().eval(), [], (x,), backend="onnx", verify=False, threads=1)
    assert torch.equal(compiled(x), float8_scale(x))


def test_every_number_is_rounded_as_by_the_reference() -> None:
    """Numbers with every exponent and the first seven bits of the fraction, which holds all ties."""
    x = (torch.arange(0x7F80, dtype=torch.int32) << 16).view(torch.float32)
    x = torch.cat([x, -x, torch.tensor([torch.inf, -torch.inf])])[None]
    compiled = fxpress.compile(Rounded().eval(), [], (x,), backend="onnx", verify=False, threads=1)
    assert torch.equal(compiled(x), x.clamp(-448, 448).to(FLOAT8).float())


@pytest.mark.parametrize("options", [{"weights": "float8_e4m3"}, BOTH], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_gives_what_the_reference_gives(options: dict[str, Any], bias: bool) -> None:
    model = nn.Linear(33, 7, bias=bias).eval()
    eager, compiled = (
        fxpress.compile(model, [Quantize(**options)], (normal(2, 33),), backend=name, verify=False, threads=1)
        for name in ("eager", "onnx")
    )
    for rows in (1, 5):
        x = normal(rows, 33, seed=rows) * 3
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["runtime", "qdq"])
def test_the_file_has_a_byte_a_weight(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).eval()
    x = normal(3, 128)
    fxpress.export_onnx(model, tmp_path / "m.onnx", [Quantize("float8_e4m3")], (x,), form=form, verify=False, threads=1)
    loaded = onnx.load(tmp_path / "m.onnx")
    (opset,) = (item.version for item in loaded.opset_import if item.domain == "")
    stored = {item.data_type: 0 for item in loaded.graph.initializer}
    for item in loaded.graph.initializer:
        stored[item.data_type] += len(item.raw_data)
    assert stored[onnx.TensorProto.FLOAT8E4M3FN] == 2 * 128 * 256 and opset >= 19
    assert stored[onnx.TensorProto.FLOAT] < 4096
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert sqnr_db(torch.from_numpy(found), model(x).detach()) > 25


@pytest.mark.parametrize("options", [{"weights": "float8_e4m3"}, BOTH], ids=str)
def test_a_saved_model_gives_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(33, 16), nn.GELU(), nn.Linear(16, 7)).eval()
    session = fxpress.compile(model, [Quantize(**options)], (normal(2, 33),), backend="onnx", verify=False, threads=1)
    session.save(tmp_path / "saved")
    x = normal(3, 33)
    assert torch.equal(fxpress.load(tmp_path / "saved", threads=1)(x), session(x))


def test_half_precision_is_refused_with_the_reason() -> None:
    made, _ = calling(float8_linear, normal(2, 8).half(), normal(4, 8).to(FLOAT8), normal(4).abs())
    (problem,) = check(made)
    assert "the kernels multiply float32, not torch.float16" in problem
