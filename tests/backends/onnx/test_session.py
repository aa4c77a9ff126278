"""What ONNX Runtime makes of a file when it loads it with default options, as a user's own session does."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import fxpress

SLOW = {"SkipLayerNormalization", "BiasGelu"}  # what ONNX Runtime makes of Add+LayerNormalization and Add+Gelu


def loaded(path: Path) -> list[str]:
    """The operators of the graph that a default session runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".loaded.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.parametrize("form", ["runtime", "qdq"])
@pytest.mark.parametrize("passes", ["fuse", "quantize(int8), fuse", "quantize(int8, mode=static), fuse"])
def test_nodes_kept_apart_are_not_joined_at_load(passes: str, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    inputs = (torch.randn(2, 8, 64),)
    # Not measured: the first lowering of each operator, which none of the slow kernels is.
    compiled = fxpress.compile(model, passes, inputs, backend="onnx", calibration=[inputs], tune=False)
    compiled.to_onnx(tmp_path / "model.onnx", form=form)
    kinds = loaded(tmp_path / "model.onnx")
    assert kinds.count("LayerNormalization") == 4
    assert not SLOW & set(kinds)


@pytest.mark.parametrize("weights", ["int8", "float8_e4m3"])
def test_weights_that_floats_are_multiplied_by_are_expanded_once(weights: str, tmp_path: Path) -> None:
    """A DequantizeLinear of a weight would be computed at each run."""
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 96)).eval()
    passes = f"quantize({weights}, activations=None), fuse"
    fxpress.compile(model, passes, (torch.randn(3, 96),), backend="onnx", tune=False).to_onnx(tmp_path / "model.onnx")
    assert 2 * 96 * 64 < (tmp_path / "model.safetensors").stat().st_size < 4 * 96 * 64
    assert set(loaded(tmp_path / "model.onnx")) <= {"Gemm", "FusedGemm", "Relu"}
