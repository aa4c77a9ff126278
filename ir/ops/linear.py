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
