"""The table of what becomes of each operator: the one statement of what the backend supports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Promotion

from ....ir.ops.attention import attention
from ....ir.ops.block_attention import block_attention
from ....ir.ops.conv_attention import conv_attention
from ....ir.ops.linear_attention import linear_attention
from ....ir.ops.low_rank_attention import pseudo_inverse
from ....ir.ops.lsh_attention import gathered_attention
from ....ir.ops.window_attention import window_attention
from ..emitter import Emitter, Index, Value

Lower = Callable[[Emitter, fx.Node, Index], Value]
Where = Callable[[Emitter, fx.Node, Index], Index]
Code = Callable[..., str]


@dataclass(frozen=True)
class Pointwise:
    """An operator on each element by itself.

    Attributes:
        code: from the values of the tensor arguments (and numbers in their places) to Triton's text.
        numbers: the names of the arguments that are read as Python values, not as elements.
        narrow: whether the code is told, by the name of `narrow`, that its result is rounded to half precision.
    """

    promotion: Promotion
    code: Code
    numbers: tuple[str, ...] = ()
    narrow: bool = False


POINTWISE: dict[Any, Pointwise] = {}
# What a node is at an index, for operators that read elements at other places, or reduce.
VALUES: dict[Any, Lower] = {}
# Of these, the operators that read no tensor: computed wherever they are needed, rather than stored.
GENERATORS: set[Any] = set()
# Views: from an index of the result to that of the argument `self`.
VIEWS: dict[Any, Where] = {}
# Operators with a kernel of their own kind: the function of kernels/ that launches it, and what it calls arguments that
# have another name there.
KERNELS: dict[Any, tuple[str, dict[str, str]]] = {
    attention: ("attention", {}),
    window_attention: ("window_attention", {}),
    block_attention: ("block_attention", {}),
    linear_attention: ("linear_attention", {}),
    conv_attention: ("conv_attention", {}),
    gathered_attention: ("gathered_attention", {}),
    pseudo_inverse: ("pseudo_inverse", {}),
}
# Operators left to PyTorch's own library kernels, with the reason.
EXTERN: dict[Any, str] = {}


def pointwise(
    *targets: Any,
    promotion: Promotion = Promotion.DEFAULT,
    numbers: tuple[str, ...] = (),
    narrow: bool = False,
) -> Callable[[Code], Code]:
    """Declare the text of pointwise operators."""

    def register(code: Code) -> Code:
        for target in targets:
            POINTWISE[target] = Pointwise(promotion, code, numbers, narrow)
        return code

    return register


def value(*targets: Any, generator: bool = False) -> Callable[[Lower], Lower]:
    """Declare what operators are at an index."""

    def register(lower: Lower) -> Lower:
        for target in targets:
            VALUES[target] = lower
            if generator:
                GENERATORS.add(target)
        return lower

    return register


def view(*targets: Any) -> Callable[[Where], Where]:
    """Declare where operators that only move elements read them."""

    def register(where: Where) -> Where:
        VIEWS.update(dict.fromkeys(targets, where))
        return where

    return register
