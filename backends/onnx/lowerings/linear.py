"""Linear layers with what follows them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments
from ....ir.ops.linear import ACTIVATIONS, gated_linear, split_linear
from .lowering import Lowering, reference


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows as one matrix where there is a bias: Gemm adds it on the way, and takes matrices only."""
    if bias is None or input.dim() == 2:
        return F.linear(input, weight, bias)
    rows = F.linear(input.reshape(-1, input.shape[-1]), weight, bias)
    return rows.reshape(*input.shape[:-1], weight.shape[0])


def _linear_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation](_linear(input, weight, bias))


_BIAS_ACTIVATIONS = {"gelu": "BiasGelu", "gelu_tanh": "FastGelu"}


def _linear_bias_act(input: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """MatMul, then bias and activation in one pass over the result."""
    product = input @ weight.t()
    return symbolic(f"com.microsoft::{_BIAS_ACTIVATIONS[activation]}", (product, bias),
                    dtype=product.dtype, shape=product.shape, version=1)  # fmt: skip


def _refuses_bias_act(node: fx.Node) -> str | None:
    given = arguments(node)
    if given["activation"] not in _BIAS_ACTIVATIONS:
        return f"no kernel joins a bias and {given['activation']}"
    return "there is no bias" if given["bias"] is None else None


def _packed_gated_linear(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """One matmul; the weights are joined once, at export."""
    bias = torch.cat((gate_bias, up_bias)) if gate_bias is not None and up_bias is not None else None
    gate, up = F.linear(input, torch.cat((gate_weight, up_weight)), bias).chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


def _refuses_packing(node: fx.Node) -> str | None:
    given = arguments(node)
    return "one of the two has no bias" if (given["gate_bias"] is None) != (given["up_bias"] is None) else None


def _separate_linears(input: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> list[Tensor]:
    """A matmul for each part: no pass over the joint result to cut it."""
    results, start = [], 0
    for size in sizes:  # slices, not a split: those of constants are computed once, at export
        part = slice(start, start := start + size)
        results.append(_linear(input, weight[part], None if bias is None else bias[part]))
    return results


LINEAR = (Lowering("Gemm or MatMul", _linear),)
LINEAR_ACT = (
    Lowering("Linear+Activation", _linear_act),
    Lowering("MatMul+BiasActivation", _linear_bias_act, _refuses_bias_act),
)
GATED_LINEAR = (
    Lowering("two MatMuls", reference(gated_linear)),
    Lowering("MatMul+Split", _packed_gated_linear, _refuses_packing),
)
SPLIT_LINEAR = (
    Lowering("separate MatMuls", _separate_linears),
    Lowering("MatMul+Split", reference(split_linear)),
)
