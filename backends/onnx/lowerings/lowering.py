"""What a lowering is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.onnx.ops import symbolic

from ....ir.ops.table import OPERATORS


def always(node: fx.Node) -> str | None:
    """The `refuses` of a lowering that takes every node."""
    return None


STANDARD_OPSET = 21  # of the form for other runtimes: the first with 16 and 4 bits and blocks in QuantizeLinear


@dataclass(frozen=True)
class Lowering:
    """One way to lower an operator.

    `function` has the operator's own signature. It is run while torch's exporter traces the program, so it is written
    in torch operations and `symbolic` nodes (ONNX operators by name). `refuses(node)` is the reason why it cannot take
    a node, or None. `standard`: every node that it makes is an operator of the ONNX standard at STANDARD_OPSET,
    and other runtimes compute it right.
    """

    name: str
    function: Callable[..., Any]
    refuses: Callable[[fx.Node], str | None] = always
    standard: bool = True


def reference(operator: OpOverload) -> Callable[..., Any]:
    """An operator's own reference, for a lowering to what torch's exporter makes of it."""
    return OPERATORS[operator].reference


def scaled(query: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """Queries [B, H, N, D] and the scale of their scores, None being 1 / sqrt(D), as kernels take it: above zero."""
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return (query, factor) if factor > 0 else (query * factor, 1.0)


def plain_sum(*terms: Tensor) -> Tensor:
    """The sum of tensors of one dtype, as a node that stays what it is: Sum, not Add.

    ONNX Runtime joins an Add with the LayerNormalization or Gelu behind it whenever it loads a model, and the joint
    kernels are slower than the two nodes: SkipLayerNormalization takes five times as long, BiasGelu a quarter longer
    (onnxruntime 1.32 with AVX-512, at 32 to 1024 rows).
    """
    sizes = torch.broadcast_shapes(*(term.shape for term in terms))
    return symbolic("Sum", terms, dtype=terms[0].dtype, shape=sizes, version=13)


@dataclass(frozen=True)
class Probe:
    """How an operator is measured in the surroundings it has in models.

    `prepare(name, tensor)` gives the argument as it comes from its producer; `wrap(function)` undoes that before the
    operator and does what its reader does after it.
    """

    prepare: Callable[[str, Tensor], Tensor]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
