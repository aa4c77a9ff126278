"""Linear layers with what follows them."""

from __future__ import annotations

from collections.abc import Callable

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


@operator(
    "linear_act(Tensor input, Tensor weight, Tensor? bias, str activation) -> Tensor",
    meaning="activation(input weight^T + bias)",
)
def linear_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Linear layer and elementwise activation, one of `ACTIVATIONS`.

    Shapes: input [..., K], weight [N, K], bias [N]; result [..., N].
    """
    return ACTIVATIONS[activation](F.linear(input, weight, bias))


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
    return ACTIVATIONS[activation](F.linear(input, gate_weight, gate_bias)) * F.linear(input, up_weight, up_bias)


@operator(
    "split_linear(Tensor input, Tensor weight, Tensor? bias, int[] sizes) -> Tensor[]",
    meaning="input weight^T + bias, cut along the last axis",
)
def split_linear(input: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> list[Tensor]:
    """Several linear layers that read one input, as one matmul.

    Shapes: input [..., K], weight [sum(sizes), K], bias [sum(sizes)]; results [..., size] for each of `sizes`.
    """
    return list(F.linear(input, weight, bias).split(sizes, -1))
