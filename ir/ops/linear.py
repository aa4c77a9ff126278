"""Linear layers with what follows them."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .table import operator

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda input: F.gelu(input, approximate="tanh"),
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
    "split_linear(Tensor input, Tensor weight, Tensor? bias, int[] sizes) -> Tensor[]",
    meaning="input weight^T + bias, cut along the last axis",
)
def split_linear(input: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> list[Tensor]:
    """Several linear layers that read one input, as one matmul.

    Shapes: input [..., K], weight [sum(sizes), K], bias [sum(sizes)]; results [..., size] for each of `sizes`.
    """
    return list(F.linear(input, weight, bias).split(sizes, -1))
