"""float8_e4m3: weights stay so in the file; ONNX Runtime's CPU multiplies what they stand for in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ....ir.graph import arguments, dtype
from ....ir.ops.float8 import FLOAT8, LARGEST, float8_scale
from .lowering import Lowering, reference


def _float8_quantize(input: Tensor, scale: Tensor) -> Tensor:
    """By two casts, of which the first rounds; as gradients do not matter here, that is all of it."""
    return (input / scale).clamp(-LARGEST, LARGEST).to(FLOAT8).to(input.dtype)


def _float8_linear(
    input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, quantize_input: bool = False
) -> Tensor:
    floats = weight.to(torch.float32) * weight_scale.unsqueeze(-1)  # once, when a session is made
    if not quantize_input:
        return F.linear(input, floats, bias)
    rows: Tensor = reference(float8_scale)(input)
    result = F.linear(_float8_quantize(input, rows), floats) * rows
    return result if bias is None else result + bias


def _refuses(node: fx.Node) -> str | None:
    found = dtype(arguments(node)["input"])
    return None if found is torch.float32 else f"the kernels multiply float32, not {found}"


def _refuses_rounding(node: fx.Node) -> str | None:
    """OpenVINO 2026.4 takes a cast to float8 and back for nothing."""
    if arguments(node)["quantize_input"]:
        return "other runtimes round no activations to float8; quantize with activations=None"
    return _refuses(node)


def _refuses_floats(node: fx.Node) -> str | None:
    return _refuses(node) if arguments(node)["quantize_input"] else "its activations are not rounded"


FLOAT8_QUANTIZE = (Lowering("Cast", _float8_quantize, _refuses, standard=False),)
FLOAT8_SCALE = (Lowering("ReduceMax", reference(float8_scale)),)
FLOAT8_LINEAR = (
    Lowering("Cast+MatMul", _float8_linear, _refuses_rounding),
    Lowering("Cast+MatMul of rounded rows", _float8_linear, _refuses_floats, standard=False),
)
