"""Linear layers with what follows them, and feed-forward blocks.

Rows whose width is a multiple of 4096 bytes all begin in one set of a processor's first cache: a matmul that goes down
several rows at a time evicts what it will read next, and takes a tenth longer (Zen 4, inner sizes 1024, 2048, 3072).
Sixteen more columns, of zeros, move each row by one cache line. The hidden rows of a feed-forward block get them for
nothing, from rows of zeros in the weights; other rows by a copy, which pays where the matmul is large.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, dtype, shape
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
    return _no_bias_act(given["activation"], given["bias"])


def _no_bias_act(activation: str, bias: fx.Node | None) -> str | None:
    if activation not in _BIAS_ACTIVATIONS:
        return f"no kernel joins a bias and {activation}"
    return "there is no bias" if bias is None else None


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


# --- feed-forward blocks ---------------------------------------------------------------------------------------

Hidden = Callable[..., Tensor]  # (input, up_weight, up_bias, activation, gate_weight, gate_bias) -> hidden rows


def _ungated(function: Callable[..., Tensor]) -> Hidden:
    """A lowering of `linear_act` as the first half of a block."""
    return lambda input, up_weight, up_bias, activation, *_: function(input, up_weight, up_bias, activation)


def _gated(function: Callable[..., Tensor]) -> Hidden:
    """A lowering of `gated_linear` as the first half of a block."""
    return lambda input, up_weight, up_bias, activation, gate_weight, gate_bias: function(
        input, gate_weight, up_weight, gate_bias, up_bias, activation
    )


def _block(hidden: Hidden, widen: bool) -> Callable[..., Tensor]:
    """A lowering of `mlp`, on the rows as one matrix.

    Widened, a row whose hidden values overflow gives NaN where it might have given an infinity.
    """

    def lowered(
        input: Tensor,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        activation: str,
        gate_weight: Tensor | None = None,
        gate_bias: Tensor | None = None,
    ) -> Tensor:
        if widen:
            below = (0, 0, 0, _LINE)
            up_weight, down_weight = F.pad(up_weight, below), F.pad(down_weight, (0, _LINE))
            up_bias = None if up_bias is None else F.pad(up_bias, (0, _LINE))
            gate_weight = None if gate_weight is None else F.pad(gate_weight, below)
            gate_bias = None if gate_bias is None else F.pad(gate_bias, (0, _LINE))
        rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        result = _linear(hidden(rows, up_weight, up_bias, activation, gate_weight, gate_bias), down_weight, down_bias)
        return result if input.dim() == 2 else result.reshape(*input.shape[:-1], down_weight.shape[0])

    return lowered


def _refuses_gated(node: fx.Node) -> str | None:
    return None if arguments(node)["gate_weight"] is None else "the block is gated"


def _refuses_gated_or_kind(node: fx.Node) -> str | None:
    given = arguments(node)
    return _refuses_gated(node) or _no_bias_act(given["activation"], given["up_bias"])


def _refuses_ungated(node: fx.Node) -> str | None:
    return "the block has no gate" if arguments(node)["gate_weight"] is None else None


def _refuses_ungated_or_packing(node: fx.Node) -> str | None:
    return _refuses_ungated(node) or _refuses_packing(node)


# --- rows that fall into one cache set -------------------------------------------------------------------------

_LINE = 16  # columns: a cache line of float32
_SETS = 4096  # bytes after which the sets of a first-level cache repeat


def _aliased(weight: fx.Node) -> str | None:
    """Why rows as wide as a weight need no more columns."""
    width = shape(weight)[-1]
    if weight.op != "get_attr":
        return f"{weight.name} is no weight: it would be copied at each run"
    if len(weight.users) > 1:
        return f"weight {weight.target} is tied: {len(weight.users)} nodes read it, and a second one would be stored"
    if not isinstance(width, int) or width * dtype(weight).itemsize % _SETS:
        return f"rows of {width} numbers begin in several sets of the cache"
    return None


def _widened(lowering: Lowering, *weights: str) -> Lowering:
    """The same on a copy of the rows with sixteen more columns, for each of which the named weights have a zero."""

    signature = inspect.signature(lowering.function)

    def function(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        wide = {name: F.pad(given[name], (0, _LINE)) for name in ("input", *weights)}
        return lowering.function(**{**given, **wide})

    def refuses(node: fx.Node) -> str | None:
        given = arguments(node)
        reasons = (_aliased(given[name]) for name in weights)
        return lowering.refuses(node) or next((reason for reason in reasons if reason), None)

    return Lowering(f"{lowering.name}, wider rows", function, refuses, lowering.standard)


def _blocks(
    name: str, hidden: Hidden, refuses: Callable[[fx.Node], str | None], standard: bool = True
) -> tuple[Lowering, Lowering]:
    """A block as it is, and with wider hidden rows."""
    return (
        Lowering(f"{name}, Linear", _block(hidden, False), refuses, standard),
        Lowering(
            f"{name}, Linear, wider rows",
            _block(hidden, True),
            lambda node: refuses(node) or _aliased(arguments(node)["down_weight"]),
            standard,
        ),
    )


_LINEAR = Lowering("Gemm or MatMul", _linear)
_LINEAR_ACTIVATION = Lowering("Linear+Activation", _linear_act)
_TWO_MATMULS = Lowering("two MatMuls", reference(gated_linear))
_SEPARATE = Lowering("separate MatMuls", _separate_linears)

LINEAR = (_LINEAR, _widened(_LINEAR, "weight"))
LINEAR_ACT = (
    _LINEAR_ACTIVATION,
    Lowering("MatMul+BiasActivation", _linear_bias_act, _refuses_bias_act, standard=False),
    _widened(_LINEAR_ACTIVATION, "weight"),
)
GATED_LINEAR = (
    _TWO_MATMULS,
    Lowering("MatMul+Split", _packed_gated_linear, _refuses_packing),
    _widened(_TWO_MATMULS, "gate_weight", "up_weight"),
)
SPLIT_LINEAR = (
    _SEPARATE,
    Lowering("MatMul+Split", reference(split_linear)),
    _widened(_SEPARATE, "weight"),
)
MLP = (
    *_blocks("Linear+Activation", _ungated(_linear_act), _refuses_gated),
    *_blocks("MatMul+BiasActivation", _ungated(_linear_bias_act), _refuses_gated_or_kind, standard=False),
    *_blocks("two MatMuls", _gated(reference(gated_linear)), _refuses_ungated),
    *_blocks("MatMul+Split", _gated(_packed_gated_linear), _refuses_ungated_or_packing),
)
