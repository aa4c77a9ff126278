"""Linear layers with what follows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import operator

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda input: F.gelu(input, approximate="tanh"),
    "quick_gelu": lambda input: input * torch.sigmoid(1.702 * input),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": lambda input: input.tanh(),
}


aten = torch.ops.aten
ATEN_ACTIVATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "relu": (aten.relu.default, {}),
    "silu": (aten.silu.default, {}),
    "tanh": (aten.tanh.default, {}),
}  # torch's operators for those of `ACTIVATIONS` that it has, with their options


def _linear_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation](F.linear(input, weight, bias))


def _gated_linear(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    return _linear_act(input, gate_weight, gate_bias, activation) * F.linear(input, up_weight, up_bias)


@operator(
    "linear_act(Tensor input, Tensor weight, Tensor? bias, str activation) -> Tensor",
    meaning="activation(input weight^T + bias)",
)
def linear_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Linear layer and elementwise activation, one of `ACTIVATIONS`.

    Shapes: input [..., K], weight [N, K], bias [N]; result [..., N].
    """
    return _linear_act(input, weight, bias, activation)


@operator(
    "gated_linear(Tensor input, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias, "
    "str activation) -> Tensor",
    meaning="activation(input gate_weight^T + gate_bias) * (input up_weight^T + up_bias)",
)
def gated_linear(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Gated linear unit (Shazeer, 2020), the first half of a gated MLP; `activation` is one of `ACTIVATIONS`.

    Shapes: input [..., K], both weights [N, K], both biases [N]; result [..., N].
    """
    return _gated_linear(input, gate_weight, up_weight, gate_bias, up_bias, activation)


@operator(
    "mlp(Tensor input, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, str activation, "
    "Tensor? gate_weight=None, Tensor? gate_bias=None) -> Tensor",
    meaning="hidden down_weight^T + down_bias, hidden = linear_act, or gated_linear where there is a gate_weight",
)
def mlp(
    input: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """Feed-forward block of a Transformer (Vaswani et al., 2017), or a gated one (Shazeer, 2020).

    Shapes: input [..., K], up_weight and gate_weight [I, K], their biases [I], down_weight [N, I], down_bias [N];
    result [..., N]. `activation`, one of `ACTIVATIONS`, is of the gate where there is one, else of the up projection.
    """
    if gate_weight is None:
        hidden = _linear_act(input, up_weight, up_bias, activation)
    else:
        hidden = _gated_linear(input, gate_weight, up_weight, gate_bias, up_bias, activation)
    return F.linear(hidden, down_weight, down_bias)


@operator(
    "split_linear(Tensor input, Tensor weight, Tensor? bias, int[] sizes) -> Tensor[]",
    meaning="input weight^T + bias, cut along the last axis",
)
def split_linear(input: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> list[Tensor]:
    """Several linear layers that read one input, as one matmul.

    Shapes: input [..., K], weight [sum(sizes), K], bias [sum(sizes)]; results [..., size] for each of `sizes`.
    """
    return list(F.linear(input, weight, bias).split(sizes, -1))
